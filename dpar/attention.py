"""Causal attention in its three settings: dense over tokens, packed over patches, and patches over their tokens.

Each is a callable (q, k, v) -> out over tensors (..., T, heads, head_dim), so that one block serves training and
sampling. Packed attention has interchangeable backends that give the same numbers:

    varlen     PyTorch's varlen_attn; CUDA, float16 and bfloat16
    xformers   memory_efficient_attention with a BlockDiagonalCausalMask; CUDA, float16 and bfloat16
    flex       FlexAttention with a block mask of images; CUDA (it has no backward pass on the CPU)
    sdpa       PyTorch's scaled_dot_product_attention, image by image; runs everywhere, the choice on CPU and Apple

    name, reason = choose_backend(device, torch.bfloat16)       # "varlen", why
    out = packed_attention(q, k, v, layout.cu_seqlens, layout.longest, name)
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dpar.errors import ModelError
from dpar.packing import PatchLayout, segment_softmax, segment_sum, spread
from dpar.xformers_loading import xformers_hindrance

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
PackedBackend = Literal["varlen", "xformers", "flex", "sdpa"]
Backend = Literal["auto", "varlen", "xformers", "flex", "sdpa"]
# What ``auto`` tries. varlen first: torch.compile keeps it in its graph, and it needs no other package.
PREFERRED: tuple[PackedBackend, ...] = ("varlen", "xformers", "sdpa")
HALF = (torch.float16, torch.bfloat16)
FLASH_CAPABILITY = (8, 0)  # the oldest GPUs that flash attention runs on


def dense_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over complete sequences, (B, T, heads, head_dim) each, through SDPA's fast paths."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2)


def choose_backend(device: torch.device, dtype: torch.dtype, asked: Backend = "auto") -> tuple[PackedBackend, str]:
    """Return the backend of packed attention to train with here, and a short reason.

    Args:
        device: of the model.
        dtype: of queries and keys: autocast's, or the weights'.
        asked: one backend, or ``auto`` for the first of :data:`PREFERRED` that runs here.

    Raises:
        ModelError: the backend asked for cannot run here, with the reason and those that can.
    """
    if asked not in get_args(Backend):
        raise ModelError(f"no attention backend is called {asked!r}; choose from {', '.join(get_args(Backend))}")
    if asked != "auto":
        hindrance = _hindrance(asked, device, dtype)
        if hindrance is not None:
            able = [name for name in get_args(PackedBackend) if _hindrance(name, device, dtype) is None]
            raise ModelError(f"attention backend {asked} cannot run here: {hindrance}. These can: {', '.join(able)}")
        return asked, "as asked"
    passed_over = []
    for name in PREFERRED:
        hindrance = _hindrance(name, device, dtype)
        if hindrance is None:
            break
        passed_over.append(f"{name}: {hindrance}")
    return name, "; ".join(passed_over) or f"{str(dtype).removeprefix('torch.')} on {device.type}"


def _hindrance(backend: PackedBackend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a backend cannot train here; None if it can."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return "it has no backward pass on the CPU" if backend == "flex" else "it needs a CUDA GPU"
    needs = {"varlen": "torch.nn.attention.varlen", "flex": "triton"}.get(backend)
    if needs is not None and importlib.util.find_spec(needs) is None:
        return f"{needs} is not installed"
    if backend == "flex":
        return None
    if dtype not in HALF:
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < FLASH_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than flash attention supports"
    return xformers_hindrance() if backend == "xformers" else None


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    backend: PackedBackend,
    host_cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Block-diagonal causal attention: each patch sees itself and the earlier patches of its own image.

    Args:
        q: (ΣM, heads, head_dim), the images one after the other.
        k: likewise.
        v: likewise.
        cu_seqlens: (B + 1,) int32, where images begin, and ΣM.
        longest: most patches in one image, or any larger number.
        backend: see above; :func:`choose_backend` says what runs where.
        host_cu_seqlens: ``cu_seqlens`` on the CPU. Without it sdpa and xformers wait for the device to read it.

    Returns:
        (ΣM, heads, head_dim), in the dtype of v.
    """
    host = cu_seqlens.cpu() if host_cu_seqlens is None else host_cu_seqlens
    return _attend_with(backend, cu_seqlens, longest, host)(q, k, v)


def packed_causal(layout: PatchLayout, backend: PackedBackend) -> Attend:
    """Return :func:`packed_attention` of one batch as a callable; what all layers share is computed once."""
    # The longest image differs from batch to batch and would make torch.compile start anew; its bound does not.
    return _attend_with(backend, layout.cu_seqlens, layout.n_tokens, layout.host_cu_seqlens)


def _attend_with(backend: PackedBackend, cu_seqlens: Tensor, longest: int, host: Tensor) -> Attend:
    if backend == "varlen":
        return functools.partial(_varlen, cu_seqlens, longest, **_varlen_causal())
    if backend == "xformers":
        return functools.partial(_outside_graphs(_xformers), _xformers_mask(cu_seqlens, host))
    if backend == "flex":
        return functools.partial(_flex, _block_mask(cu_seqlens, int(host[-1])))
    if cu_seqlens.is_cpu:
        return functools.partial(_operator_cpu, host)
    return functools.partial(_image_by_image if cu_seqlens.is_meta else _outside_graphs(_image_by_image), host)


