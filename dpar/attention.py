"""Causal attention in its three settings: dense over tokens, packed over patches, and patches over their tokens.

Each is a callable (q, k, v) -> out over tensors (..., T, heads, head_dim), so that one block serves training and
sampling. Packed attention has interchangeable backends that give the same numbers:

    sdpa       PyTorch's scaled_dot_product_attention; runs everywhere, the choice on CPU and Apple
    xformers   memory_efficient_attention with a BlockDiagonalCausalMask; CUDA, float16 and bfloat16
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dpar.packing import PatchLayout, segment_softmax, segment_sum, spread

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Backend = Literal["auto", "sdpa", "xformers"]


def dense_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of whole sequences, (B, T, heads, head_dim) each, through SDPA's own fast paths."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2)


def choose_backend(backend: Backend, device: torch.device) -> Literal["sdpa", "xformers"]:
    """What ``auto`` stands for on this device: xformers on CUDA where it is installed, SDPA elsewhere."""
    if backend != "auto":
        return backend
    return "xformers" if device.type == "cuda" and importlib.util.find_spec("xformers") else "sdpa"


def packed_causal(layout: PatchLayout, backend: Backend = "auto") -> Attend:
    """Block-diagonal causal attention: each patch sees the earlier patches of its own image.

    The callable takes (ΣM, heads, head_dim) tensors whose images follow each other as ``layout.cu_seqlens`` says.
    """
    chosen = choose_backend(backend, layout.first.device)
    if chosen == "xformers":
        return _packed_xformers(layout)
    return _packed_sdpa(layout)


def _packed_sdpa(layout: PatchLayout) -> Attend:
    # Images are padded to the longest for the attention product alone; on the right, so causality hides the padding.
    cu = layout.cu_seqlens.long()
    batch = cu.shape[0] - 1
    place = torch.arange(layout.n_patches, device=cu.device) - cu[layout.image_of_patch]
    slot = layout.image_of_patch * layout.longest + place  # (ΣM,)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, head_dim = q.shape[-2:]

        def pad(x: Tensor) -> Tensor:
            rows = segment_sum(x.flatten(1), slot, batch * layout.longest)
            return rows.view(batch, layout.longest, heads, head_dim)

        return spread(dense_causal(pad(q), pad(k), pad(v)).reshape(-1, heads * head_dim), slot).view_as(q)

    return attend


def _packed_xformers(layout: PatchLayout) -> Attend:
    from xformers.ops import fmha  # imports with warnings where there is no GPU, so only here

    bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(layout.cu_seqlens.diff().tolist())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = fmha.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]
        return out

    return attend


def patch_cross_attention(q: Tensor, k: Tensor, v: Tensor, patch_of_token: Tensor, n_patches: int) -> Tensor:
    """Each patch attends to its own tokens, and each token is read once.

    Args:
        q: (M, heads, head_dim), one query a patch.
        k: (T, heads, head_dim), one key a token.
        v: (T, heads, head_dim).
        patch_of_token: (T,) int64.
        n_patches: M.

    Returns:
        (M, heads, head_dim), in the dtype of v.
    """
    scale = q.shape[-1] ** -0.5
    query = spread(q.flatten(1), patch_of_token).view_as(k)
    scores = (query.float() * k.float()).sum(dim=-1) * scale  # (T, heads)
    weights = segment_softmax(scores, patch_of_token, n_patches)
    out = segment_sum((weights.unsqueeze(-1) * v).flatten(1), patch_of_token, n_patches)
    return out.view(n_patches, *v.shape[1:]).to(v.dtype)
