"""Loading xformers with the CUDA runtime that its extension was linked to.

reason = xformers_hindrance()                            # None: its CUDA kernels are available

xformers' wheels are built for CUDA 12. PyTorch for CUDA 13 does not ship libcudart.so.12, so xformers imports but its
extension fails to load. The package nvidia-cuda-runtime-cu12 has that library.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import warnings
from pathlib import Path


@functools.cache
def xformers_hindrance() -> str | None:
    """Return why xformers' CUDA kernels cannot be used, None if they can; imports xformers."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    _load_cuda_runtime()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is returned instead
        from xformers import _cpp_lib
    if _cpp_lib._built_with_cuda:
        return None
    reason = _cpp_lib._cpp_library_load_exception
    return "xformers has no CUDA kernels here" + (f" ({str(reason).splitlines()[0]})" if reason else "")


def _load_cuda_runtime() -> None:
    """Make libcudart.so.12 known to the dynamic linker, if its package is installed."""
    if importlib.util.find_spec("nvidia") is None or (spec := importlib.util.find_spec("nvidia.cuda_runtime")) is None:
        return
    for folder in spec.submodule_search_locations or ():
        library = Path(folder) / "lib" / "libcudart.so.12"
        if library.is_file():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
