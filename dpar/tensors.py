"""Read the tensors of weight files, check them against a module, report mismatches.

tensors = read_tensors(Path("weights/model.safetensors"))
load_tensors(model, tensors, "weights/model.safetensors")    # ModelError lists what is missing or misshapen
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from dpar.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file, on the CPU."""
    if not path.is_file():
        raise ModelError(f"{path.parent} holds no weights yet: {path.name} is missing")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises many classes of exception for damaged files
        raise ModelError(f"{path} is not a complete safetensors file: {first_line(error)}") from error


def load_tensors(module: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Load exactly ``tensors`` into ``module``; raise ModelError with a list if they do not fit."""
    check_tensors(module, tensors, source)
    module.load_state_dict(tensors)


def check_tensors(module: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Raise ModelError with a list if ``tensors`` are not exactly those of ``module``, which may be on meta."""
    own = module.state_dict()
    faults = [f"missing {name}" for name in own if name not in tensors]
    faults += [f"unexpected {shown(name, quote=False)}" for name in tensors if name not in own]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    faults += [
        f"{name} holds {str(tensors[name].dtype).removeprefix('torch.')}, not floating-point numbers"
        for name in own
        if name in tensors and not tensors[name].is_floating_point()
    ]
    if faults:
        listed = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise ModelError(f"{source} does not fit a {type(module).__name__}: {listed}")


def count_layers(names: Iterable[str], prefix: str) -> int:
    """Return the number of layers, from 0 without a gap, among tensor names ``{prefix}{number}.…``."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]{1,9})\.")
    numbers = {int(match[1]) for name in names if (match := pattern.match(name))}
    return next(i for i in itertools.count() if i not in numbers)


def shown(value: object, *, quote: bool = True) -> str:
    """Format a value from a file for a message: one short line, control characters escaped."""
    if isinstance(value, int) and abs(value) > 10**40:  # Python may refuse to print it
        return "a number of more than 40 digits"
    text = value if isinstance(value, str) and value.isprintable() and not quote else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, formatted by :func:`shown`."""
    return shown(next(iter(str(error).splitlines()), type(error).__name__), quote=False)
