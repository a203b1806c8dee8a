"""Faster copies of models for float32 inference on CPUs: oneDNN's matrix products on weights packed once.

    model = prepare_forward(model)               # linear layers run on oneDNN; same module otherwise
    model = prepare_steps(model)                 # blocks step with folded weights as well, for sampling

Both return the model itself if nothing in it can be prepared: on other devices, in other dtypes, in training, under
autocast, and in a PyTorch without oneDNN. A copy shares all parameters and adds the packed weights, which doubles the
memory of the weights. It does not track later weight updates and has no gradients.

PyTorch dispatches float32 products to MKL. With few rows, as in sampling, MKL packs the weights in every call; here
they are packed once. On AMD processors oneDNN's kernels are also about twice as fast as MKL's, at any number of rows.
With two or more rows, a row's result is bit-identical for any number of rows and threads, on every x86 instruction set
that oneDNN supports; :func:`pad_rows` relies on it. All private oneDNN operators are called here.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from dpar.kv_cache import KVCache, Places, round_up, with_rows
from dpar.layers import NORM_EPS, Block

M = TypeVar("M", bound=nn.Module)
LEAST_ROWS = 2  # with at least this many rows, each row of a oneDNN product is bit-identical
WQKV = "attention.wqkv"  # of a block: if this can be packed, all of its linear layers can
OTHER_LEAST_ROWS, OTHER_ROWS = 8, 4  # for other libraries: at least this many rows, and a multiple of this


def available() -> bool:
    """Return whether this PyTorch has oneDNN's kernels; macOS builds, for example, do not."""
    kernels = ("_linear_pointwise", "_reorder_linear_weight")
    present = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in kernels)
    return present and hasattr(torch.ops.mkldnn._linear_pointwise, "binary")


def padded(rows: int) -> int:
    """Return the number of rows that :func:`pad_rows` makes of ``rows``."""
    if available():
        return max(LEAST_ROWS, rows)
    return max(OTHER_LEAST_ROWS, round_up(rows, OTHER_ROWS))


def pad_rows(x: Tensor) -> Tensor:
    """Append rows of zeros to x (R, ...), so that a row's products are bit-identical in any batch."""
    return with_rows(x, padded(x.shape[0]))


def prepare_forward(model: M) -> M:
    """Return a copy of ``model`` with its linear layers on oneDNN; ``model`` itself if none can be prepared."""
    linears = {} if _is_prepared(model) else _linears(model)
    return with_parts(model, {name: PackedLinear(linear) for name, linear in linears.items()})


def prepare_steps(model: M) -> M:
    """Like :func:`prepare_forward`, for sampling: blocks become :class:`PreparedBlock`, norms :class:`FewCallsNorm`."""
    linears = {} if _is_prepared(model) else _linears(model)
    if not linears:
        return model
    modules = dict(model.named_modules())
    blocks = {
        name: block
        for name, block in modules.items()
        if type(block) is Block and f"{name}.{WQKV}".strip(".") in linears
    }
    parts: dict[str, nn.Module] = {name: PreparedBlock(block) for name, block in blocks.items()}
    for name, module in modules.items():
        if any(name.startswith(f"{block}.".lstrip(".")) for block in blocks):
            continue
        if name in linears:
            parts[name] = PackedLinear(linears[name])
        elif type(module) is nn.RMSNorm and module.eps == NORM_EPS:
            parts[name] = FewCallsNorm(module)
    return with_parts(model, parts)


class PackedLinear(nn.Linear):
    """A linear layer computed by oneDNN."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # the weight is shared, not allocated again
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = _pack(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., fan_in) to (..., fan_out)."""
        return _product(x, self.packed)


