"""CUDA graphs of steps of fixed shapes, which are called as they are on other devices.

graphs = Graphs(device)
graphs.run("logits", step)        # runs; the second run captures, later ones replay
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Not cuDNN's, which makes a plan for every shape it meets.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Graphs:
    """Runs steps of fixed shapes, on CUDA as graphs: the first run of a step warms up, the second captures it.

    A step takes and returns nothing. It reads and writes tensors that outlive it, always the same, and never waits for
    the device. Nothing that it allocates outlives it, so all graphs share one pool of memory.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.enabled = enabled and device.type == "cuda"
        self.warm: set[Hashable] = set()
        self.captured: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Runs ``step`` once; ``key`` names it among the steps of this object."""
        if key in self.captured:
            self.captured[key].replay()
            return
        with sdpa_kernel(KERNELS):
            if key not in self.warm or not self.enabled:
                self.warm.add(key)
                step()
                return
            self.captured[key] = self._capture(step)  # which records the step without running it
        self.captured[key].replay()

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.captured.values())).pool() if self.captured else None
        # Other threads may use the device meanwhile: NCCL's watchdog does.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
        return graph