@functools.cache
def _outside_graphs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that torch.compile leaves alone: it reads each batch's lengths, and would be compiled for every one.

    Made when first used, because it imports the compiler, which takes a second.
    """
    alone: Callable[..., Tensor] = torch.compiler.disable(function)
    return alone


def _varlen_causal() -> dict[str, Any]:
    """How `varlen_attn` is told to be causal: by `is_causal` in PyTorch 2.10, by a window in later versions."""
    from torch.nn.attention import varlen

    is_old = "is_causal" in inspect.signature(varlen.varlen_attn).parameters
    return {"is_causal": True} if is_old else {"window_size": (-1, 0)}


def _varlen(cu_seqlens: Tensor, longest: int, q: Tensor, k: Tensor, v: Tensor, **causal: Any) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **causal)
    assert isinstance(out, Tensor)  # it gives a pair only where more is asked for
    return out


def _xformers_mask(cu_seqlens: Tensor, host: Tensor) -> Any:
    from xformers.ops import fmha  # imports with warnings where there is no GPU, so only here

    lengths = host.diff()
    # from_seqlens would copy to the device again
    seqlens = fmha.attn_bias._SeqLenInfo(
        seqstart=cu_seqlens,
        max_seqlen=int(lengths.max()),
        min_seqlen=int(lengths.min()),
        seqstart_py=host.tolist(),
    )
    return fmha.attn_bias.BlockDiagonalCausalMask(q_seqinfo=seqlens, k_seqinfo=seqlens)


def _xformers(mask: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import fmha

    out: Tensor = fmha.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]
    return out


def _block_mask(cu_seqlens: Tensor, n_patches: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    image = torch.searchsorted(cu_seqlens, torch.arange(n_patches, device=cu_seqlens.device), right=True)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (image[query] == image[key]) & (query >= key)

    make: Any = _fused(create_block_mask) if cu_seqlens.is_cuda else create_block_mask
    return make(visible, None, None, n_patches, n_patches, device=cu_seqlens.device.type)


def _flex(mask: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    attention: Any = _fused(flex_attention) if q.is_cuda else flex_attention
    out: Tensor = attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask)[0]
    return out.transpose(0, 1)


@functools.cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the compiled function; uncompiled, FlexAttention materialises all pairs of patches of the batch."""
    return torch.compile(function, dynamic=True)


# One call per image: on CPU, padding to the longest and copying back and forth takes 1.5 times as long.


def _image_by_image(host: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lengths = host.diff().tolist()
    images = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([dense_causal(*(x[None] for x in image))[0] for image in images])


def _operator_cpu(host: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = _packed_cpu(q, k, v, host)[0]
    return out


# The same as an operator, which torch.compile keeps in its graph.


@torch.library.custom_op("dpar::packed_cpu", mutates_args=(), device_types="cpu")
def _packed_cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """(ΣM, heads, head_dim) attention, and (ΣM, heads) logarithms of the sums of exponentials for its backward."""
    out, lse = _like_cpu(q, k, v, cu_seqlens)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    for begin, end in pairwise(cu_seqlens.tolist()):
        one, sums = flash(*(_one_image(x, begin, end) for x in (q, k, v)), 0.0, True)
        out[begin:end], lse[begin:end] = one[0].transpose(0, 1), sums[0].transpose(0, 1)
    return out, lse


@_packed_cpu.register_fake
def _like_cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=precise)


@torch.library.custom_op("dpar::packed_cpu_backward", mutates_args=(), device_types="cpu")
def _packed_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _like_cpu_backward(grad, q, k, v, out, lse, cu_seqlens)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    for begin, end in pairwise(cu_seqlens.tolist()):
        # in lse's dtype: bfloat16's own backward takes twice as long as float32's at these lengths
        images = (_one_image(x, begin, end).to(lse.dtype) for x in (grad, q, k, v, out))
        sums = lse[begin:end].transpose(0, 1)[None]
        for gradient, one in zip(gradients, flash(*images, sums, 0.0, True), strict=True):
            gradient[begin:end] = one[0].transpose(0, 1)
    return gradients


@_packed_cpu_backward.register_fake
def _like_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _one_image(x: Tensor, begin: int, end: int) -> Tensor:
    return x[begin:end].transpose(0, 1)[None]  # (1, heads, M, head_dim)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_packed_cpu_backward(grad, *ctx.saved_tensors), None


_packed_cpu.register_autograd(_backward, setup_context=_save_for_backward)


def patch_cross_attention(q: Tensor, k: Tensor, v: Tensor, patch_of_token: Tensor, n_patches: int) -> Tensor:
    """Attend from each patch to its own tokens; each token is read once.

    Args:
        q: (M, heads, head_dim), one query per patch.
        k: (T, heads, head_dim), one key per token.
        v: (T, heads, head_dim).
        patch_of_token: (T,) int64.
        n_patches: M.

    Returns:
        (M, heads, head_dim), in the dtype of v.
    """
    scale = q.shape[-1] ** -0.5
    query = spread(q.flatten(1), patch_of_token).view_as(k)
    scores = (query * k).sum(dim=-1, dtype=torch.float32) * scale  # (T, heads); no float32 copies of all tokens
    weights = segment_softmax(scores, patch_of_token, n_patches)
    out = segment_sum((weights.unsqueeze(-1) * v).flatten(1), patch_of_token, n_patches)
    return out.view(n_patches, *v.shape[1:]).to(v.dtype)
