"""From logits to a token: classifier-free guidance and drawing (paper section 4.1).

    options = SamplingOptions(cfg_scale=2.0, top_p=0.95, seed=1)
    logits = unconditional + options.guidance_at(i, n_tokens) * (conditional - unconditional)
    codes = draw(logits, uniforms(options.seed, [0, 1], n_tokens)[:, i], options)

Randomness is one uniform number for each (image index, token), from a counter-based generator keyed by the seed, turned
into a token by the inverse of the cumulative distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dpar.errors import ModelError

GuidanceSchedule = Literal["constant", "linear", "power-cosine"]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How images are drawn from a model; the defaults are plain sampling from its distribution.

    Guidance: logits = u + s(i)·(c - u) for token i of N, from conditional c and unconditional u. ``constant`` (the
    paper's): s(i) = cfg_scale. ``linear``: s(i) = 1 + (cfg_scale - 1)·i/N. ``power-cosine`` (RAR's):
    s(i) = 1 + (cfg_scale - 1)·(1 - cos(π·(i/N)^cfg_power))/2.
    """

    cfg_scale: float = 1.0  # 1: no guidance, and no unconditional half
    cfg_schedule: GuidanceSchedule = "constant"
    cfg_power: float = 1.0  # of power-cosine
    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability
    seed: int = 0  # of all randomness

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale > 0):
            raise ModelError(f"cfg_scale is {self.cfg_scale}; it must be above 0 (1 is no guidance)")
        if self.cfg_schedule not in get_args(GuidanceSchedule):
            raise ModelError(
                f"cfg_schedule is {self.cfg_schedule!r}; it must be one of {', '.join(get_args(GuidanceSchedule))}"
            )
        if not (math.isfinite(self.cfg_power) and self.cfg_power >= 0):
            raise ModelError(f"cfg_power is {self.cfg_power}; it must be at least 0")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ModelError(f"temperature is {self.temperature}; it must be at least 0")
        if self.top_k < 0:
            raise ModelError(f"top_k is {self.top_k}; it must be at least 0 (0 keeps all tokens)")
        if not 0 < self.top_p <= 1:
            raise ModelError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    @property
    def guided(self) -> bool:
        """Whether sampling needs the unconditional half."""
        return self.cfg_scale != 1.0

    def guidance_at(self, position: int, n_tokens: int) -> float:
        """Return the guidance scale s of token ``position`` of ``n_tokens``."""
        if self.cfg_schedule == "constant":
            return self.cfg_scale
        done = position / n_tokens
        share = done if self.cfg_schedule == "linear" else (1 - math.cos(math.pi * done**self.cfg_power)) / 2
        return 1 + (self.cfg_scale - 1) * share


def uniforms(seed: int, indices: Sequence[int], n_tokens: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return a number in [0, 1) per image and token, a function of (seed, index, position): (B, n_tokens) float64."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, index])).random(n_tokens) for index in indices]
    return np.stack(rows)


def draw(logits: Tensor, uniform: Tensor, options: SamplingOptions) -> Tensor:
    """Draw tokens (B,) int64 from logits (B, V) by the inverse CDF, with one number in [0, 1) each, (B,) float64."""
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    probs = (logits.double() / options.temperature).softmax(dim=-1)
    cdf = keep_likeliest(probs, options.top_k, options.top_p).cumsum(dim=-1)
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return token.clamp(max=logits.shape[-1] - 1)


def keep_likeliest(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero all but the ``top_k`` likeliest of (B, V) probabilities, and all past ``top_p``; not renormalised."""
    if (top_k <= 0 or top_k >= probs.shape[-1]) and top_p >= 1:
        return probs
    ordered = _descending(probs)
    if 0 < top_k < probs.shape[-1]:
        ordered = ordered[:, :top_k]
    count = torch.full_like(ordered[:, :1], ordered.shape[-1], dtype=torch.long)
    if top_p < 1:  # a token stays if those before it have not reached top_p
        reached = ordered.cumsum(dim=-1)
        count = 1 + (reached[:, :-1] / reached[:, -1:] < top_p).sum(dim=-1, keepdim=True)
    least = ordered.gather(-1, count - 1)
    above, equal = probs > least, probs == least
    first = equal & (equal.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True))  # ties: the first ones stay
    return probs.masked_fill(~(above | first), 0)


def _descending(values: Tensor) -> Tensor:
    """Sort each row of (B, V). On CPU with NumPy: PyTorch also returns indices, which takes ten times as long there."""
    if values.device.type != "cpu":
        return values.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
