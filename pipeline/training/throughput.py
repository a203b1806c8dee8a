"""Training throughput: achieved FLOP/s, the fraction of a known GPU's peak (MFU), and memory.

speed = Speed(model.config, device, "bf16", processes=8)
speed.of(images_per_s=5000.0, patches=141.4)             # {"flops_per_s": 5.7e14, "mfu": 0.0725}
"""

from __future__ import annotations

import resource
import sys

import torch

from dpar.flops import TRAINING_FLOPS_PER_MAC, linear_macs
from dpar.llamagen import LlamaGenConfig
from dpar.model import DPARConfig

# Dense bfloat16 peaks in FLOP/s, from data sheets. The first key that a GPU's name contains is used.
PEAK_BF16 = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 4080": 97e12,
    "RTX 3090": 71e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
}


def peak_flops(name: str, precision: str) -> float | None:
    """Return the dense peak of the GPU called ``name`` in FLOP/s; None if unknown or ``precision`` is not ``bf16``."""
    if precision != "bf16":
        return None
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


class Speed:
    """Converts images per second to FLOP/s of the linear layers: 6 per multiply-accumulate."""

    def __init__(
        self, config: DPARConfig | LlamaGenConfig, device: torch.device, precision: str, processes: int
    ) -> None:
        most = float(config.n_tokens)
        self._least = linear_macs(config, 1.0)
        self._slope = (linear_macs(config, most) - self._least) / max(1.0, most - 1)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(name, precision)
        self.peak = None if peak is None else peak * processes

    def flops(self, patches: float) -> float:
        """Return the FLOPs of training on an image, for a mean of ``patches`` per image."""
        return TRAINING_FLOPS_PER_MAC * (self._least + self._slope * (patches - 1))

    def of(self, images_per_s: float, patches: float) -> dict[str, float]:
        """Return the achieved FLOP/s of all processes, and the fraction of their GPUs' peak if known."""
        achieved = images_per_s * self.flops(patches)
        return {"flops_per_s": achieved} | ({} if self.peak is None else {"mfu": achieved / self.peak})


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: of tensors on its GPU, or resident without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
