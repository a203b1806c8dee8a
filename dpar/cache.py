"""The keys and values that sampling keeps: one cache an attention layer, allocated once.

cache = KVCache(rows=16, capacity=256, heads=12, head_dim=64, device=device, dtype=torch.float32)
out = block(x, table, cache.at(position))                # x (rows, 1, width): one new token a row
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpar.attention import Attend


class KVCache:
    """Keys and values of one attention layer while sampling, allocated once.

    Every row (an image, or an image's guidance half) has its own length, so rows can be at different places.
    """

    def __init__(
        self, rows: int, capacity: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        # a row's past is one stretch of memory, so that choosing rows copies whole stretches
        self.k = torch.zeros(rows, capacity, heads, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)

    def at(self, position: int) -> Attend:
        """Attention of one new token a row, (rows, 1, heads, head_dim), all rows standing at ``position``."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[:, position], self.v[:, position] = k[:, 0].to(self.k.dtype), v[:, 0].to(self.v.dtype)
            return _one_query(q, self.k[:, : position + 1], self.v[:, : position + 1])

        return attend

    def at_rows(self, rows: Tensor, positions: Tensor) -> Attend:
        """The same for some rows, (R,) int64, each at a position of its own, (R,) int64: (R, 1, heads, head_dim)."""
        longest = int(positions.max()) + 1
        visible = torch.arange(longest, device=rows.device) <= positions.unsqueeze(1)  # (R, longest)
        mask = None if bool(visible.all()) else visible[:, None, None]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[rows, positions], self.v[rows, positions] = k[:, 0].to(self.k.dtype), v[:, 0].to(self.v.dtype)
            keys, values = (past[:, :longest].index_select(0, rows) for past in (self.k, self.v))
            return _one_query(q, keys, values, mask)

        return attend


def _one_query(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of (R, 1, heads, head_dim) over (R, T, heads, head_dim)."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys.to(q.dtype).transpose(1, 2), values.to(q.dtype).transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)
