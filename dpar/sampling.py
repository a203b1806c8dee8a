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

Of many images, ``batch`` are in flight, each at a token of its own; when one is done the next takes its slot. The patch
transformer can wait until a share of them, ``gather``, begin a patch: its weights are then read less often, at the
price of steps over tokens that not all images take part in. That pays where most weights are its own
(``docs/performance.md`` has the figures), and :func:`usual_gather` decides by that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpar.cache import KVCache, Places, pad_rows, padded
from dpar.errors import ModelError
from dpar.llamagen import LlamaGen
from dpar.model import DPAR
from dpar.patching import OnlinePatcher, token_entropy
from dpar.rope import PatchPositions
from dpar.stepping import stepping, take_step

GuidanceSchedule = Literal["constant", "linear", "power-cosine"]
Observe = Callable[[NDArray[np.int64], NDArray[np.int64], Tensor], None]  # images (R,), positions (R,), what was seen

GATHER = 0.6  # where waiting pays
ROUNDS = 3  # of images a slot, from which on it does: while the last images finish, nobody takes their place


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
    batch: int | None = None,
    gather: float | None = None,
    advance: Callable[[int], None] = lambda images: None,
    observe: Observe | None = None,
    observe_log_prob: Observe | None = None,
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
        batch: how many images are in flight; None for all. No image depends on it.
        gather: the share of the images in flight that must begin a patch before the patch transformer runs, unless all
            of them wait. 0 never waits: then all images march in step. None: :func:`usual_gather`. No image depends
            on it.
        advance: called with the number of images that have been finished since the last call.
        observe: called with images (R,), their positions (R,) and logits (R, V) after guidance, for each token once.
        observe_log_prob: called with images (R,), their positions (R,) and ln p (R,) float32, for each token once: of
            the token that was taken, under the model itself, without guidance, temperature, top-k or top-p. Their sum
            over an image is what teacher forcing the sampled codes and starts gives.

    Returns:
        codes (B, N) int64 and starts (B, N) bool; for LlamaGen every token is its own patch.

    Raises:
        ModelError: settings or models that do not fit each other.
    """
    choice = Choice(temperature=temperature, top_k=top_k, top_p=top_p)
    guidance = Guidance(scale=cfg_scale, schedule=cfg_schedule, power=cfg_power)
    _check(model, entropy_model, labels, threshold, static_length)
    config, count, device = model.config, labels.shape[0], model.output.weight.device
    n = config.n_tokens
    if indices is not None and len(indices) != count:
        raise ModelError(f"there are {len(indices)} indices for {count} labels; one an image is needed")
    if batch is not None and batch < 1:
        raise ModelError(f"batch is {batch}; it must be at least 1")
    if gather is not None and not 0 <= gather <= 1:
        raise ModelError(f"gather is {gather}; it must be from 0 to 1, a share of the images in flight")
    known, keep = _on_device(known, keep, count, n, config.codebook_size, device)
    labels = labels.to(device)
    size = min(batch or count, count)
    halves = 2 if cfg_scale != 1.0 else 1
    dtype = _compute_dtype(device, model.output.weight.dtype)
    stepper: Stepper = (
        PatchStepper(model, size, halves, dtype)
        if isinstance(model, DPAR)
        else TokenStepper(model, size, halves, dtype)
    )
    watcher = None
    if isinstance(model, DPAR) and entropy_model is not None and static_length is None:
        watcher = TokenStepper(entropy_model, size, 1, dtype)
    patcher = OnlinePatcher(
        size,
        n,
        threshold=math.inf if threshold is None else threshold,
        max_length=max_length if isinstance(model, DPAR) else 1,
        grid_width=config.grid_width,
        row_reset=row_reset,
        static_length=static_length if isinstance(model, DPAR) else None,
    )
    noise = torch.from_numpy(uniforms(seed, range(count) if indices is None else indices, n)).to(device)
    scales = torch.tensor([guidance.at(i, n) for i in range(n)], device=device)
    codes = torch.zeros(count, n, dtype=torch.long, device=device)
    starts = np.zeros((count, n), bool)

    flight = Flight(count, size)
    rounds = count / size
    share = usual_gather(model, None if watcher is None else watcher.model, rounds) if gather is None else gather
    fresh = moved = np.arange(size)  # slots with a new image, and with a new token
    with stepping(model) if watcher is None else stepping(model, watcher.model):
        while flight.live().size:
            if fresh.size:
                stepper.restart(fresh, labels[_on(flight.image[fresh], device)])
                if watcher is not None:
                    watcher.restart(fresh, labels.new_full((len(fresh),), watcher.model.config.classes))
            if moved.size:
                image, position = flight.at(moved)
                entropy = None if watcher is None else watcher.entropy(moved, position)
                begun = patcher.step(position, entropy, moved)
                starts[image, position] = begun
                flight.begins[moved] = begun
            waiting = flight.gathered(share)
            if waiting.size:
                stepper.begin_patches(waiting, flight.position[waiting])
                flight.begins[waiting] = False

            go = flight.ready()
            image, position = flight.at(go)
            at = _on(image, device), _on(position, device)
            own = logits = stepper.logits(go, position).float()
            if halves == 2:
                own, unconditional = logits[0::2], logits[1::2]
                logits = unconditional + scales[at[1]].unsqueeze(1) * (own - unconditional)
            if observe is not None:
                observe(image, position, logits)
            drawn = draw(logits, noise[at], choice)
            if known is not None and keep is not None:
                drawn = torch.where(keep[at], known[at], drawn)
            codes[at] = drawn
            if observe_log_prob is not None:
                log_prob = own.log_softmax(dim=-1).gather(1, drawn.unsqueeze(1)).squeeze(1)
                observe_log_prob(image, position, log_prob)

            goes_on = position + 1 < n
            on = go[goes_on]
            if on.size:
                taken = drawn[_on(goes_on, device)]
                stepper.accept(on, position[goes_on], taken)
                if watcher is not None:
                    watcher.accept(on, position[goes_on], taken)
            fresh = flight.move(on, go[~goes_on])
            if len(on) < len(go):
                advance(len(go) - len(on))
            moved = np.sort(np.concatenate([on, fresh]))
    return codes, torch.from_numpy(starts).to(device)


def usual_gather(model: DPAR | LlamaGen, entropy_model: LlamaGen | None, rounds: float) -> float:
    """The share of images that the patch transformer waits for, where none is given, as found best on CPUs.

    ``entropy_model`` is the one that runs with the model, if any; ``rounds`` are images a slot.
    """
    if isinstance(model, LlamaGen) or rounds < ROUNDS:
        return 0.0
    patches = _weights(model.layers)
    each_token = _weights(*model.encoder_layers(), *model.decoder_layers(), model.output)
    if entropy_model is not None:
        each_token += _weights(entropy_model.layers, entropy_model.output)
    return GATHER if patches > 2 * each_token else 0.0


def _weights(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


class Flight:
    """The images in flight: which one each slot holds, and where it stands."""

    def __init__(self, count: int, slots: int) -> None:
        """``count`` images, the first of them in slots."""
        self.count, self.next = count, slots
        self.image = np.arange(slots)  # in each slot; -1 when none is left
        self.position = np.zeros(slots, np.int64)  # of the token that comes next
        self.begins = np.zeros(slots, bool)  # whether it begins a patch that the patch transformer has not run for

    def at(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Images and positions of slots."""
        return self.image[slots], self.position[slots]

    def live(self) -> NDArray[np.int64]:
        """Slots that hold an image."""
        return np.flatnonzero(self.image >= 0)

    def ready(self) -> NDArray[np.int64]:
        """Slots whose next token can be drawn."""
        return np.flatnonzero((self.image >= 0) & ~self.begins)

    def gathered(self, share: float) -> NDArray[np.int64]:
        """Slots that begin a patch, once there are enough of them: a ``share`` of the live ones, or all."""
        waiting, live = np.flatnonzero(self.begins), len(self.live())
        return waiting if len(waiting) >= share * live or len(waiting) == live else waiting[:0]

    def move(self, on: NDArray[np.int64], done: NDArray[np.int64]) -> NDArray[np.int64]:
        """Moves slots ``on`` by a token, and gives the slots that are ``done`` their next images, if any are left.

        Returns:
            The slots that have got one.
        """
        self.position[on] += 1
        following = np.arange(self.next, self.next + len(done))
        self.next += len(done)
        self.image[done], self.position[done] = np.where(following < self.count, following, -1), 0
        return done[following < self.count]


