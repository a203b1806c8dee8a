"""Blocks as sampling runs them: one new token of each row, its past in a KV cache.

    with stepping(model, entropy_model):                 # float32 on CPU: weights prepared once, in oneDNN's layout
        x = take_step(block, x, table, places, cache)    # x (R, width)

Between two products of a step there is little to compute, and on CPU each call costs more than its arithmetic, so a
prepared block folds what it can into them: norms' weights and the scale of queries into the matrices, SiLU, gates and
residual branches into what oneDNN does with a product's result. Other devices and dtypes run the block as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from dpar.cache import KVCache, Places, with_rows
from dpar.layers import NORM_EPS, Block
from dpar.onednn import available, can_run, onednn, product, rearranged


@contextmanager
def stepping(*models: nn.Module) -> Iterator[None]:
    """Inside, steps through these models run on oneDNN, where it can run; elsewhere nothing changes.

    The prepared weights are a copy as large as the weights. Weights must not change inside.
    """
    modules = [module for model in models for module in model.modules()]
    # an outer stepping has prepared the others
    blocks = [module for module in modules if isinstance(module, Block) and _can_prepare(module)]
    inside = {id(part) for block in modules if isinstance(block, Block) for part in block.modules()}
    others = [module for module in modules if id(module) not in inside]
    with ExitStack() as stack:
        stack.enter_context(onednn(*(module for module in others if isinstance(module, nn.Linear))))
        for block in blocks:
            vars(block)["prepared"] = PreparedBlock(block)
            stack.callback(vars(block).pop, "prepared", None)
        for norm in others:
            if isinstance(norm, nn.RMSNorm) and _can_replace(norm):
                vars(norm)["forward"] = partial(_weighted, norm.weight.detach())
                stack.callback(vars(norm).pop, "forward", None)
        yield


def take_step(block: Block, x: Tensor, table: Tensor, places: Places, cache: KVCache) -> Tensor:
    """One new token of each row through a block.

    Args:
        block: prepared or not.
        x: (R, width), with rows of padding at the end (:func:`dpar.cache.pad_rows`).
        table: (R, head_dim / 2, 2), rotary positions.
        places: where the rows' tokens go.
        cache: of this block.

    Returns:
        (R, width).
    """
    prepared: PreparedBlock | None = vars(block).get("prepared")
    if prepared is not None:
        return prepared(x, table, places, cache)
    out: Tensor = block(x.unsqueeze(1), table.unsqueeze(1), cache.at(places))[:, 0]
    return out


class PreparedBlock:
    """A block's step in float32 on CPU."""

    @torch.no_grad()
    def __init__(self, block: Block) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.heads, self.width = attention.heads, attention.wo.in_features
        wqkv = attention.wqkv.weight * block.attention_norm.weight
        wqkv[: self.width] *= (self.width // self.heads) ** -0.5  # queries
        self.wqkv, self.wo = rearranged(wqkv), rearranged(attention.wo.weight)
        self.w1, self.w3 = (rearranged(w.weight * block.ffn_norm.weight) for w in (feed_forward.w1, feed_forward.w3))
        self.w2 = rearranged(feed_forward.w2.weight)

    def __call__(self, x: Tensor, table: Tensor, places: Places, cache: KVCache) -> Tensor:
        """See :func:`take_step`."""
        rows, count = len(x), len(places.rows)
        qkv = product(normed(x), self.wqkv).view(rows, 3 * self.heads, -1, 2)
        torch.view_as_complex(qkv[:, : 2 * self.heads]).mul_(torch.view_as_complex(table).unsqueeze(1))
        qkv = qkv.view(rows, 3, self.heads, -1)[:count]
        cache.put(qkv[:, 1:], places)
        seen = with_rows(cache.attended(qkv[:, 0], places).view(count, self.width), rows)
        x = product(seen, self.wo, add=x)
        middle = normed(x)
        gated = product(middle, self.w3, times=product(middle, self.w1, then="swish"))
        return product(gated, self.w2, add=x)


def normed(x: Tensor) -> Tensor:
    """RMSNorm without weights: (..., width) to the like. torch's own takes twice as long on a few rows."""
    return x * x.square().mean(dim=-1, keepdim=True).add_(NORM_EPS).rsqrt_()


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    return normed(x).mul_(weight)


def _can_replace(norm: nn.RMSNorm) -> bool:
    of_ours = norm.weight.dtype == torch.float32 and norm.weight.device.type == "cpu" and norm.eps == NORM_EPS
    return of_ours and available() and not torch.is_autocast_enabled("cpu") and "forward" not in vars(norm)


def _can_prepare(block: Block) -> bool:
    linears = [part for part in block.modules() if isinstance(part, nn.Linear)]
    return not block.training and "prepared" not in vars(block) and all(can_run(linear) for linear in linears)
