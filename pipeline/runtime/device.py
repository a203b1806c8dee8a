"""The device of a stage, its precision, and its rank.

``torchrun`` sets the rank in the environment; a single process is rank 0 of 1.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

import torch

from pipeline.runtime.errors import StageError

Precision = Literal["auto", "bf16", "fp32"]

_workers_fast_bf16: bool | None = None  # None outside of Ray
_is_driver = False


def rank() -> int:
    """Return the rank of this process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def follow_workers(fast: bool | None, *, driver: bool = False) -> None:
    """Use the precision that suits Ray's workers; a driver computes nothing and needs no device.

    Args:
        fast: what `fast_bf16` returns from now on; None undoes the call.
        driver: `choose_device` returns the CPU from now on.
    """
    global _workers_fast_bf16, _is_driver
    _workers_fast_bf16, _is_driver = fast, driver


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``; ``cuda`` is this process's GPU, ``auto`` the same or, without CUDA, the CPU.

    Raises:
        StageError: the name is unknown, or this machine has no such device.
    """
    if _is_driver:
        return torch.device("cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StageError(f"no device is called {name!r}; choose from auto, cpu, cuda, cuda:N, mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StageError(f"device {name} is not available: this machine, or this PyTorch, has no CUDA")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise StageError(f"device {name} is not available: this machine, or this PyTorch, has no Metal")
    return device


def fast_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if _workers_fast_bf16 is not None:
        return _workers_fast_bf16
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Private in torch; if a version lacks it, assume no support.
        check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return bool((check and check()) or (amx and amx()))
    return False


@contextlib.contextmanager
def autocast(device: torch.device, precision: Precision) -> Iterator[None]:
    """Compute in a precision; ``auto`` is bfloat16 if the device is faster with it.

    In float32 cuDNN's convolutions use float32 too, not TF32 (10 bits of mantissa), which is their default.
    """
    if precision_name(device, precision) == "bf16":
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def precision_name(device: torch.device, precision: Precision) -> str:
    """Return the precision that ``autocast`` selects: ``bf16`` or ``fp32``."""
    return "bf16" if precision == "bf16" or (precision == "auto" and fast_bf16(device)) else "fp32"