def _on(indices: NDArray[np.int64] | NDArray[np.bool_], device: torch.device) -> Tensor:
    return torch.from_numpy(indices).to(device)


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
    """A model that is fed one token a step, for images in slots; with guidance, each has two rows.

    ``slots`` are (R,), ascending, ``positions`` (R,): of the tokens that the step is about.
    """

    def restart(self, slots: NDArray[np.int64], labels: Tensor) -> None:
        """Puts new images into ``slots``, with labels (R,)."""

    def begin_patches(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """Does what the first token of a patch needs, ahead of its logits."""

    def logits(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """For these tokens: (R, V), or (2·R, V), of each image the conditional row and then the unconditional one."""

    def accept(self, slots: NDArray[np.int64], positions: NDArray[np.int64], codes: Tensor) -> None:
        """Takes the tokens (R,) that were chosen."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of images in slots: one each, or with guidance two neighbours."""

    halves: int
    total: int
    device: torch.device

    def places(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> Places:
        """Of the rows of images that stand at ``positions``."""
        return Places.of(self.of(slots), positions.repeat(self.halves), self.total, self.device)

    def of(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of images (R,): (halves · R,)."""
        return np.add.outer(slots * self.halves, np.arange(self.halves)).ravel()

    def conditions(self, labels: Tensor, without: int) -> Tensor:
        """The label of each row from those of images, (R,): the unconditional half has label ``without``."""
        if self.halves == 1:
            return labels
        return torch.stack([labels, torch.full_like(labels, without)], dim=1).flatten()


class TokenStepper:
    """LlamaGen, one token a step; the entropy model runs through it too."""

    def __init__(self, model: LlamaGen, slots: int, halves: int, dtype: torch.dtype) -> None:
        self.model = model
        weight = model.output.weight
        self.rows = Rows(halves=halves, total=slots * halves, device=weight.device)
        self.cache = model.start_cache(self.rows.total, dtype)
        self.offset = 0 if model.config.start_token else 1  # from a token's place to that of what stands before it
        self.input = weight.new_zeros(self.rows.total, model.config.width)  # what stands before the next token

    def restart(self, slots: NDArray[np.int64], labels: Tensor) -> None:
        """See :class:`Stepper`."""
        if self.model.cls_embedding is not None:
            rows = _on(self.rows.of(slots), self.rows.device)
            self.input[rows] = self.model.cls_embedding(self.rows.conditions(labels, self.model.config.classes))

    def begin_patches(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """A token is its own patch."""

    def entropy(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """Entropies of these tokens, (R,) float32 nats; +inf for a token that the model does not predict."""
        predicted = positions >= self.offset
        if predicted.all():
            return token_entropy(self.logits(slots, positions))
        entropy = self.input.new_full((len(slots),), math.inf, dtype=torch.float32)
        if predicted.any():
            entropy[_on(predicted, entropy.device)] = token_entropy(self.logits(slots[predicted], positions[predicted]))
        return entropy

    def logits(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """See :class:`Stepper`."""
        places = self.rows.places(slots, positions - self.offset)
        return self.model.step(pad_rows(self.input[places.rows]), places, self.cache)[: len(places.rows)]

    def accept(self, slots: NDArray[np.int64], positions: NDArray[np.int64], codes: Tensor) -> None:
        """See :class:`Stepper`."""
        rows = _on(self.rows.of(slots), self.rows.device)
        self.input[rows] = self.model.tok_embeddings(codes).repeat_interleave(self.rows.halves, dim=0)


class PatchStepper:
    """DPAR, one token a step; its patch transformer runs only for the images that begin a patch.

    Encoder and tokens have a row an image, patch transformer and decoder with guidance two.
    """

    def __init__(self, model: DPAR, slots: int, halves: int, dtype: torch.dtype) -> None:
        c, weight = model.config, model.output.weight
        self.model, self.device = model, weight.device
        self.images = Rows(halves=1, total=slots, device=weight.device)
        self.rows = Rows(halves=halves, total=slots * halves, device=weight.device)
        rows, n, d = self.rows.total, c.n_tokens, c.width
        self.condition = weight.new_zeros(rows, d)
        self.stream = weight.new_zeros(rows, d)  # the decoder's next input

        def caches(layers: int, size: int) -> list[KVCache]:
            return [KVCache(size, n, c.heads, c.head_dim, weight.device, dtype) for _ in range(layers)]

        self.encoder_cache = caches(c.encoder_layers, slots)
        self.patch_cache = caches(c.patch_layers, rows)
        self.decoder_cache = caches(c.decoder_layers, rows)
        self.tokens = [weight.new_zeros(slots, n, d) for _ in range(c.encoder_layers)]
        self.received = weight.new_zeros(rows, c.decoder_layers, d)  # from their patches
        self.positions = PatchPositions(n, c.grid_width, c.head_dim, c.rope, weight.device)
        self.first = np.zeros(slots, np.int64)  # token of the open patch
        self.patches = np.zeros(slots, np.int64)  # begun so far

    def restart(self, slots: NDArray[np.int64], labels: Tensor) -> None:
        """See :class:`Stepper`."""
        rows = _on(self.rows.of(slots), self.device)
        self.condition[rows] = self.model.cls_embedding(self.rows.conditions(labels, self.model.config.classes))
        self.stream[rows] = self.model.stream_start(self.condition[rows])
        self.patches[slots] = 0

    def logits(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """See :class:`Stepper`."""
        places = self.rows.places(slots, positions)
        x = pad_rows(self.stream[places.rows])
        table = pad_rows(self.model.stream_table[places.positions])
        received = self.received[places.rows]  # (R, layers, d)
        for i, (layer, cache) in enumerate(zip(self.model.decoder_layers(), self.decoder_cache, strict=True)):
            x = take_step(layer.block, x + pad_rows(received[:, i]), table, places, cache)
        logits: Tensor = self.model.output(self.model.norm(x))[: len(places.rows)]
        return logits

    def accept(self, slots: NDArray[np.int64], positions: NDArray[np.int64], codes: Tensor) -> None:
        """See :class:`Stepper`."""
        places = self.images.places(slots, positions)
        x = pad_rows(self.model.tok_embeddings(codes))
        table = pad_rows(self.model.token_table[places.positions])
        for layer, tokens, cache in zip(self.model.encoder_layers(), self.tokens, self.encoder_cache, strict=True):
            x = take_step(layer.block, x, table, places, cache)
            tokens[places.rows, places.positions] = x[: len(slots)].to(tokens.dtype)
        stream = x[: len(slots)].repeat_interleave(self.rows.halves, dim=0)
        self.stream[_on(self.rows.of(slots), self.device)] = stream.to(self.stream.dtype)

    def begin_patches(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """Closes the open patch of these images, and runs the patch transformer on it for the next one."""
        halves = self.rows.halves
        places = self.rows.places(slots, self.patches[slots])
        x = self.condition[places.rows]
        table = self.model.stream_table[:1].new_zeros(len(x), *self.model.stream_table.shape[1:])
        later = positions > 0
        if later.any():
            first, end = self.first[slots[later]], positions[later]
            at = _on(np.flatnonzero(later.repeat(halves)), self.device)
            closed = self._closed_patches(slots[later], first, end)
            x[at] = closed.repeat_interleave(halves, dim=0).to(x.dtype)
            turned = self.positions.of(_on(first, self.device), _on(end - 1, self.device))
            table[at] = turned.repeat_interleave(halves, dim=0)
        x, table = pad_rows(x), pad_rows(table)
        for layer, cache in zip(self.model.patch_layers(), self.patch_cache, strict=True):
            x = take_step(layer, x, table, places, cache)
        projected = torch.stack([layer.project(x) for layer in self.model.decoder_layers()], dim=1)
        self.received[places.rows] = projected[: len(places.rows)].to(self.received.dtype)
        self.first[slots] = positions
        self.patches[slots] += 1

    def _closed_patches(self, slots: NDArray[np.int64], first: NDArray[np.int64], end: NDArray[np.int64]) -> Tensor:
        """The patches of tokens ``first`` to ``end - 1`` of these images: (R, d)."""
        lengths = end - first
        patch = np.arange(len(slots)).repeat(lengths)
        offset = np.arange(len(patch)) - (lengths.cumsum() - lengths)[patch]
        at = _on(slots[patch], self.device), _on(first[patch] + offset, self.device)
        # rows of padding as in pad_rows: a patch more, if need be, that holds the tokens of padding
        missing = padded(len(patch)) - len(patch)
        count = padded(len(slots) + (missing > 0))
        patch_of_token = _on(np.pad(patch, (0, missing), constant_values=count - 1), self.device)
        offset_in_patch = _on(np.pad(offset, (0, missing)), self.device)
        patches = None
        for layer, tokens in zip(self.model.encoder_layers(), self.tokens, strict=True):
            patches = layer.cross_attention(patches, pad_rows(tokens[at]), patch_of_token, offset_in_patch, count)
        assert patches is not None  # there is at least one layer
        return patches[: len(slots)]


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
    if isinstance(model, LlamaGen) and not model.config.start_token:
        raise ModelError("a LlamaGen without a start token is an entropy model; it cannot sample the first token")
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
