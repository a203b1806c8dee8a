"""Backpropagation node by node: autograd's own engine asks the driver for devices, and there is none."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction


@torch.no_grad()
def backward(loss: torch.Tensor) -> None:
    """``loss.backward()``: on CPU tensors it gives the bits that autograd's engine does."""
    nodes: list[Any] = [loss.grad_fn]
    for node in nodes:
        nodes += {after for after, _ in node.next_functions if after is not None}.difference(nodes)
    pulls: dict[Any, list[torch.Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    for node in _from_loss(nodes):
        given = pulls.pop(node, None)
        if given is None:
            continue
        if hasattr(node, "variable"):
            (gradient,), weight = given, node.variable
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
            continue
        found = (node.apply if isinstance(node, BackwardCFunction) else node)(*given)
        found = found if isinstance(found, tuple) else (found,)
        # a function in Python gives None for arguments that are not tensors, too: the last ones
        for (after, slot), pull in zip(node.next_functions, found, strict=False):
            if after is None or pull is None:
                continue
            wanted = after._input_metadata
            slots = pulls.setdefault(after, [None] * len(wanted))
            pull = pull.sum_to_size(wanted[slot].shape).to(wanted[slot].dtype)
            earlier = slots[slot]
            slots[slot] = pull if earlier is None else earlier + pull


def _from_loss(nodes: list[Any]) -> list[Any]:
    """The nodes in an order in which each comes after all that it gets gradients from."""
    waiting = Counter(after for node in nodes for after, _ in node.next_functions if after is not None)
    ready, order = [node for node in nodes if not waiting[node]], []
    while ready:
        order.append(ready.pop())
        for after, _ in order[-1].next_functions:
            if after is not None:
                waiting[after] -= 1
                if not waiting[after]:
                    ready.append(after)
    return order
