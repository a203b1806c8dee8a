"""Named model sizes (paper Table 1; LlamaGen's B, L, XL, XXL), and small ones for a laptop: `tiny` and `mini`.

config = preset("dpar-b", classes=1000, grid_height=24, grid_width=24)
entropy_model = preset("llamagen-xs", classes=0, start_token=False)      # s and xs: cheap entropy models

Embeddings and head of 16384 codes are half of llamagen-s (25 M parameters) and most of llamagen-xs (6 M).
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from dpar.errors import ModelError
from dpar.llamagen import LlamaGenConfig
from dpar.model import DPARConfig
from dpar.tokenizer import VQConfig

# name: (width, heads, LlamaGen's layers, DPAR's encoder, patch transformer and decoder layers); None: not a preset
SIZES: dict[str, tuple[int, int, int | None, tuple[int, int, int] | None]] = {
    "tiny": (192, 3, 6, (1, 3, 2)),
    "xs": (160, 2, 3, None),
    "mini": (256, 4, 9, (1, 5, 3)),
    "s": (384, 6, 7, None),
    "b": (768, 12, 12, (1, 8, 3)),
    "l": (1024, 16, 24, (1, 19, 4)),
    "xl": (1280, 20, 36, (1, 30, 5)),
    "xxl": (1536, 24, 48, (1, 41, 6)),
    "xxxl": (2560, 40, None, (1, 41, 6)),  # in the authors' code, not in the paper
}
# LlamaGen's tokenizers, and a small one of VQ-8's shape
TOKENIZERS: dict[str, VQConfig] = {
    "vq-16": VQConfig(),
    "vq-8": VQConfig(channel_multipliers=(1, 2, 2, 4)),
    "vq-8-tiny": VQConfig(
        codebook_size=1024, channels=32, channel_multipliers=(1, 1, 2, 2), residual_blocks=1, latent_channels=64
    ),
}
PRESETS = (
    *(f"dpar-{size}" for size, sizes in SIZES.items() if sizes[3] is not None),
    *(f"llamagen-{size}" for size, sizes in SIZES.items() if sizes[2] is not None),
)


def preset(name: str, **overrides: Any) -> DPARConfig | LlamaGenConfig:
    """Return the config of a preset such as ``dpar-b`` or ``llamagen-xl``, with ``overrides`` of its fields.

    Raises:
        ModelError: no such preset, with the nearest name; or a value that the config refuses.
    """
    _check_name(name, PRESETS)
    family, size = name.split("-")
    width, heads, layers, parts = SIZES[size]
    if family == "llamagen" or parts is None:
        return LlamaGenConfig(**{"width": width, "heads": heads, "layers": layers, **overrides})
    sizes = dict(zip(("encoder_layers", "patch_layers", "decoder_layers"), parts, strict=True))
    return DPARConfig(**{"width": width, "heads": heads, **sizes, **overrides})


def tokenizer_preset(name: str, **overrides: Any) -> VQConfig:
    """Return the config of a tokenizer preset such as ``vq-16``, with ``overrides`` of its fields.

    Raises:
        ModelError: no such preset, with the nearest name; or a value that the config refuses.
    """
    _check_name(name, tuple(TOKENIZERS))
    return dataclasses.replace(TOKENIZERS[name], **overrides)


def _check_name(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ModelError(f"no preset is called {name!r}.{hint} Available: {', '.join(known)}")
