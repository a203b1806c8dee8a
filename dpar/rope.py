"""Rotary positions: LlamaGen's 2D RoPE for tokens, Dynamic RoPE for patches (paper appendix 6.3).

A table holds, for each position, the cosine and sine of every pair's angle, stacked: (..., head_dim / 2, 2).
Rotation is of interleaved pairs (0, 1), (2, 3), …, as in LlamaGen.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpar.errors import ModelError

PatchRope = Literal["dynamic", "dynamic-compact", "2d"]
BASE = 10_000.0
LARGEST_TABLE = 2**24  # entries of a table of all tokens, 64 MiB: 512×512 tokens at 64 entries per head
# Which end of the patch each group of column pairs encodes.
COLUMN_GROUPS: dict[PatchRope, tuple[str, ...]] = {
    "dynamic": ("first", "last", "last", "first"),
    "dynamic-compact": ("first", "last"),
    "2d": ("first",),
}


def angles(positions: Tensor, n_pairs: int) -> Tensor:
    """Return pos · 10000^(-k / n_pairs) for k = 0 … n_pairs - 1: positions (...) to (..., n_pairs), float32."""
    k = torch.arange(n_pairs, dtype=torch.float32, device=positions.device)
    return positions.unsqueeze(-1).float() * BASE ** (-k / n_pairs)


def token_table(grid_height: int, grid_width: int, head_dim: int) -> Tensor:
    """Return cosines and sines of every grid position in raster order: (H_g · W_g, head_dim / 2, 2), float32.

    The first half of the pairs encodes the row, the second the column.

    Raises:
        ModelError: the table would not fit in memory. No tensor of a model depends on its grid, so nothing else
            limits it.
    """
    if grid_height * grid_width * head_dim > LARGEST_TABLE:
        raise ModelError(
            f"a grid of {grid_height}×{grid_width} tokens with {head_dim} entries per head is too large: "
            f"at most {LARGEST_TABLE:,} entries are supported"
        )
    row = torch.arange(grid_height).repeat_interleave(grid_width)
    column = torch.arange(grid_width).repeat(grid_height)
    return _cos_sin(torch.cat([angles(row, head_dim // 4), angles(column, head_dim // 4)], dim=-1))


def with_condition(table: Tensor) -> Tensor:
    """Return a table with one more position in front, for the class condition, whose rotation is the zero matrix.

    Its query and key become zero; LlamaGen's checkpoints were trained this way.
    """
    return torch.cat([torch.zeros_like(table[:1]), table])


def patch_table(first: Tensor, last: Tensor, grid_width: int, head_dim: int, kind: PatchRope) -> Tensor:
    """Return cosines and sines of patches that span tokens ``first`` to ``last``: (M, head_dim / 2, 2), float32.

    Half of the pairs encode the row of the first token, at the frequencies of 2D RoPE. The other half:

    ``dynamic``: four equal groups, for the first column, the last, the last, the first (the authors' code).
    ``dynamic-compact``: two equal groups, for the first column and the last.
    ``2d``: the first column, so that a patch has the position of its first token in LlamaGen.

    Args:
        first: (M,) token index within the image.
        last: (M,) likewise.
        grid_width: tokens in a row of the grid.
        head_dim: width of an attention head.
        kind: one of the above (the paper's Table 9: FID 3.31, 3.42, 3.32).
    """
    columns = {"first": first % grid_width, "last": last % grid_width}
    ends = COLUMN_GROUPS[kind]
    groups = [angles(columns[end], head_dim // 4 // len(ends)) for end in ends]
    return _cos_sin(torch.cat([angles(first // grid_width, head_dim // 4), *groups], dim=-1))


class PatchPositions:
    """:func:`patch_table` precomputed for a grid of ``n_tokens``: looking up a few patches is cheap."""

    def __init__(
        self, n_tokens: int, grid_width: int, head_dim: int, kind: PatchRope, device: torch.device | str
    ) -> None:
        token = torch.arange(n_tokens, device=device)
        zero = torch.zeros_like(token)
        self.by_first = patch_table(token, zero, grid_width, head_dim, kind)
        self.by_last = patch_table(zero, token, grid_width, head_dim, kind)
        ends = COLUMN_GROUPS[kind]
        of_last = [end == "last" for end in ends for _ in range(head_dim // 4 // len(ends))]
        self.of_last = torch.tensor([False] * (head_dim // 4) + of_last, device=device).unsqueeze(1)  # (pairs, 1)

    def of(self, first: Tensor, last: Tensor) -> Tensor:
        """Return the table of patches that span tokens ``first`` to ``last``, (M,) each: (M, head_dim / 2, 2)."""
        return torch.where(self.of_last, self.by_last[last], self.by_first[first])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x (..., T, heads, head_dim) by table (..., T, head_dim / 2, 2).

    Computed in float32, returned in the dtype of x.
    """
    if torch.compiler.is_compiling():  # the compiler fuses this, but not complex numbers
        (even, odd), (cosine, sine) = x.float().unflatten(-1, (-1, 2)).unbind(-1), table.unsqueeze(-3).unbind(-1)
        turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    else:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.view_as_complex(table).unsqueeze(-2)
        turned = torch.view_as_real(pairs)
    return turned.flatten(-2).to(x.dtype)


def _cos_sin(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], dim=-1)
