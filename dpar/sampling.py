"""Sampling with KV caches, in raster order, patch boundaries decided on the way (paper section 4.1).

    codes, starts = sample(model, entropy_model, labels, cfg_scale=2.0, threshold=7.8)
    codes, _ = sample(llamagen, None, labels, cfg_scale=2.0)

Boundaries follow the rule of :mod:`dpar.patching` on the entropy model's running distribution. With guidance, the
conditional and the unconditional half share tokens and boundaries, so the entropy model and the patch encoder run
once for both. Feeding the sampled codes and starts through the model's forward gives the logits that were seen here.

Randomness: one uniform number for each (image index, token), from a counter-based generator keyed by the seed, turned
into a token by the inverse CDF. An image depends on (seed, index), not on what else is in the batch: on CPU in float32
to the last bit (:mod:`dpar.cache` says how). On a GPU, or between two machines, logits can differ in their last bits,
and then a token does where its uniform number lies within about 1e-6 of an edge of the cumulative distribution.

All images stand at the same token; the patch transformer runs for those of them that begin a patch there.
Having images wait for each other at patch boundaries gives it fuller steps, but was no faster (CPU, batches of 8):
images differ too much in how many patches they have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpar.cache import KVCache, Places, pad_rows, padded
from dpar.errors import ModelError
from dpar.llamagen import LlamaGen
from dpar.model import DPAR
from dpar.patching import OnlinePatcher, token_entropy

GuidanceSchedule = Literal["constant", "linear", "power-cosine"]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance: logits = u + s(i)·(c - u) for token i of N, from conditional c and unconditional u.

    ``constant`` (the paper's): s(i) = scale. ``linear``: s(i) = 1 + (scale - 1)·i/N. ``power-cosine`` (RAR's):
    s(i) = 1 + (scale - 1)·(1 - cos(π·(i/N)^power))/2. A scale of 1 is no guidance.
    """

    scale: float = 1.0
    schedule: GuidanceSchedule = "constant"
    power: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ModelError(f"cfg_scale is {self.scale}; it must be above 0 (1 is no guidance)")
        if self.schedule not in get_args(GuidanceSchedule):
            raise ModelError(
                f"cfg_schedule is {self.schedule!r}; it must be one of {', '.join(get_args(GuidanceSchedule))}"
            )
        if not (math.isfinite(self.power) and self.power >= 0):
            raise ModelError(f"cfg_power is {self.power}; it must be at least 0")

    def at(self, position: int, n_tokens: int) -> float:
        """s of token ``position`` of ``n_tokens``."""
        if self.schedule == "constant":
            return self.scale
        done = position / n_tokens
        share = done if self.schedule == "linear" else (1 - math.cos(math.pi * done**self.power)) / 2
        return 1 + (self.scale - 1) * share


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a token is drawn from its logits."""

    temperature: float = 1.0  # 0 takes the likeliest
    top_k: int = 0  # 0: all
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ModelError(f"temperature is {self.temperature}; it must be at least 0")
        if self.top_k < 0:
            raise ModelError(f"top_k is {self.top_k}; it must be at least 0 (0 keeps all tokens)")
        if not 0 < self.top_p <= 1:
            raise ModelError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


@torch.no_grad()
def sample(
    model: DPAR | LlamaGen,
    entropy_model: LlamaGen | None,
    labels: Tensor,
    *,
    cfg_scale: float = 1.0,
    cfg_schedule: GuidanceSchedule = "constant",
    cfg_power: float = 1.0,
    threshold: float | None = None,
    max_length: int | None = 4,
    row_reset: bool = True,
    static_length: float | None = None,
    known: Tensor | None = None,
    keep: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
    observe_log_prob: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples one image for each label.

    Args:
        model: in evaluation mode, on the device to sample on.
        entropy_model: decides boundaries for DPAR; None for LlamaGen, for the static scheme, and with an
            infinite threshold.
        labels: (B,) int64.
        cfg_scale: s of classifier-free guidance, logits = u + s·(c - u); 1 is none and costs no second half.
        cfg_schedule: how s goes from token to token; :class:`Guidance` has the formulas.
        cfg_power: of the power-cosine schedule.
        threshold: τ, nats; needed with an entropy model.
        max_length: P; None for no limit.
        row_reset: whether each row starts a patch.
        static_length: the fixed patch length of the static scheme, in place of the rule.
        known: (B, N) int64, codes of which some are kept, as editing needs it; goes with ``keep``.
        keep: (B, N) bool, True where the token is that of ``known``. The others are sampled, in raster order: each sees
            the tokens before it, kept or sampled, and none after it. Boundaries follow from the actual tokens.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keeps the k likeliest tokens; 0 keeps all.
        top_p: keeps the likeliest tokens that together reach this probability.
        seed: of all randomness.
        indices: each image's number in the run; 0, 1, … if None.
        observe: called with (position, logits (B, V) after guidance) at each token.
        observe_log_prob: called with (position, ln p (B,) float32) at each token: of the token that was taken, under
            the model itself, without guidance, temperature, top-k or top-p. Their sum over an image is what teacher
            forcing the sampled codes and starts gives.

    Returns:
        codes (B, N) int64 and starts (B, N) bool; for LlamaGen every token is its own patch.

    Raises:
        ModelError: settings or models that do not fit each other.
    """
    choice = Choice(temperature=temperature, top_k=top_k, top_p=top_p)
    guidance = Guidance(scale=cfg_scale, schedule=cfg_schedule, power=cfg_power)
    _check(model, entropy_model, labels, threshold, static_length)
    config, batch, device = model.config, labels.shape[0], model.output.weight.device
    n = config.n_tokens
    if indices is not None and len(indices) != batch:
        raise ModelError(f"there are {len(indices)} indices for {batch} labels; one an image is needed")
    known, keep = _on_device(known, keep, batch, n, config.codebook_size, device)
    labels = labels.to(device)
    guided = cfg_scale != 1.0
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, config.classes)])
    dtype = _compute_dtype(device, model.output.weight.dtype)
    stepper: Stepper = (
        PatchStepper(model, labels, batch, dtype) if isinstance(model, DPAR) else TokenStepper(model, labels, dtype)
    )
    watcher = (
        TokenStepper(entropy_model, torch.full_like(labels[:batch], entropy_model.config.classes), dtype)
        if isinstance(model, DPAR) and entropy_model is not None and static_length is None
        else None
    )
    patcher = OnlinePatcher(
        batch,
        n,
        threshold=math.inf if threshold is None else threshold,
        max_length=max_length if isinstance(model, DPAR) else 1,
        grid_width=config.grid_width,
        row_reset=row_reset,
        static_length=static_length if isinstance(model, DPAR) else None,
        device=device,
    )
    noise = torch.from_numpy(uniforms(seed, range(batch) if indices is None else indices, n)).to(device)
    codes = torch.zeros(batch, n, dtype=torch.long, device=device)
    starts = torch.zeros(batch, n, dtype=torch.bool, device=device)
    for i in range(n):
        entropy = None if watcher is None else token_entropy(watcher.logits(i))
        starts[:, i] = patcher.step(i, entropy)
        own = logits = stepper.logits(i, starts[:, i]).float()
        if guided:
            own, unconditional = logits.split(batch)
            logits = unconditional + guidance.at(i, n) * (own - unconditional)
        if observe is not None:
            observe(i, logits)
        codes[:, i] = draw(logits, noise[:, i], choice)
        if known is not None and keep is not None:
            codes[:, i] = torch.where(keep[:, i], known[:, i], codes[:, i])
        if observe_log_prob is not None:
            observe_log_prob(i, own.log_softmax(dim=-1).gather(1, codes[:, i : i + 1]).squeeze(1))
        if i + 1 < n:
            stepper.accept(i, codes[:, i])
            if watcher is not None:
                watcher.accept(i, codes[:, i])
    return codes, starts


