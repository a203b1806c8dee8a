"""Micro-batches of training steps, prepared in a thread during the previous step.

    with closing(prefetch(micro_batches(data, range(begin, end), micro=32, packed=True, pin=True), limit=1)) as stream:
        for parts in stream: ...                             # a step's micro-batches

Patch layouts are computed and tensors pinned here, so that a step only starts copies to its device.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpar.packing import PatchLayout
from shards.reader import Batch
from shards.training_data import TrainingData


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Images of one forward and backward pass; tensors are on the CPU."""

    codes: Tensor  # (B, N) int64
    labels: Tensor  # (B,) int64
    layout: PatchLayout | None  # None for LlamaGen

    @classmethod
    def of(cls, batch: Batch, packed: bool, pin: bool) -> MicroBatch:
        """Return a batch as tensors; ``packed`` adds its patch layout, ``pin`` pins codes and layout."""
        codes, layout = torch.from_numpy(batch.codes), None
        if packed:
            assert batch.starts is not None  # check_compatible refuses artifacts without boundaries
            layout = PatchLayout.from_starts(torch.from_numpy(batch.starts))
        if pin:
            codes, layout = codes.pin_memory(), None if layout is None else layout.pin_memory()
        return cls(codes=codes, labels=torch.from_numpy(batch.labels), layout=layout)

    @property
    def n_patches(self) -> int:
        """Patches of all images; tokens for LlamaGen."""
        return self.codes.numel() if self.layout is None else self.layout.n_patches


def micro_batches(
    data: TrainingData, steps: Iterable[int], *, micro: int, packed: bool, pin: bool
) -> Generator[list[MicroBatch], None, None]:
    """Yield this process's share of the batch of each step, in micro-batches of at most ``micro`` images."""
    for step in steps:
        batch = data.batch(step)
        parts = [batch.part(first, first + micro) for first in range(0, len(batch.codes), micro)]
        yield [MicroBatch.of(part, packed, pin) for part in parts]
