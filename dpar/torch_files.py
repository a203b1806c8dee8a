"""Read ``.pt`` and ``.safetensors`` files of unknown origin, without executing code stored in them.

    contents = load(Path("c2i_B_256.pt"))
    tensors, key = state_dict(contents, Path("c2i_B_256.pt"))    # name to tensor, and the key of the state dict

The error for any other file says what it is: empty, a Git LFS pointer, a web page, a broken download.
"""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpar.errors import ModelError
from dpar.tensors import read_tensors, shown

KEYS = ("model", "ema", "module", "state_dict")
NEEDED = (
    "a checkpoint of LlamaGen or of DPAR's authors (.pt or .safetensors), or a directory with config.json and "
    "model.safetensors, is needed"
)


def load(path: Path) -> Any:
    """Return the contents of a file: tensors, numbers, strings, and at most an ``argparse.Namespace``."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return read_tensors(path)
    what = _not_a_checkpoint(path, head)
    if what is not None:
        raise ModelError(f"{path} is {what}; {NEEDED}")
    zipped = head.startswith(b"PK")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below covers foreign files
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except Exception as error:  # torch raises many classes of exception for damaged and foreign files
        unsafe = sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))
        if unsafe:
            raise ModelError(
                f"{path} holds Python objects ({', '.join(unsafe)}), which could run code when they are read; "
                "only tensors (and argparse.Namespace) are accepted"
            ) from error
        what = "a zip file that PyTorch did not write" if zipped else "not a file that PyTorch wrote, or damaged"
        raise ModelError(f"{path} is {what}; {NEEDED}") from error


def _not_a_checkpoint(path: Path, head: bytes) -> str | None:
    """Return what a file is if its first bytes rule out a PyTorch checkpoint; None if they do not."""
    if not head:
        return "empty (0 bytes)"
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d+)", head)
        of = f" of a file of {int(size[1]):,} bytes" if size else ""
        return f"a Git LFS pointer{of}, not the file itself (`git lfs pull` fetches it)"
    if head.startswith(b"PK\x03\x04"):
        return _not_pytorchs_zip(path)
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "a web page, not the file to download"
    if not any(byte < 9 for byte in head):
        return "a text file"
    return None if head.startswith(b"\x80") else "not a file that PyTorch wrote"


def _not_pytorchs_zip(path: Path) -> str | None:
    """Return what a zip file is if PyTorch cannot have written it; None if it can."""
    size = path.stat().st_size
    try:
        if not zipfile.is_zipfile(path):
            return f"an incomplete download: a zip file of {size:,} bytes without its end"
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises many classes of exception for damaged files
        return f"a damaged zip file ({shown(str(error), quote=False)})"
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return (
            f"a zip file that PyTorch did not write: its {size:,} bytes unpack to {unpacked:,}, "
            "and PyTorch does not compress"
        )
    return None


def state_dict(contents: Any, path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the state dict of an unpickled file, and its key; None for a bare one."""

    def is_state(value: Any) -> bool:
        return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())

    if isinstance(contents, dict):
        key = next((key for key in KEYS if is_state(contents.get(key))), None)
        if key is not None or is_state(contents):
            tensors = _bare_names(contents if key is None else contents[key])
            odd = [name for name, tensor in tensors.items() if not _is_plain(tensor)]
            if odd:
                raise ModelError(f"{path}: {shown(odd[0], quote=False)} is sparse, quantised or empty; {NEEDED}")
            return tensors, key
        names = ", ".join(shown(str(name), quote=False) for name in list(contents)[:5]) or "nothing"
        raise ModelError(f"{path} has no state dict, bare or under {', '.join(KEYS)} (it has {names})")
    raise ModelError(f"{path} holds a {type(contents).__name__}; {NEEDED}")


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is one block of numbers in memory."""
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


def _bare_names(tensors: dict[Any, Tensor]) -> dict[str, Tensor]:
    """Return tensors by name, without the prefixes that DDP and torch.compile leave."""
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", str(name)): tensor for name, tensor in tensors.items()}