def uniforms(seed: int, indices: Sequence[int], n_tokens: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """One number in [0, 1) for each image and token: (B, n_tokens) float64, a function of (seed, index, position)."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, index])).random(n_tokens) for index in indices]
    return np.stack(rows)


def draw(logits: Tensor, uniform: Tensor, choice: Choice) -> Tensor:
    """Tokens (B,) int64 from logits (B, V) and one number in [0, 1) each, (B,) float64, by the inverse CDF."""
    if choice.temperature == 0:
        return logits.argmax(dim=-1)
    probs = keep_likeliest((logits.double() / choice.temperature).softmax(dim=-1), choice.top_k, choice.top_p)
    cdf = probs.cumsum(dim=-1)
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return token.clamp(max=logits.shape[-1] - 1)


def keep_likeliest(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities (B, V) with all but the ``top_k`` likeliest, and all past ``top_p``, set to 0; not normalised."""
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
    first = equal & (equal.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True))  # of equals, the first stay
    return probs.masked_fill(~(above | first), 0)


def _descending(values: Tensor) -> Tensor:
    """Each row of (B, V) sorted. On CPU by NumPy: PyTorch sorts indices along, which takes ten times as long there."""
    if values.device.type != "cpu":
        return values.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)


class Stepper(Protocol):
    """A model that is fed one token a step."""

    def logits(self, position: int, starts: Tensor) -> Tensor:
        """(rows, V) for token ``position``; ``starts`` (B,) says which images begin a patch with it."""

    def accept(self, position: int, codes: Tensor) -> None:
        """Takes the tokens (B,) that were chosen for ``position``."""


