"""Keys and values while sampling on a GPU: read in a few lengths, with masks made of positions on the device.

    cache = StaticCache(rows=16, capacity=256, heads=12, head_dim=64, device=device, dtype=torch.bfloat16)
    keys = cache.length(40)                                 # 64: to read for tokens up to 40
    places = cache.together_at(position, keys)              # position (1,) int64, on the device
    out = block(x, table, cache.attend(places))             # x (16, 1, width): a new token of each row

Shapes and addresses do not depend on positions, so a step can be captured as CUDA graphs (:mod:`dpar.graphs`), one
for each length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpar.attention import Attend
from dpar.kv_cache import round_up

ALIGNED = 16  # caches hold a multiple of this many keys; masks of other lengths are copied in every call
LENGTHS = 4  # in which a cache is read, about equally spaced: a step reads 5/8 of it on average


@dataclass(frozen=True)
class StaticPlaces:
    """Where new keys and values of some rows go, and what each row sees: shared by all layers, made once per step."""

    at: Tensor  # (R,) int64, into the caches' rows and positions as one dimension
    rows: Tensor | None  # (R,) int64 rows of the cache; None: all, in order
    mask: Tensor  # (1 or rows of the cache, 1, 1, keys to read), 0 or -inf, added to scores


class StaticCache:
    """Keys and values of one attention layer: (rows, keys, heads, head_dim) each, allocated once.

    What an earlier batch left is masked, so nothing is ever cleared.
    """

    def __init__(
        self, rows: int, capacity: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.rows, self.keys = rows, round_up(capacity, ALIGNED)
        self.k, self.v = torch.zeros(2, rows, self.keys, heads, head_dim, device=device, dtype=dtype).unbind()

    def length(self, position: int) -> int:
        """How many keys to read where no row is behind ``position``: the next of :data:`LENGTHS` lengths."""
        return min(round_up(position + 1, round_up(-(-self.keys // LENGTHS), ALIGNED)), self.keys)

    def together_at(self, position: Tensor, keys: int) -> StaticPlaces:
        """The places of all rows, at one position (1,) int64 below ``keys``, of which that many are read."""
        begins = torch.arange(0, self.rows * self.keys, self.keys, device=position.device)
        return StaticPlaces(begins + position, None, self._mask(position.view(1, 1, 1, 1), keys))

    def at_own(self, rows: Tensor, positions: Tensor, keys: int) -> StaticPlaces:
        """The places of some rows (R,), at positions of their own (R,); rows of padding may occur more than once."""
        last = positions.new_zeros(self.rows).index_copy(0, rows, positions)  # other rows see a key that is not read
        return StaticPlaces(rows * self.keys + positions, rows, self._mask(last.view(-1, 1, 1, 1), keys))

    def _mask(self, last: Tensor, keys: int) -> Tensor:
        later = torch.arange(keys, device=last.device) > last
        return torch.zeros(later.shape, dtype=self.k.dtype, device=last.device).masked_fill(later, -math.inf)

    def attend(self, places: StaticPlaces) -> Attend:
        """Attention of one new token in each of the rows at ``places``, over (R, 1, heads, head_dim) tensors."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for kept, new in ((self.k, k), (self.v, v)):
                kept.flatten(0, 1).index_copy_(0, places.at, new.squeeze(1).to(kept.dtype))
            query = q
            if places.rows is not None:  # attending with all rows reads pasts once; choosing rows first would copy them
                query = q.new_zeros(self.rows, *q.shape[1:]).index_copy_(0, places.rows, q)
            keys, values = (kept[:, : places.mask.shape[-1]] for kept in (self.k, self.v))
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=places.mask
            ).transpose(1, 2)
            return out if places.rows is None else out[places.rows]

        return attend
