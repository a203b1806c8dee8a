"""The named sizes (paper Table 1; LlamaGen's B, L, XL, XXL), and what `tiny` means for a look on a laptop.

config = preset("dpar-b", classes=1000, grid_height=24, grid_width=24)
"""

from __future__ import annotations

import difflib
from typing import Any

from dpar.errors import ModelError
from dpar.llamagen import LlamaGenConfig
from dpar.model import DPARConfig

# name: (width, heads, LlamaGen's layers, DPAR's encoder, patch transformer and decoder layers)
SIZES: dict[str, tuple[int, int, int, tuple[int, int, int]]] = {
    "tiny": (192, 3, 6, (1, 3, 2)),
    "b": (768, 12, 12, (1, 8, 3)),
    "l": (1024, 16, 24, (1, 19, 4)),
    "xl": (1280, 20, 36, (1, 30, 5)),
    "xxl": (1536, 24, 48, (1, 41, 6)),
}
PRESETS = tuple(f"{family}-{size}" for family in ("dpar", "llamagen") for size in SIZES)


def preset(name: str, **overrides: Any) -> DPARConfig | LlamaGenConfig:
    """The config of a preset such as ``dpar-b`` or ``llamagen-xl``, with fields replaced as asked.

    Raises:
        ModelError: no such preset, with the nearest name; or a value that the config refuses.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ModelError(f"no preset is called {name!r}.{hint} There are: {', '.join(PRESETS)}")
    family, size = name.split("-")
    width, heads, layers, (encoder, patch, decoder) = SIZES[size]
    if family == "llamagen":
        return LlamaGenConfig(**{"width": width, "heads": heads, "layers": layers, **overrides})
    sizes = {"encoder_layers": encoder, "patch_layers": patch, "decoder_layers": decoder}
    return DPARConfig(**{"width": width, "heads": heads, **sizes, **overrides})
