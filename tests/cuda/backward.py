"""Backpropagation node by node: autograd's own engine asks the driver for devices, and there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

Pulls = list[Tensor | None]  # gradients of a node's outputs


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """``loss.backward()``: on CPU tensors it gives the bits that autograd's engine does."""
    for node, (gradient, *_) in _propagate({loss.grad_fn: [torch.ones_like(loss)]}, set()):
        if hasattr(node, "variable"):
            weight = node.variable
            weight.grad = gradient if weight.grad is None else weight.grad + gradient


@torch.no_grad()
def grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor], allow_unused: bool
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``, as torch.compile calls it to trace a backward pass; ``allow_unused`` is true there."""
    pulls: dict[Any, Pulls] = {}
    for output, gradient in zip(outputs, grad_outputs, strict=True):
        _add(pulls, output.grad_fn, output.output_nr, gradient)
    ends = [get_gradient_edge(tensor) for tensor in inputs]
    gradients = dict(_propagate(pulls, {end.node for end in ends}))
    return tuple(gradients[end.node][end.output_nr] if end.node in gradients else None for end in ends)


def _propagate(pulls: dict[Any, Pulls], ends: set[Any]) -> Iterator[tuple[Any, Pulls]]:
    """Each node that gradients reach, with those of its outputs; they pass no node of ``ends``."""
    nodes = list(pulls)
    for node in nodes:
        if node not in ends:
            nodes += {after for after, _ in node.next_functions if after is not None}.difference(nodes)
    for node in _from_loss([node for node in nodes if node not in ends]) + list(ends):
        given = pulls.pop(node, None)
        if given is None:
            continue
        yield node, given
        if node in ends or hasattr(node, "variable"):
            continue
        found = (node.apply if isinstance(node, BackwardCFunction) else node)(*given)
        found = found if isinstance(found, tuple) else (found,)
        # a function in Python gives None for arguments that are not tensors, too: the last ones
        for (after, slot), pull in zip(node.next_functions, found, strict=False):
            if after is not None and pull is not None:
                _add(pulls, after, slot, pull)


def _add(pulls: dict[Any, Pulls], node: Any, slot: int, pull: Tensor) -> None:
    wanted = node._input_metadata
    slots = pulls.setdefault(node, [None] * len(wanted))
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
                if not waiting[after] and after in nodes:
                    ready.append(after)
    return order
