"""LlamaGen's LLaMA block, with LlamaGen's parameter names, so that its checkpoints load unchanged.

The caller chooses the attention pattern (:mod:`dpar.attention`): a block receives ``attend`` and a RoPE table.
A model runs its layers through :func:`run_layer`; each is a :class:`Layer`, which can be compiled for training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpar.attention import Attend, patch_cross_attention
from dpar.packing import PatchLayout, segment_max, spread
from dpar.rope import rotate

if TYPE_CHECKING:
    from dpar.kv_cache import KVCache, Places

NORM_EPS = 1e-5
INIT_STD = 0.02


def ffn_hidden(width: int) -> int:
    """Return SwiGLU's hidden size: 2/3 · 4 · width, rounded up to a multiple of 256."""
    return -(-int(2 * 4 * width / 3) // 256) * 256


class Layer(nn.Module):
    """A layer of a model. ``compute`` is its forward pass, which can be compiled for training.

    All layers of a kind share one compiled function, and hooks (FSDP's, say) run outside it.
    """

    # Not nn.Module.compile: it compiles hooks with the forward pass, and calls the compiled function in eval too.
    compute: ClassVar[Callable[..., Any]]
    compiled = False  # in training only: in sampling and evaluation shapes change at every step

    def forward(self, *args: Any) -> Any:
        """Run ``compute``, compiled if requested and in training."""
        compute = type(self).compute
        if self.compiled and self.training:
            compute = compiled(compute)
        return compute(self, *args)


@functools.cache
def compiled(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward pass of a class of layers, compiled when it first runs."""
    return torch.compile(compute)


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Make these layers run compiled in training: one graph per class, for any number of patches."""
    for layer in layers:
        assert isinstance(layer, Layer)
        layer.compiled = True


def mark_packed(*tensors: Tensor) -> None:
    """Tell torch.compile that the first dimension, ΣM, changes from step to step."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def run_layer(layer: nn.Module, *args: Any, recompute: bool) -> Any:
    """Return a layer's output; with ``recompute``, backward recomputes its activations, with the same dropout."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


class Attention(nn.Module):
    """Self-attention with rotary positions; queries, keys and values from one matrix."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, table: Tensor, attend: Attend) -> Tensor:
        """x (..., T, width), table (..., T, head_dim / 2, 2) to (..., T, width)."""
        qkv = self.wqkv(x).unflatten(-1, (3 * self.heads, -1))  # (..., T, 3 * heads, head_dim)
        qk, v = qkv.split([2 * self.heads, self.heads], dim=-2)
        q, k = rotate(qk, table).chunk(2, dim=-2)
        out = attend(q, k, v)  # (..., T, heads, head_dim)
        projected: Tensor = self.resid_dropout(self.wo(out.flatten(-2)))  # (..., T, width)
        return projected


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        hidden = ffn_hidden(width)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        out: Tensor = self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))  # by way of (..., hidden)
        return out


class Block(Layer):
    """Pre-norm attention and feed-forward, each on a residual branch."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.feed_forward = FeedForward(width, dropout)
        self.attention_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.ffn_norm = nn.RMSNorm(width, eps=NORM_EPS)

    def compute(self, x: Tensor, table: Tensor, attend: Attend) -> Tensor:
        """x (..., T, width), table (..., T, head_dim / 2, 2) to (..., T, width)."""
        x = x + self.attention(self.attention_norm(x), table, attend)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out

    def step(self, x: Tensor, table: Tensor, places: Places, cache: KVCache) -> Tensor:
        """Run one new token of each row, for sampling.

        Args:
            x: (R, width), with rows of padding at the end (:func:`dpar.cpu_kernels.pad_rows`).
            table: (R, head_dim / 2, 2), rotary positions.
            places: where the rows' keys and values go.
            cache: of this block.

        Returns:
            (R, width).
        """
        out: Tensor = self(x.unsqueeze(1), table.unsqueeze(1), cache.at(places))[:, 0]  # as (R, 1, width)
        return out


class PatchCrossAttention(nn.Module):
    """Patches attend to their tokens (paper section 3.2.2): p_j + Attn(Norm(p_j), Norm(u_i))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.patch_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.token_norm = nn.RMSNorm(width, eps=NORM_EPS)

    def forward(
        self,
        patches: Tensor | None,
        tokens: Tensor,
        patch_of_token: Tensor,
        n_patches: int,
    ) -> Tensor:
        """Update patches (M, width) from tokens (T, width); None starts from their maximum in each patch."""
        if patches is None:
            patches = segment_max(tokens, patch_of_token, n_patches)  # (T, width) to (M, width)
        normed = self.token_norm(tokens)
        split = (self.heads, -1)
        out = patch_cross_attention(
            self.wq(self.patch_norm(patches)).unflatten(-1, split),  # (M, heads, head_dim)
            self.wk(normed).unflatten(-1, split),  # (T, heads, head_dim)
            self.wv(normed).unflatten(-1, split),
            patch_of_token,
            n_patches,
        )  # (M, heads, head_dim)
        gathered: Tensor = patches + self.wo(out.flatten(-2))  # (M, width)
        return gathered


class EncoderLayer(Layer):
    """One layer of the patch encoder: a causal block over tokens, then cross-attention to patches. No dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.block = Block(width, heads, dropout=0.0)
        self.cross_attention = PatchCrossAttention(width, heads)

    def compute(
        self, patches: Tensor | None, tokens: Tensor, table: Tensor, attend: Attend, layout: PatchLayout
    ) -> tuple[Tensor, Tensor]:
        """Patches (ΣM, width), or None, and tokens (B, N, width) to patches and tokens of these shapes."""
        tokens = self.block(tokens, table, attend)
        patches = self.cross_attention(patches, tokens.flatten(0, 1), layout.patch_of_token, layout.n_patches)
        return patches, tokens


class DecoderLayer(Layer):
    """One layer of the patch decoder (paper section 3.2.4): patches copied to their tokens, then a causal block.

    Norm and projection act on patches before the copy: the same result for N/M times less work. No dropout.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.patch_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.patch_proj = nn.Linear(width, width, bias=False)
        self.block = Block(width, heads, dropout=0.0)

    def project(self, patches: Tensor) -> Tensor:
        """Return what each token of a patch receives: (..., width) to (..., width)."""
        out: Tensor = self.patch_proj(self.patch_norm(patches))
        return out

    def compute(
        self, tokens: Tensor, received: Tensor, table: Tensor, attend: Attend, patch_of_token: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, T, width) and what they receive from their patches to (B, T, width).

        ``received`` is (B, T, width); with ``patch_of_token``, (B·T,), it is the outputs of patches, (ΣM, width).
        """
        if patch_of_token is not None:
            received = spread(self.project(received), patch_of_token).view_as(tokens)  # (ΣM, width) to (B, T, width)
        out: Tensor = self.block(tokens + received, table, attend)
        return out


class LabelEmbedder(nn.Module):
    """Class embeddings; the last row is the guidance class, which stands for no class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) int64 in 0 … classes to (B, width)."""
        out: Tensor = self.embedding_table(labels)
        return out


def init_weights(module: nn.Module) -> None:
    """Initialise matrices and embeddings from N(0, 0.02), as LlamaGen and the authors do. For ``module.apply``."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
