"""The device of a stage, its precision, and its rank.

``torchrun`` sets the rank in the environment; a single process is rank 0 of 1.
"""

from __future__ import annotations

import os
from typing import Literal

import torch

from pipeline.runtime.errors import StageError

Precision = Literal["auto", "bf16", "fp32"]


def rank() -> int:
    """Return the rank of this process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``; ``auto`` is this process's GPU, without CUDA the CPU.

    Raises:
        StageError: the name is unknown, or this machine has no such device.
    """
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StageError(f"no device is called {name!r}; there are auto, cpu, cuda, cuda:N, mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StageError(f"device {name} is not there: this machine, or this PyTorch, has no CUDA")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise StageError(f"device {name} is not there: this machine, or this PyTorch, has no Metal")
    return device


def fast_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Private in torch; if a version lacks it, assume no support.
        check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return bool((check and check()) or (amx and amx()))
    return False


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the autocast context of a precision; ``auto`` is bfloat16 if the device is faster with it."""
    bf16 = precision == "bf16" or (precision == "auto" and fast_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def precision_name(device: torch.device, precision: Precision) -> str:
    """Return the precision that ``autocast`` selects: ``bf16`` or ``fp32``."""
    return "bf16" if precision == "bf16" or (precision == "auto" and fast_bf16(device)) else "fp32"
