"""Results of training steps, read from the device one step late: meanwhile the host launches the next step.

results = StepResults()
results.add(done, flags_and_numbers)                     # after each step; does not wait
for result in results.read():                            # those of earlier steps
    ...
for result in results.read(wait=True):                   # and of this one, before it is logged or saved
    ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """The result of one step; everything but the loss is the same in all processes."""

    done: int  # number of the step, from 1
    skipped: bool  # loss or gradients were not finite, so nothing was changed
    save_failed: bool  # the checkpoint under way
    status: int  # that a signal asks the command to end with; 0: none
    loss: float  # this process's mean, nats per token
    norm: float  # of the gradients


class StepResults:
    """The results that have not been read."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, done: int, numbers: Tensor) -> None:
        """Start the copy of a step's result to the host.

        Args:
            done: number of the step, from 1.
            numbers: (5,) float32 on the step's device: the fields of :class:`Step` that follow ``done``.
        """
        event = None
        if numbers.is_cuda:
            numbers = torch.empty(len(numbers), pin_memory=True).copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((done, numbers, event))

    def read(self, *, wait: bool = False) -> Iterator[Step]:
        """Yield the results of all steps but the newest, and that one too with ``wait``; each is yielded once."""
        while len(self._waiting) > (0 if wait else 1):
            done, numbers, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            skipped, save_failed, status, loss, norm = numbers.tolist()
            yield Step(
                done=done,
                skipped=bool(skipped),
                save_failed=bool(save_failed),
                status=int(status),
                loss=loss,
                norm=norm,
            )
