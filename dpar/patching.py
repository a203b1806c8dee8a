"""The patch rule: which tokens of an image start a patch (paper section 3.2.1, appendix 6.1).

    rule = PatchRule(threshold=7.8)                                  # the paper's at 256 px
    starts = rule.starts(entropy_model.entropy(codes), grid_width=16)    # (B, N), bool

or, as plain functions,

    entropy = entropy_model.entropy(codes)                               # (B, N) float16, nats
    starts = patch_starts(entropy, 7.8, max_length=4, grid_width=16)    # (B, N), bool

Symbols of the paper: ``entropy`` is h, ``threshold`` is τ, ``max_length`` is P, ``grid_width`` is W_g. The three
switches of the paper's Table 3 are independent: ``threshold=math.inf`` turns entropy gating off,
``max_length=None`` the length limit, ``row_reset=False`` the row boundaries.

NumPy arrays in, NumPy arrays out; tensors in, tensors out. torch is imported only for tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np

from dpar.errors import ModelError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Strategy = Literal["entropy", "static"]


@overload
def patch_starts(
    entropy: NDArray[np.floating[Any]],
    threshold: float,
    max_length: int | None,
    grid_width: int,
    row_reset: bool = True,
) -> NDArray[np.bool_]: ...
@overload
def patch_starts(
    entropy: torch.Tensor,
    threshold: float,
    max_length: int | None,
    grid_width: int,
    row_reset: bool = True,
) -> torch.Tensor: ...
def patch_starts(
    entropy: NDArray[np.floating[Any]] | torch.Tensor,
    threshold: float,
    max_length: int | None,
    grid_width: int,
    row_reset: bool = True,
) -> NDArray[np.bool_] | torch.Tensor:
    """Return where patches start: above the threshold, after ``max_length`` tokens, and at each new row.

    Tokens 0 and 1 always start a patch, as in the authors' code and in BLT. Entropies are compared in float32, so
    float16 values as stored in an artifact and their float32 copies give the same boundaries.

    Args:
        entropy: (..., N) floats, nats; leading dimensions are images.
        threshold: a token with entropy > threshold starts a patch; ``math.inf`` switches the gate off.
        max_length: most tokens in a patch; None for no limit.
        grid_width: tokens in a row of the grid.
        row_reset: whether each row starts a patch.

    Returns:
        (..., N) bool; an array or a tensor (on the same device), like ``entropy``.

    Raises:
        ModelError: ``max_length`` or ``grid_width`` below 1, a threshold that is not a number, or no tokens.
    """
    check_rule(threshold, max_length, grid_width)
    if entropy.ndim == 0 or entropy.shape[-1] == 0:
        raise ModelError(f"entropy has no tokens: its shape is {tuple(entropy.shape)}")
    if isinstance(entropy, np.ndarray):
        return _starts_numpy(entropy, threshold, max_length, grid_width, row_reset)
    return _starts_torch(entropy, threshold, max_length, grid_width, row_reset)


def check_rule(threshold: float, max_length: int | None, grid_width: int) -> None:
    """Raise ModelError, naming the value, if the rule's settings are invalid."""
    if math.isnan(threshold):
        raise ModelError("threshold is not a number")
    if max_length is not None and max_length < 1:
        raise ModelError(f"max_length is {max_length}; a patch holds at least 1 token")
    if grid_width < 1:
        raise ModelError(f"grid_width is {grid_width}; a row holds at least 1 token")


# Between two forced starts (entropy, row), the length limit starts a patch every max_length tokens: a token starts
# one if its distance to the last forced start is a multiple of max_length. So no loop over images or tokens is needed.

ALWAYS = 2  # leading tokens that start a patch whatever their entropy
BLOCK = 2**16  # tokens per block, so that intermediate arrays stay in the CPU cache


