"""Cost of a model, counted by running it on meta tensors, and the paper's figures.

    cost = count(preset("dpar-b"), patch_length=1.81)
    cost.parameters, cost.linear / 1e9                       # GMACs per image, as the paper counts them

    linear_macs(preset("dpar-b"), patches=141.4)             # the same count for a measured mean of patches per image

The paper's GFLOPs are multiply-accumulates of the linear layers of one forward pass per image. They exclude attention
products, which are counted separately here, as full squares (no causal skipping).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from dpar.errors import ModelError
from dpar.llamagen import LlamaGen, LlamaGenConfig
from dpar.model import DPAR, DPARConfig
from dpar.packing import PatchLayout

TRAINING_FLOPS_PER_MAC = 6  # a multiplication and an addition; backward costs twice as much as forward
IMAGES = 100  # averaged over, so that mean patches per image are exact to 1/100

# The paper's figures: parameters in millions (Table 1), and GMACs by resolution (its Tables 8, 256 and 384 px).
PAPER_PARAMETERS = {
    "dpar-b": 120.0,
    "dpar-l": 352.0,
    "dpar-xl": 789.0,
    "dpar-xxl": 1400.0,
    "llamagen-b": 111.0,
    "llamagen-l": 343.0,
    "llamagen-xl": 775.0,
    "llamagen-xxl": 1400.0,
}
PAPER_GMACS = {
    ("llamagen-b", 256): 24.98,
    ("llamagen-l", 256): 83.26,
    ("llamagen-xl", 256): 192.69,
    ("llamagen-b", 384): 56.21,
    ("llamagen-l", 384): 187.35,
    ("llamagen-xl", 384): 433.57,
    ("dpar-b", 256): 19.21,
    ("dpar-l", 256): 56.74,
    ("dpar-xl", 256): 125.52,
    ("dpar-b", 384): 40.92,
    ("dpar-l", 384): 117.92,
    ("dpar-xl", 384): 258.53,
}
PAPER_PATCH_LENGTH = {256: 1.81, 384: 2.06}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one model. Multiply-accumulates (MACs) are per image, for one forward pass."""

    parameters: int
    patches: float  # mean patches per image; tokens for LlamaGen
    linear: float  # MACs of linear layers, the paper's count
    attention: float  # MACs of attention products
    shared: float  # part of ``linear`` that guidance runs once, not twice (the patch encoder)

    @property
    def training_flops(self) -> float:
        """FLOPs of forward and backward per image: 3 × 2 × MACs."""
        return TRAINING_FLOPS_PER_MAC * self.linear

    def sampling(self, entropy_model: Cost | None = None, guidance: bool = True) -> float:
        """Return MACs of linear layers to sample one image, including the entropy model's."""
        own = self.shared + (2 if guidance else 1) * (self.linear - self.shared)
        return own + (entropy_model.linear if entropy_model else 0.0)


def count(config: DPARConfig | LlamaGenConfig, patch_length: float = 1.0) -> Cost:
    """Count a model's parameters and multiply-accumulates.

    Args:
        config: of the model.
        patch_length: mean tokens per patch, N/M; ignored for LlamaGen.

    Raises:
        ModelError: the length is below 1 or above N.
    """
    n = config.n_tokens
    if not 1 <= patch_length <= n:
        raise ModelError(f"patch length is {patch_length}; it must be from 1 to {n}, the tokens of an image")
    fewer, share = divmod(round(IMAGES * n / patch_length), IMAGES)
    with torch.device("meta"):
        model = DPAR(config) if isinstance(config, DPARConfig) else LlamaGen(config)
    model.eval()
    # Cost is linear in the number of patches, so two neighbouring counts give every mean.
    parts = [(1 - share / IMAGES, _image_macs(model, fewer))]
    parts += [(share / IMAGES, _image_macs(model, fewer + 1))] if share else []
    linear, attention, encoder = (sum(weight * macs[i] for weight, macs in parts) for i in range(3))
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        patches=fewer + share / IMAGES if isinstance(model, DPAR) else float(n),
        linear=linear,
        attention=attention,
        shared=encoder,
    )


def _image_macs(model: DPAR | LlamaGen, patches: int) -> tuple[float, float, float]:
    """Return MACs of one image: of linear layers, of attention, of the patch encoder's linear layers."""
    n = model.config.n_tokens
    with torch.device("meta"):
        codes = torch.empty(1, n, dtype=torch.long)
        labels = torch.empty(1, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False, depth=4) as counter:
        if isinstance(model, DPAR):
            model.attention_backend = "sdpa"
            model(codes, labels, PatchLayout.from_starts(torch.arange(n).unsqueeze(0) < patches).to("meta"))
        else:
            model(codes, labels)
    by_module = counter.get_flop_counts()
    linear, attention = _macs(by_module["Global"])
    name = type(model).__name__
    encoder = sum(
        _macs(ops)[0] for key, ops in by_module.items() if key.startswith(f"{name}.encoder.") and key.count(".") == 2
    )
    return linear, attention, encoder


def linear_macs(config: DPARConfig | LlamaGenConfig, patches: float) -> float:
    """Return MACs of linear layers of one forward pass per image, for a mean of ``patches`` per image.

    The cost is linear in the number of patches, so the cost of the mean is the mean cost.

    Args:
        config: of the model.
        patches: mean per image, 1 to N; ignored for LlamaGen.
    """
    n = config.n_tokens
    tokens, one = count(config, 1.0).linear, count(config, float(n)).linear
    return tokens if n == 1 else one + (tokens - one) * (patches - 1) / (n - 1)


def _macs(flops_by_op: dict[object, int]) -> tuple[float, float]:
    """Return MACs of linear layers and of attention products, from FLOPs by operator."""
    linear = sum(flops for op, flops in flops_by_op.items() if str(op) in ("aten.mm", "aten.addmm"))
    return linear / 2, (sum(flops_by_op.values()) - linear) / 2
