"""CUDA graphs of fixed-shape steps; on other devices the steps are called directly.

graphs = Graphs(device)
graphs.run("logits", step)        # runs; the second run captures, later ones replay
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Without cuDNN, which builds a plan for every new shape.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Graphs:
    """Runs fixed-shape steps, on CUDA as graphs: the first run of a step warms up, the second captures it.

    A step has no arguments and returns nothing. It always reads and writes the same tensors, which outlive it, and
    never synchronises with the device. Nothing that it allocates outlives it, so all graphs share one memory pool.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.enabled = enabled and device.type == "cuda"
        self.warm: set[Hashable] = set()
        self.captured: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run ``step`` once; ``key`` identifies its graph."""
        if key in self.captured:
            self.captured[key].replay()
            return
        with sdpa_kernel(KERNELS):
            if key not in self.warm or not self.enabled:
                self.warm.add(key)
                step()
                return
            self.captured[key] = self._capture(step)  # records the step without running it
        self.captured[key].replay()

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.captured.values())).pool() if self.captured else None
        # thread_local: other threads may use the device meanwhile, as NCCL's watchdog does
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
        return graph