def _starts_numpy(
    entropy: NDArray[np.floating[Any]],
    threshold: float,
    max_length: int | None,
    grid_width: int,
    row_reset: bool,
) -> NDArray[np.bool_]:
    n = entropy.shape[-1]
    flat = entropy.reshape(-1, n)
    starts = np.empty(flat.shape, np.bool_)
    rows = max(1, BLOCK // n)
    # the narrowest integers that hold a position: less memory traffic
    integer: type[np.signedinteger[Any]] = np.int16 if n < 2**15 else np.int64
    position = np.arange(n, dtype=integer)
    for first in range(0, len(flat), rows):
        block = flat[first : first + rows].astype(np.float32, copy=False)
        forced = np.greater(block, np.float32(threshold), out=starts[first : first + rows])
        forced[:, :ALWAYS] = True
        if row_reset:
            forced[:, ::grid_width] = True
        if max_length is not None:
            limit = integer(min(max_length, n))
            distance = position - np.maximum.accumulate(forced * position, axis=-1)
            np.equal(distance // limit * limit, distance, out=forced)  # NumPy's % is many times slower
    return starts.reshape(entropy.shape)


def _starts_torch(
    entropy: torch.Tensor, threshold: float, max_length: int | None, grid_width: int, row_reset: bool
) -> torch.Tensor:
    import torch

    forced = entropy.float() > np.float32(threshold).item()
    forced[..., :ALWAYS] = True
    if row_reset:
        forced[..., ::grid_width] = True
    if max_length is None:
        return forced
    position = torch.arange(entropy.shape[-1], device=entropy.device)
    last_forced = torch.where(forced, position, 0).cummax(dim=-1).values
    return (position - last_forced) % max_length == 0


def static_starts(n_tokens: int, length: float) -> NDArray[np.bool_]:
    """Return the starts of the paper's baseline: patches of one, possibly fractional, length, without row reset.

    Returns:
        (n_tokens,) bool; token i starts a patch where floor(i / length) differs from floor((i - 1) / length).

    Raises:
        ModelError: ``length`` below 1 or not finite, or no tokens.
    """
    if not (math.isfinite(length) and length >= 1):
        raise ModelError(f"length is {length}; a static patch holds at least 1 token")
    if n_tokens < 1:
        raise ModelError(f"n_tokens is {n_tokens}; an image has at least 1 token")
    index = np.floor(np.arange(-1, n_tokens) / length)
    return index[1:] != index[:-1]


def stored_entropy(entropy: torch.Tensor) -> torch.Tensor:
    """Return entropies as an artifact stores them: float16, with +inf for token 0.

    Boundaries are decided on these values both in data preparation and in sampling, so that they agree.
    """
    import torch

    stored = entropy.to(torch.float16)
    stored[..., 0] = math.inf
    return stored


def token_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each next-token distribution, in nats (the paper's equation 3).

    Args:
        logits: (..., V) floats.

    Returns:
        (...) float32, between 0 and ln V.
    """
    import torch

    log_probs = torch.log_softmax(logits.float(), dim=-1)
    return torch.special.entr(log_probs.exp()).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class PatchRule:
    """Which tokens of an image start a patch, as artifacts and runs record it.

    ``entropy`` is the published rule, :func:`patch_starts`; ``static`` the paper's baseline, :func:`static_starts`,
    which has only a ``static_length``.
    """

    strategy: Strategy = "entropy"
    threshold: float | None = None  # τ, nats; inf: no entropy gating; None: not known yet
    max_length: int | None = 4  # P, tokens; None: no limit
    row_reset: bool = True
    static_length: float | None = None  # tokens; may be fractional

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ModelError(f"strategy is {self.strategy!r}; it must be one of {', '.join(get_args(Strategy))}")
        if self.strategy == "static":
            if self.static_length is None:
                raise ModelError("a static rule needs static_length")
            static_starts(1, self.static_length)  # refuses an invalid length
            if (self.threshold, self.max_length, self.row_reset) != (None, None, False):
                raise ModelError("a static rule has no threshold, max_length or row_reset")
        elif self.static_length is not None:
            raise ModelError("static_length belongs to a static rule")
        else:
            check_rule(0.0 if self.threshold is None else self.threshold, self.max_length, grid_width=1)

    @classmethod
    def static(cls, length: float) -> PatchRule:
        """Return the static rule with patches of ``length`` tokens."""
        return cls(strategy="static", max_length=None, row_reset=False, static_length=length)

    @property
    def needs_entropy(self) -> bool:
        """Whether the starts depend on entropies."""
        return self.strategy == "entropy" and self.threshold != math.inf

    @overload
    def starts(self, entropy: NDArray[np.floating[Any]], grid_width: int) -> NDArray[np.bool_]: ...
    @overload
    def starts(self, entropy: torch.Tensor, grid_width: int) -> torch.Tensor: ...
    def starts(
        self, entropy: NDArray[np.floating[Any]] | torch.Tensor, grid_width: int
    ) -> NDArray[np.bool_] | torch.Tensor:
        """Return the patch starts (..., N) bool of entropies (..., N), of which a static rule reads only the shape.

        Raises:
            ModelError: the threshold is not known, or there are no tokens.
        """
        if self.static_length is None:
            return patch_starts(entropy, self._known_threshold(), self.max_length, grid_width, self.row_reset)
        starts = np.broadcast_to(static_starts(entropy.shape[-1], self.static_length), entropy.shape).copy()
        if isinstance(entropy, np.ndarray):
            return starts
        import torch

        return torch.from_numpy(starts).to(entropy.device)

    def online(self, batch: int, n_tokens: int, grid_width: int) -> OnlinePatcher:
        """Return the rule in token-by-token form, for a batch of images that are being sampled."""
        if self.static_length is None:
            self._known_threshold()
        return OnlinePatcher(self, batch, n_tokens, grid_width)

    def _known_threshold(self) -> float:
        if self.threshold is None:
            raise ModelError("the rule has no threshold; give one, in nats")
        return self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable values for manifests and run records."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PatchRule:
        """Return the rule stored in a manifest's settings or a run record; unknown keys are ignored."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


class OnlinePatcher:
    """A patch rule applied one token at a time, to a batch of images that are being sampled.

    patcher = PatchRule(threshold=7.8).online(batch, n_tokens=256, grid_width=16)
    for i in range(256): starts = patcher.step(i, entropy_i)         # (B,) bool, NumPy
    """

    def __init__(self, rule: PatchRule, batch: int, n_tokens: int, grid_width: int) -> None:
        check_rule(0.0, None, grid_width)
        self.threshold = np.float32(math.inf if rule.threshold is None else rule.threshold).item()
        self.max_length = n_tokens if rule.max_length is None else rule.max_length
        self.grid_width = grid_width
        self.row_reset = rule.row_reset
        self.static = None if rule.static_length is None else static_starts(n_tokens, rule.static_length)
        self.run = np.zeros(batch, np.int64)  # length of the open patch

    def step(self, position: int, entropy: torch.Tensor | None) -> NDArray[np.bool_]:
        """Return whether token ``position`` starts a patch in each image.

        Args:
            position: 0, 1, 2, … in order.
            entropy: (B,) nats for this token, any float type; it is rounded to float16 as stored entropies are.
                None if the rule needs none.

        Returns:
            (B,) bool.
        """
        if self.static is not None:
            starts = np.full(len(self.run), self.static[position])
        elif position < ALWAYS or (self.row_reset and position % self.grid_width == 0):
            starts = np.ones(len(self.run), np.bool_)
        else:
            starts = self.run >= self.max_length
            if entropy is not None:
                starts |= entropy.half().cpu().numpy().astype(np.float32) > self.threshold
        self.run = np.where(starts, 1, self.run + 1)
        return starts
