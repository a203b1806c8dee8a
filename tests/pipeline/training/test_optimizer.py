"""A step is skipped on the device, or by the host if the device's kernels cannot."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.settings.training import TrainSettings
from pipeline.training.optimizer import make_optimizer, step_unless


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_a_skipped_step_leaves_the_weights_as_they_were(skip: float) -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 3)).sum().backward()
    step_unless(make_optimizer(layer, TrainSettings(lr=0.1)), torch.tensor(skip))
    assert torch.equal(layer.weight, before) == bool(skip)


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_where_kernels_ignore_the_flag_the_host_skips_the_step(skip: float) -> None:
    steps: list[float] = []
    optimizer: Any = SimpleNamespace(step=lambda: steps.append(skip))
    flag: Any = SimpleNamespace(device=torch.device("mps"), item=lambda: skip)  # there is no such device here
    step_unless(optimizer, flag)
    assert steps == ([] if skip else [0.0])