class TokenStepper:
    """LlamaGen, one token a step; the entropy model runs through it too."""

    def __init__(self, model: LlamaGen, labels: Tensor, dtype: torch.dtype) -> None:
        self.model, self.rows = model, labels.shape[0]
        self.cache = model.start_cache(self.rows, dtype)
        self.input = model.cls_embedding(labels)  # (rows, d), what stands before the next token

    def logits(self, position: int, starts: Tensor | None = None) -> Tensor:
        """See :class:`Stepper`."""
        return self.model.step(pad_rows(self.input), position, self.cache)[: self.rows]

    def accept(self, position: int, codes: Tensor) -> None:
        """See :class:`Stepper`."""
        self.input = self.model.tok_embeddings(codes).repeat(self.rows // codes.shape[0], 1)


class PatchStepper:
    """DPAR, one token a step; its patch transformer runs only for the images that begin a patch.

    ``labels`` has B rows, or 2·B with guidance: the conditional half, then the unconditional one. Encoder and
    tokens have B rows, patch transformer and decoder as many as labels.
    """

    def __init__(self, model: DPAR, labels: Tensor, batch: int, dtype: torch.dtype) -> None:
        c, device, rows = model.config, labels.device, labels.shape[0]
        self.model, self.batch, self.rows, self.halves = model, batch, rows, rows // batch
        n, d = c.n_tokens, c.width
        self.condition = model.cls_embedding(labels)  # (rows, d)
        self.stream = self.condition  # the decoder's next input

        def caches(layers: int, size: int) -> list[KVCache]:
            return [KVCache(size, n, c.heads, c.head_dim, device, dtype) for _ in range(layers)]

        self.encoder_cache = caches(c.encoder_layers, batch)
        self.patch_cache = caches(c.patch_layers, rows)
        self.decoder_cache = caches(c.decoder_layers, rows)
        self.tokens = [torch.zeros(batch, n, d, device=device) for _ in range(c.encoder_layers)]
        self.received = torch.zeros(c.decoder_layers, rows, d, device=device)
        self.first = torch.zeros(batch, dtype=torch.long, device=device)  # of the open patch
        self.patches = torch.zeros(batch, dtype=torch.long, device=device)  # begun so far

    def logits(self, position: int, starts: Tensor) -> Tensor:
        """See :class:`Stepper`."""
        images = starts.nonzero().squeeze(1)
        if len(images):
            self._begin_patches(position, images)
        x = pad_rows(self.stream).unsqueeze(1)
        table = self.model.stream_table[position : position + 1]
        for layer, received, cache in zip(self.model.decoder_layers(), self.received, self.decoder_cache, strict=True):
            x = layer(x, pad_rows(received).unsqueeze(1), table, cache.at(position))
        logits: Tensor = self.model.output(self.model.norm(x[:, 0]))[: self.rows]
        return logits

    def accept(self, position: int, codes: Tensor) -> None:
        """See :class:`Stepper`."""
        x = pad_rows(self.model.tok_embeddings(codes)).unsqueeze(1)
        table = self.model.token_table[position : position + 1]
        for layer, tokens, cache in zip(self.model.encoder_layers(), self.tokens, self.encoder_cache, strict=True):
            x = layer.block(x, table, cache.at(position))
            tokens[:, position] = x[: self.batch, 0]
        self.stream = x[: self.batch, 0].repeat(self.halves, 1)

    def _begin_patches(self, position: int, images: Tensor) -> None:
        """Closes the open patch of these images, (R,), and runs the patch transformer on it for the next one."""
        rows = torch.cat([images + half * self.batch for half in range(self.halves)])
        if position == 0:
            x = self.condition
            table = torch.zeros_like(self.model.stream_table[:1])
        else:
            first = self.first[images]
            x = self._closed_patches(images, first, position).repeat(self.halves, 1)
            last = torch.full_like(first, position - 1)
            table = pad_rows(self.model.patch_positions(first, last).repeat(self.halves, 1, 1)).unsqueeze(1)
        x = pad_rows(x).unsqueeze(1)
        places = Places.of(rows, self.patches[images].repeat(self.halves), self.rows)
        for layer, cache in zip(self.model.layers, self.patch_cache, strict=True):
            x = layer(x, table, cache.at_rows(places))
        for index, layer in enumerate(self.model.decoder_layers()):
            self.received[index, rows] = layer.project(x[:, 0])[: len(rows)].to(self.received.dtype)
        self.first[images] = position
        self.patches[images] += 1

    def _closed_patches(self, images: Tensor, first: Tensor, end: int) -> Tensor:
        """The patches of tokens ``first`` to ``end - 1`` of these images: (R, d)."""
        lengths = end - first
        patch_of_token = torch.repeat_interleave(torch.arange(len(images), device=images.device), lengths)
        begins = lengths.cumsum(0) - lengths
        offset = torch.arange(len(patch_of_token), device=images.device) - begins[patch_of_token]
        at = (images[patch_of_token], first[patch_of_token] + offset)
        # rows of padding as in pad_rows: a patch more, if need be, that holds the tokens of padding
        missing = padded(len(offset)) - len(offset)
        count = padded(len(images) + (missing > 0))
        patch_of_token, offset = F.pad(patch_of_token, (0, missing), value=count - 1), F.pad(offset, (0, missing))
        patches = None
        for layer, tokens in zip(self.model.encoder_layers(), self.tokens, strict=True):
            patches = layer.cross_attention(patches, pad_rows(tokens[at]), patch_of_token, offset, count)
        assert patches is not None  # there is at least one layer
        return patches[: len(images)]


def _compute_dtype(device: torch.device, weights: torch.dtype) -> torch.dtype:
    """What keys and values come in: autocast's dtype inside autocast, that of the weights elsewhere."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weights


def _check(
    model: DPAR | LlamaGen,
    entropy_model: LlamaGen | None,
    labels: Tensor,
    threshold: float | None,
    static_length: float | None,
) -> None:
    config = model.config
    if labels.ndim != 1 or len(labels) == 0:
        raise ModelError(f"labels are {tuple(labels.shape)}; (B,) with at least one is needed")
    if int(labels.min()) < 0 or int(labels.max()) > config.classes:
        raise ModelError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}; this model has classes "
            f"0 to {config.classes - 1}, and {config.classes} for none"
        )
    if isinstance(model, LlamaGen) or static_length is not None:
        return
    if entropy_model is None:
        if threshold is not None and math.isfinite(threshold):
            raise ModelError("an entropy model is needed: boundaries depend on entropies below an infinite threshold")
        return
    if threshold is None:
        raise ModelError("threshold is needed with an entropy model; use the one that made the training patches")
    check_same_tokens(model, entropy_model)


def _on_device(
    known: Tensor | None, keep: Tensor | None, batch: int, n_tokens: int, codebook_size: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """``known`` and ``keep`` as they are needed, if they are given and fit."""
    if known is None and keep is None:
        return None, None
    if known is None or keep is None:
        raise ModelError("known and keep go together: the codes, and which of them are kept")
    for name, tensor in (("known", known), ("keep", keep)):
        if tensor.shape != (batch, n_tokens):
            raise ModelError(f"{name} is {tuple(tensor.shape)}; ({batch}, {n_tokens}) is needed: images, tokens")
    if keep.dtype != torch.bool:
        raise ModelError(f"keep is {keep.dtype}; bool is needed")
    held = known[keep]
    if len(held) and not 0 <= int(held.min()) <= int(held.max()) < codebook_size:
        raise ModelError(
            f"known codes reach from {int(held.min())} to {int(held.max())}; this model has 0 to {codebook_size - 1}"
        )
    return known.to(device), keep.to(device)


def check_same_tokens(model: DPAR | LlamaGen, entropy_model: LlamaGen) -> None:
    """Raises ModelError where an entropy model reads another grid or codebook than the model."""
    ours, theirs = model.config, entropy_model.config
    for name in ("codebook_size", "grid_height", "grid_width"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ModelError(
                f"the entropy model's {name} is {getattr(theirs, name)}, the model's {getattr(ours, name)}; "
                "both must come from the same codes"
            )
