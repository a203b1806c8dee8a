"""The keys and values that sampling keeps: one cache an attention layer, allocated once.

    cache = KVCache(rows=16, capacity=256, heads=12, head_dim=64, device=device, dtype=torch.float32)
    out = block(pad_rows(x), table, cache.at(position))[:16]     # x (16, 1, width): one new token a row
    out = block(pad_rows(x), table, cache.at_rows(places))[:7]   # x (7, 1, width): of some rows

On CPU a row's float32 numbers do not depend, to the last bit, on what else is in the batch. Matrix products choose
their order of summation by the number of rows, so :func:`pad_rows` gives them multiples of 4 only, and 8 at least;
those of attention by the number of keys and by where they lie in memory, so caches are read in multiples of 32. This is
how the same image comes out of batches of 1 and of 16: one flipped bit in a distribution of 16384 tokens can change a
token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpar.attention import Attend

ROWS = 4  # rows of matrix products come in multiples of this
LEAST_ROWS = 8  # and there are at least so many: MKL's oldest kernels sum 4 in another order
SLOTS = 32  # keys that are attended to come in multiples of this; the surplus is masked


def round_up(number: int, multiple: int) -> int:
    """The next multiple of ``multiple``, or ``number`` where it is one."""
    return -(-number // multiple) * multiple


def padded(rows: int) -> int:
    """How many rows :func:`pad_rows` makes of so many."""
    return max(LEAST_ROWS, round_up(rows, ROWS))


def pad_rows(x: Tensor) -> Tensor:
    """x (R, ...) with rows of zeros at the end, to a multiple of :data:`ROWS` and :data:`LEAST_ROWS` at least."""
    return _with_rows(x, padded(x.shape[0]))


@dataclass(frozen=True)
class Places:
    """Where the next keys and values of some rows go: the same in each layer, so made once a step."""

    rows: Tensor  # (R,) int64, ascending within a half
    positions: Tensor  # (R,) int64
    every: bool  # whether ``rows`` are 0, 1, … to the last
    slots: int  # how many are read, a multiple of SLOTS
    mask: Tensor  # (rows of the cache, 1, slots) float32, added to scores

    @classmethod
    def of(cls, rows: Tensor, positions: Tensor, total: int) -> Places:
        """Rows (R,) and their positions (R,), int64, of caches with ``total`` rows."""
        slots = round_up(int(positions.max()) + 1, SLOTS)
        last = positions.new_zeros(total).index_put((rows,), positions)
        mask = _hide_later(last[:, None, None], slots, rows.device)
        return cls(rows, positions, len(rows) == total, slots, mask)


class KVCache:
    """Keys and values of one attention layer while sampling, allocated once.

    Every row (an image, or an image's guidance half) has its own length, so rows can be at different places.
    """

    def __init__(
        self, rows: int, capacity: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        # a head's past is one stretch of memory, which the products of attention read without a copy
        self.k = torch.zeros(rows, heads, round_up(capacity, SLOTS), head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)

    def at(self, position: int) -> Attend:
        """Attention of one new token a row, all rows standing at ``position``.

        The callable takes (R, 1, heads, head_dim) tensors with rows of padding at the end, and gives the like.
        """
        rows, slots = self.k.shape[0], position + 1
        mask = None
        if self.k.device.type == "cpu":
            slots = round_up(slots, SLOTS)
            mask = _hide_later(position, slots, self.k.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[:, :, position], self.v[:, :, position] = k[:rows, 0].to(self.k.dtype), v[:rows, 0].to(self.v.dtype)
            return _with_rows(self._attended(q[:rows], slots, mask), len(q))

        return attend

    def at_rows(self, places: Places) -> Attend:
        """The same for some rows, each at a position of its own."""
        rows, count = places.rows, len(places.rows)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[rows, :, places.positions] = k[:count, 0].to(self.k.dtype)
            self.v[rows, :, places.positions] = v[:count, 0].to(self.v.dtype)
            if places.every:
                return _with_rows(self._attended(q[:count], places.slots, places.mask), len(q))
            # Attending with all rows reads their pasts once; choosing rows first would copy the chosen pasts.
            spread = q.new_zeros(self.k.shape[0], *q.shape[1:]).index_copy(0, rows, q[:count])
            return _with_rows(self._attended(spread, places.slots, places.mask)[rows], len(q))

        return attend

    def _attended(self, q: Tensor, slots: int, mask: Tensor | None) -> Tensor:
        """Queries (rows, 1, heads, head_dim), one a row, over the first ``slots`` keys: the like."""
        rows, _, heads, head_dim = q.shape
        if q.device.type != "cpu":
            keys, values = self.k[:, :, :slots].to(q.dtype), self.v[:, :, :slots].to(q.dtype)
            bias = None if mask is None else mask.unsqueeze(1).to(q.dtype)
            return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=bias).transpose(1, 2)
        # As batched products: the CPU's fused kernel rounds differently from thread to thread, and is no faster.
        keys, values = self.k.flatten(0, 1)[:, :slots], self.v.flatten(0, 1)[:, :slots]
        query = q.reshape(rows * heads, 1, head_dim).to(keys.dtype) * head_dim**-0.5
        scores = torch.bmm(query, keys.transpose(1, 2)).view(rows, heads, slots).float()
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(dim=-1).to(values.dtype).view(rows * heads, 1, slots)
        return torch.bmm(weights, values).view(rows, 1, heads, head_dim).to(q.dtype)


def _hide_later(last: Tensor | int, slots: int, device: torch.device) -> Tensor:
    """0 for slots up to ``last``, -inf for later ones: (..., slots) float32 of ``last`` (..., 1) or one for all."""
    later = torch.arange(slots, device=device) > last
    return torch.zeros(later.shape, device=device).masked_fill(later, float("-inf"))


def _with_rows(x: Tensor, rows: int) -> Tensor:
    """x (R, ...) with rows of zeros at the end, ``rows`` in all."""
    missing = rows - x.shape[0]
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x
