"""oneDNN's matrix products for models that run on a CPU without gradients.

    with onednn(model, entropy_model):
        logits = model(codes)                   # linear layers in float32 on CPU read weights in oneDNN's own layout

PyTorch gives float32 products to MKL. With few rows, as in sampling, MKL rearranges the weights in every call; here
they are rearranged once. On AMD's processors oneDNN's kernels are also about twice as fast as MKL's, whatever the rows.

From two rows on, a row's numbers do not depend, to the last bit, on how many rows there are nor on the threads: so it
was found for every instruction set that oneDNN knows on x86, and :mod:`dpar.cache` builds on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def onednn(*models: nn.Module) -> Iterator[None]:
    """Inside, float32 linear layers on CPU run on oneDNN, from a copy of their weights; elsewhere nothing changes.

    The copies are as large as the weights. Weights must not change inside, and nothing inside has gradients.
    """
    modules = (module for model in models for module in model.modules())
    linears = [module for module in modules if isinstance(module, nn.Linear) and can_run(module)]
    linears = [linear for linear in linears if "forward" not in vars(linear)]  # the others are in an outer block
    try:
        for linear in linears:
            vars(linear)["forward"] = partial(product, weight=rearranged(linear.weight))
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


def available() -> bool:
    """Whether this PyTorch has oneDNN's kernels; some, for Macs say, have not."""
    kernels = ("_linear_pointwise", "_reorder_linear_weight")
    there = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in kernels)
    return there and hasattr(torch.ops.mkldnn._linear_pointwise, "binary")


def rearranged(weight: Tensor) -> Tensor:
    """A copy of a linear layer's weight, (fan_out, fan_in) float32, in oneDNN's layout."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return copy


def product(
    x: Tensor, weight: Tensor, *, then: str = "none", times: Tensor | None = None, add: Tensor | None = None
) -> Tensor:
    """x (..., fan_in) times a weight in oneDNN's layout: (..., fan_out).

    The result can go through a function of oneDNN's (``then``), or be multiplied with or added to another tensor,
    (..., fan_out).
    """
    run = torch.ops.mkldnn._linear_pointwise
    out: Tensor
    if times is not None:
        out = run.binary(x, times, weight, None, "mul")
    elif add is not None:
        out = run.binary(x, add, weight, None, "add")
    else:
        out = run(x, weight, None, then, [], "")
    return out


def can_run(linear: nn.Linear) -> bool:
    """Whether oneDNN can take this layer's place."""
    return (
        len(list(linear.parameters())) == 1  # no bias
        and type(linear.weight.data) is Tensor  # no share of it, as FSDP has
        and linear.weight.dtype == torch.float32
        and linear.weight.device.type == "cpu"
        and available()
        and not torch.is_autocast_enabled("cpu")
    )
