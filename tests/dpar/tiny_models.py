"""Shared by the tests of models: tiny models of all kinds, and a batch for them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpar import DPAR, DPARConfig, LlamaGen, LlamaGenConfig, VQConfig, VQTokenizer

V, CLASSES = 23, 3
SIZES: dict[str, Any] = {
    "codebook_size": V,
    "grid_height": 4,
    "grid_width": 4,
    "classes": CLASSES,
    "width": 32,
    "heads": 2,
}


def dpar(**sizes: Any) -> DPAR:
    torch.manual_seed(0)
    return DPAR(DPARConfig(**{**SIZES, "patch_layers": 2, "decoder_layers": 2, **sizes}))


def llamagen(**sizes: Any) -> LlamaGen:
    torch.manual_seed(0)
    return LlamaGen(LlamaGenConfig(**{**SIZES, "layers": 2, **sizes}))


def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    config = VQConfig(
        codebook_size=16, codebook_dim=4, channels=32, channel_multipliers=(1, 2), residual_blocks=1, latent_channels=8
    )
    return VQTokenizer(config)


Model = DPAR | LlamaGen | VQTokenizer
MODELS: list[Callable[[], Model]] = [dpar, llamagen, tokenizer]
SEQUENCES: list[Callable[..., DPAR | LlamaGen]] = [dpar, llamagen]


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(V, (4, 16), generator=generator)
    starts = torch.rand(4, 16, generator=generator) < 0.4
    starts[:, ::4] = True  # patches of at most four tokens
    return codes, torch.tensor([0, 1, 2, CLASSES]), starts


def run(model: DPAR | LlamaGen, codes: Tensor, labels: Tensor | None, starts: Tensor) -> Tensor:
    logits: Tensor = model(codes, labels, starts) if isinstance(model, DPAR) else model(codes, labels)
    return logits
