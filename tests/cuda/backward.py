"""Backpropagation node by node, because autograd's engine needs a CUDA driver."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

Gradients = list[Tensor | None]  # of a node's outputs


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """Do what ``loss.backward()`` does. On CPU tensors the result is bit-identical."""
    for node, (gradient, *_) in _propagate({loss.grad_fn: [torch.ones_like(loss)]}, set()):
        if hasattr(node, "variable"):
            weight = node.variable
            weight.grad = gradient if weight.grad is None else weight.grad + gradient


@torch.no_grad()
def grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor], allow_unused: bool
) -> tuple[Tensor | None, ...]:
    """Do what ``torch.autograd.grad`` does as called by torch.compile, that is with ``allow_unused``."""
    gradients: dict[Any, Gradients] = {}
    for output, gradient in zip(outputs, grad_outputs, strict=True):
        _add(gradients, output.grad_fn, output.output_nr, gradient)
    ends = [get_gradient_edge(tensor) for tensor in inputs]
    gradients = dict(_propagate(gradients, {end.node for end in ends}))
    return tuple(gradients[end.node][end.output_nr] if end.node in gradients else None for end in ends)


def _propagate(gradients: dict[Any, Gradients], ends: set[Any]) -> Iterator[tuple[Any, Gradients]]:
    """Yield each node that gradients reach, with the gradients of its outputs; they stop at ``ends``."""
    nodes = list(gradients)
    for node in nodes:
        if node not in ends:
            nodes += {after for after, _ in node.next_functions if after is not None}.difference(nodes)
    for node in _from_loss([node for node in nodes if node not in ends]) + list(ends):
        given = gradients.pop(node, None)
        if given is None:
            continue
        yield node, given
        if node in ends or hasattr(node, "variable"):
            continue
        found = (node.apply if isinstance(node, BackwardCFunction) else node)(*given)
        found = found if isinstance(found, tuple) else (found,)
        # a Python function also returns None for trailing arguments that are not tensors
        for (after, slot), gradient in zip(node.next_functions, found, strict=False):
            if after is not None and gradient is not None:
                _add(gradients, after, slot, gradient)


def _add(gradients: dict[Any, Gradients], node: Any, slot: int, gradient: Tensor) -> None:
    wanted = node._input_metadata
    slots = gradients.setdefault(node, [None] * len(wanted))
    gradient = gradient.sum_to_size(wanted[slot].shape).to(wanted[slot].dtype)
    earlier = slots[slot]
    slots[slot] = gradient if earlier is None else earlier + gradient


def _from_loss(nodes: list[Any]) -> list[Any]:
    """Return the nodes sorted so that each comes after all nodes from which it gets gradients."""
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
