"""KV caches for sampling on a GPU: read in a few fixed lengths, masked by positions that are on the device.

    cache = StaticCache(rows=16, capacity=256, heads=12, head_dim=64, device=device, dtype=torch.bfloat16)
    keys = cache.length(40)                                 # 64: the number of keys to read for tokens up to 40
    places = cache.together_at(position, keys)              # position (1,) int64, on the device
    out = block(x, table, cache.attend(places))             # x (16, 1, width): a new token of each row

Shapes and addresses do not depend on positions, so a step can be captured as a CUDA graph for each length
(:mod:`dpar.graphs`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpar.attention import Attend
from dpar.kv_cache import round_up

ALIGNED = 16  # caches have a multiple of this many keys; masks of other lengths are copied in every call
LENGTHS = 4  # number of lengths to read, about equally spaced: a step reads 5/8 of the cache on average


@dataclass(frozen=True)
class StaticPlaces:
    """Where new keys and values of some rows go, and what each row sees. Shared by all layers of a step."""

    at: Tensor  # (R,) int64, into the caches' rows and positions as one dimension
    rows: Tensor | None  # (R,) int64 rows of the cache; None: all, in order
    mask: Tensor  # (1 or rows of the cache, 1, 1, keys to read), 0 or -inf, added to scores


class StaticCache:
    """Keys and values of one attention layer: (rows, keys, heads, head_dim) each, allocated once.

    Entries of an earlier batch are masked, so the cache is never cleared.
    """

    def __init__(
        self, rows: int, capacity: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.rows, self.keys = rows, round_up(capacity, ALIGNED)
        self.k, self.v = torch.zeros(2, rows, self.keys, heads, head_dim, device=device, dtype=dtype).unbind()

    def length(self, position: int) -> int:
        """Return how many keys to read if no row is past ``position``: the next of :data:`LENGTHS` lengths."""
        return min(round_up(position + 1, round_up(-(-self.keys // LENGTHS), ALIGNED)), self.keys)

    def together_at(self, position: Tensor, keys: int) -> StaticPlaces:
        """Return the places of all rows, at one ``position`` (1,) int64, reading the first ``keys`` keys."""
        begins = torch.arange(0, self.rows * self.keys, self.keys, device=position.device)
        return StaticPlaces(begins + position, None, self._mask(position.view(1, 1, 1, 1), keys))

    def at_own(self, rows: Tensor, positions: Tensor, keys: int) -> StaticPlaces:
        """Return the places of some rows (R,), each at its own position (R,); rows of padding may repeat."""
        last = positions.new_zeros(self.rows).index_copy(0, rows, positions)  # the output of other rows is not used
        return StaticPlaces(rows * self.keys + positions, rows, self._mask(last.view(-1, 1, 1, 1), keys))

    def _mask(self, last: Tensor, keys: int) -> Tensor:
        later = torch.arange(keys, device=last.device) > last
        return torch.zeros(later.shape, dtype=self.k.dtype, device=last.device).masked_fill(later, -math.inf)

    def attend(self, places: StaticPlaces) -> Attend:
        """Return the attention of one new token per row at ``places``, over (R, 1, heads, head_dim) tensors."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cached, new in ((self.k, k), (self.v, v)):
                cached.flatten(0, 1).index_copy_(0, places.at, new.squeeze(1).to(cached.dtype))
            query = q
            if places.rows is not None:  # attend with all rows: selecting rows of the cache first would copy it
                query = q.new_zeros(self.rows, *q.shape[1:]).index_copy_(0, places.rows, q)
            keys, values = (cached[:, : places.mask.shape[-1]] for cached in (self.k, self.v))
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=places.mask
            ).transpose(1, 2)
            return out if places.rows is None else out[places.rows]

        return attend
