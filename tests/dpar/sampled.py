"""Shared by the tests of sampling: tiny models, `dpar.sample` by keywords, and logits to compare."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dpar import DPAR, DPARConfig, LlamaGen, LlamaGenConfig, PatchRule, SamplingOptions, sample

V, CLASSES, HEIGHT, WIDTH = 19, 3, 3, 5
N = HEIGHT * WIDTH
SIZES: dict[str, Any] = {
    "codebook_size": V,
    "grid_height": HEIGHT,
    "grid_width": WIDTH,
    "classes": CLASSES,
    "width": 32,
    "heads": 2,
}
LABELS = torch.tensor([0, 2, 1, CLASSES])


def dpar(seed: int = 0, **sizes: Any) -> DPAR:
    torch.manual_seed(seed)
    model = DPAR(DPARConfig(**{**SIZES, "patch_layers": 2, "decoder_layers": 2, **sizes})).eval()
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model


def llamagen(seed: int = 1, **sizes: Any) -> LlamaGen:
    torch.manual_seed(seed)
    model = LlamaGen(LlamaGenConfig(**{**SIZES, "layers": 2, **sizes})).eval()
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model


def unconditional(seed: int = 1, start_token: bool = False) -> LlamaGen:
    """Build an entropy model: without a start token, or a class-conditional LlamaGen used with its guidance class."""
    return llamagen(seed, classes=7 if start_token else 0, start_token=start_token)


def usual_entropy(entropy_model: LlamaGen) -> float:
    codes = torch.randint(V, (16, N), generator=torch.Generator().manual_seed(0))
    return float(entropy_model.entropy(codes)[:, 1:].float().median())


RULE_FIELDS = {"threshold", "max_length", "row_reset", "static_length"}
OPTION_FIELDS = {field.name for field in dataclasses.fields(SamplingOptions)}


def sample_with(
    model: DPAR | LlamaGen, entropy_model: LlamaGen | None, labels: Tensor, **how: Any
) -> tuple[Tensor, Tensor]:
    """Call :func:`dpar.sample` with the fields of rule and options as keywords."""
    rule_fields = {name: how.pop(name) for name in RULE_FIELDS & how.keys()}
    options = SamplingOptions(**{name: how.pop(name) for name in OPTION_FIELDS & how.keys()})
    rule = None
    if "static_length" in rule_fields:
        rule = PatchRule.static(rule_fields["static_length"])
    elif rule_fields:
        rule = PatchRule(**rule_fields)
    return sample(model, labels, entropy_model, rule, options, **how)


class Seen:
    """Records the logits of sampling at each token, (B, N, ...)."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Tensor] = {}

    def __call__(self, images: slice, position: int, values: Tensor) -> None:
        for image, value in zip(range(images.start, images.stop), values, strict=True):
            assert (image, position) not in self.found
            assert position == 0 or (image, position - 1) in self.found
            self.found[image, position] = value

    def logits(self) -> Tensor:
        images = max(image for image, _ in self.found) + 1
        return torch.stack([torch.stack([self.found[image, i] for i in range(N)]) for image in range(images)])


@torch.no_grad()
def forced(model: DPAR | LlamaGen, codes: Tensor, labels: Tensor, starts: Tensor, cfg_scale: float) -> Tensor:
    extra = (starts,) if isinstance(model, DPAR) else ()
    conditional = model(codes, labels, *extra)
    if cfg_scale == 1.0:
        return conditional
    unconditional = model(codes, None, *extra)
    return unconditional + cfg_scale * (conditional - unconditional)
