"""KV caches for sampling on a CPU: one per attention layer, allocated once.

    cache = KVCache(rows=16, capacity=256, heads=12, head_dim=64, dtype=torch.float32)
    places = Places.of(rows, positions, total=16)
    out = block(pad_rows(x), table, cache.at(places))[:7]        # x (7, 1, width): a new token of each of 7 rows

A row's float32 result is bit-identical in any batch, so that batches of 1 and of 16 give the same image: one flipped
bit in a distribution of 16384 tokens can change a token. The order of summation in a matrix product depends on the
number of rows, so :func:`dpar.cpu_kernels.pad_rows` pads to sizes that are treated alike. In attention it depends on
the number of keys and their alignment in memory, so caches are read in multiples of 32 keys.
Other devices use :mod:`dpar.static_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpar.attention import Attend

SEEN, HIDDEN = np.float32(0), np.float32("-inf")  # of masks
KEYS = 32  # attention reads keys in multiples of this; the surplus is masked


def round_up(number: int, multiple: int) -> int:
    """Return ``number`` rounded up to a multiple of ``multiple``."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Span:
    """Consecutive rows of the cache that attend to the same number of keys."""

    begin: int  # among the rows of the step
    end: int
    row: int  # first row in the cache
    keys: int  # a multiple of KEYS


@dataclass(frozen=True)
class Places:
    """Where the next keys and values of some rows go. Computed once per step and shared by all layers."""

    rows: Tensor  # (R,) int64
    positions: Tensor  # (R,) int64
    together: int | None  # the common position, if all rows of the cache share one
    spans: tuple[Span, ...]  # one batched product each
    keys: int  # most keys that a row attends to, a multiple of KEYS
    mask: Tensor  # (R, 1, keys) float32, 0 or -inf, added to scores

    @classmethod
    def together_at(cls, position: int, total: int) -> Places:
        """Return the places of all rows of caches with ``total`` rows, at one position."""
        return cls.of(np.arange(total), np.full(total, position), total)

    @classmethod
    def of(cls, rows: NDArray[np.int64], positions: NDArray[np.int64], total: int) -> Places:
        """Return the places of rows (R,), ascending, at positions (R,), in caches with ``total`` rows."""
        farthest = int(positions.max())
        together = farthest if len(rows) == total and int(positions.min()) == farthest else None
        keys = round_up(farthest + 1, KEYS)
        mask = torch.from_numpy(np.where(np.arange(keys) > positions[:, None, None], HIDDEN, SEEN))
        at, last = torch.from_numpy(rows), torch.from_numpy(positions)
        return cls(at, last, together, _spans(rows, positions), keys, mask)


def _spans(rows: NDArray[np.int64], positions: NDArray[np.int64]) -> tuple[Span, ...]:
    keys = (positions // KEYS + 1) * KEYS
    if rows[-1] - rows[0] == len(rows) - 1 and (keys == keys[0]).all():  # the usual case, without the search below
        return (Span(0, len(rows), int(rows[0]), int(keys[0])),)
    cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(keys) != 0)) + 1
    begins, ends = [0, *cuts.tolist()], [*cuts.tolist(), len(rows)]
    return tuple(Span(b, e, int(rows[b]), int(keys[b])) for b, e in zip(begins, ends, strict=True))


class KVCache:
    """Keys and values of one attention layer while sampling, allocated once.

    Each row (an image, or its conditional or unconditional half) has its own length.
    """

    def __init__(self, rows: int, capacity: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        # each head's keys are contiguous, so that attention's products read them without a copy
        self.kv = torch.zeros(2, rows, heads, round_up(capacity, KEYS), head_dim, dtype=dtype)
        self.k, self.v = self.kv.unbind()

    def at(self, places: Places) -> Attend:
        """Return the attention of one new token per row at ``places``.

        The callable maps q, k, v (R, 1, heads, head_dim), with rows of padding at the end, to the same shape.
        """
        count = len(places.rows)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.put(torch.cat([k[:count], v[:count]], dim=1), places)
            scaled = q[:count, 0].to(self.k.dtype) * q.shape[-1] ** -0.5
            return with_rows(self.attended(scaled, places).unsqueeze(1).to(q.dtype), len(q))

        return attend

    def put(self, kv: Tensor, places: Places) -> None:
        """Store keys and values of rows at ``places``: (R, 2, heads, head_dim)."""
        if places.together is not None:
            self.kv[:, :, :, places.together] = kv.transpose(0, 1).to(self.kv.dtype)
        else:
            self.kv[:, places.rows, :, places.positions] = kv.to(self.kv.dtype)

    def attended(self, q: Tensor, places: Places) -> Tensor:
        """Attend with scaled queries (R, heads, head_dim) of rows at ``places``; return the same shape.

        Uses batched products: the CPU's fused kernel rounds differently from thread to thread and is not faster.
        """
        rows, heads, head_dim = q.shape
        query = q.reshape(rows * heads, 1, head_dim)
        keys, values = self.k.flatten(0, 1), self.v.flatten(0, 1)
        if len(places.spans) == 1:
            past = slice(places.spans[0].row * heads, (places.spans[0].row + rows) * heads), slice(places.keys)
            scores = torch.bmm(query, keys[past].transpose(1, 2))
            weights = (scores.view(rows, heads, -1).float() + places.mask).softmax(dim=-1).to(values.dtype)
            return torch.bmm(weights.view(rows * heads, 1, -1), values[past]).view(rows, heads, head_dim)
        scores, out = query.new_zeros(rows * heads, 1, places.keys), torch.empty_like(query)
        parts = []
        for span in places.spans:
            past = slice(span.row * heads, (span.row + span.end - span.begin) * heads), slice(span.keys)
            parts.append((slice(span.begin * heads, span.end * heads), past))
        for own, past in parts:
            torch.bmm(query[own], keys[past].transpose(1, 2), out=scores[own, :, past[1]])
        weights = (scores.view(rows, heads, -1).float() + places.mask).softmax(dim=-1).to(values.dtype)
        weights = weights.view(rows * heads, 1, -1)
        for own, past in parts:
            torch.bmm(weights[own, :, past[1]], values[past], out=out[own])
        return out.view(rows, heads, head_dim)


def with_rows(x: Tensor, rows: int) -> Tensor:
    """Append rows of zeros to x (R, ...), up to ``rows`` rows."""
    missing = rows - x.shape[0]
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x