class FewCallsNorm(nn.RMSNorm):
    """RMSNorm in four operator calls; on a few rows torch's own takes twice as long."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        nn.Module.__init__(self)  # the weight is shared, not allocated again
        self.normalized_shape, self.eps, self.elementwise_affine = norm.normalized_shape, norm.eps, True
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        return _normed(x).mul_(self.weight)


class PreparedBlock(Block):
    """A block whose step makes few operator calls: on a few rows, a call costs more than its arithmetic.

    Norm weights and the query scale are folded into the matrices; SiLU, gate and residual addition are fused into
    oneDNN's products.
    """

    @torch.no_grad()
    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)  # the parts are shared, not allocated again
        self.attention, self.feed_forward = block.attention, block.feed_forward
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        self.heads, self.width = block.attention.heads, block.attention.wo.in_features
        wqkv = block.attention.wqkv.weight * block.attention_norm.weight
        wqkv[: self.width] *= (self.width // self.heads) ** -0.5  # queries
        self.wqkv, self.wo = _pack(wqkv), _pack(block.attention.wo.weight)
        feed_forward = block.feed_forward
        self.w1, self.w3 = (_pack(w.weight * block.ffn_norm.weight) for w in (feed_forward.w1, feed_forward.w3))
        self.w2 = _pack(feed_forward.w2.weight)

    def step(self, x: Tensor, table: Tensor, places: Places, cache: KVCache) -> Tensor:
        """See :meth:`Block.step`."""
        rows, count = len(x), len(places.rows)
        qkv = _product(_normed(x), self.wqkv).view(rows, 3 * self.heads, -1, 2)
        torch.view_as_complex(qkv[:, : 2 * self.heads]).mul_(torch.view_as_complex(table).unsqueeze(1))
        qkv = qkv.view(rows, 3, self.heads, -1)[:count]
        cache.put(qkv[:, 1:], places)
        seen = with_rows(cache.attended(qkv[:, 0], places).view(count, self.width), rows)
        x = _product(seen, self.wo, add=x)
        middle = _normed(x)
        gated = _product(middle, self.w3, times=_product(middle, self.w1, then="swish"))
        return _product(gated, self.w2, add=x)


def with_parts(model: M, parts: dict[str, nn.Module]) -> M:
    """Return a copy of ``model`` that shares its parameters and buffers, with submodules replaced by name.

    ``model`` itself if there are no parts; the part itself if it replaces all of ``model``.
    """
    if not parts:
        return model
    if "" in parts:
        return cast("M", parts[""])
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    prepared = copy.deepcopy(model, shared)  # tensors in the memo are not copied
    for name, part in parts.items():
        prepared.set_submodule(name, part)
    return prepared


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers that can run on oneDNN, by name."""
    if not available() or torch.is_autocast_enabled("cpu"):
        return {}
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear and _can_pack(module)}


def _can_pack(linear: nn.Linear) -> bool:
    weight = linear.weight
    return (
        len(list(linear.parameters())) == 1  # no bias
        and not linear.training
        and type(weight.data) is Tensor  # not an FSDP shard
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )


def _is_prepared(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear | PreparedBlock) for module in model.modules())


def _pack(weight: Tensor) -> Tensor:
    """Return a copy of a linear layer's weight, (fan_out, fan_in) float32, in oneDNN's layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return packed


def _product(
    x: Tensor, packed: Tensor, *, then: str = "none", times: Tensor | None = None, add: Tensor | None = None
) -> Tensor:
    """Multiply x (..., fan_in) by a packed weight: (..., fan_out).

    oneDNN can apply a function to the result (``then``), or multiply it by or add it to a tensor (..., fan_out).
    """
    run = torch.ops.mkldnn._linear_pointwise
    out: Tensor
    if times is not None:
        out = run.binary(x, times, packed, None, "mul")
    elif add is not None:
        out = run.binary(x, add, packed, None, "add")
    else:
        out = run(x, packed, None, then, [], "")
    return out


def _normed(x: Tensor) -> Tensor:
    """Apply RMSNorm without weights: (..., width) to (..., width)."""
    return x * x.square().mean(dim=-1, keepdim=True).add_(NORM_EPS).rsqrt_()
