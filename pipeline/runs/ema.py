"""An exponential moving average of a model's weights, which often gives better samples than the last weights.

average = EMA(model, decay=0.9999)
average.update(model, skip)                              # after each optimizer step: a ← decay·a + (1 - decay)·w
with average.in_place_of(model):
    bits = bits_per_token(model, ...)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class EMA:
    """The average, initialised with the model's weights. Under FSDP each process averages its share."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def begin_at(self, model: nn.Module) -> None:
        """Reset the average to the model's weights."""
        for average, weight in zip(self._local(), _local(model), strict=True):
            average.copy_(weight)

    @torch.no_grad()
    def update(self, model: nn.Module, skip: Tensor) -> None:
        """Update the average with the weights after a step; not where ``skip``, a scalar on the device, is 1."""
        weight = (1 - self.decay) * (1 - skip)
        averages = self._local()
        torch._foreach_lerp_(averages, _local(model), [weight] * len(averages))

    @contextlib.contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights for the block."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for average, weight in zip(self._local(), _local(model), strict=True):
            copy = weight.clone()
            weight.copy_(average)
            average.copy_(copy)

    def _local(self) -> list[Tensor]:
        return [_part(t) for t in self.tensors.values()]


def _local(model: nn.Module) -> list[Tensor]:
    return [_part(p.detach()) for p in model.parameters()]


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
