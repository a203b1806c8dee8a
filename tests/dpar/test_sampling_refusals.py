"""Settings, labels, entropy models and rules that sampling refuses."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dpar import ModelError, PatchRule, sample
from tests.dpar.sampled import HEIGHT, LABELS, WIDTH, N, V, dpar, llamagen, sample_with, unconditional


@pytest.mark.parametrize(
    ("settings_", "fault"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; it must be at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.01}, "top_p is 1.01; it must be above 0 and at most 1"),
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"cfg_scale": 0.0}, "cfg_scale is 0.0; it must be above 0"),
        ({"cfg_scale": math.nan}, "cfg_scale is nan"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule is 'cosine'; it must be one of constant, linear, power-cosine"),
        ({"cfg_power": -1.0}, "cfg_power is -1.0"),
        ({"known": torch.zeros(4, N)}, "known and keep go together"),
        ({"known": torch.zeros(3, N).long(), "keep": torch.zeros(4, N).bool()}, r"known is \(3, 15\); \(4, 15\)"),
        ({"known": torch.zeros(4, N).long(), "keep": torch.zeros(4, 9).bool()}, r"keep is \(4, 9\)"),
        ({"known": torch.zeros(4, N).long(), "keep": torch.zeros(4, N)}, "keep is torch.float32; bool"),
        ({"known": torch.full((4, N), V), "keep": torch.ones(4, N).bool()}, "known codes range from 19 to 19"),
        ({"indices": [0, 1]}, "2 indices for 4 labels"),
        ({"indices": [3]}, "1 indices for 4 labels"),
    ],
)
def test_settings_out_of_range_are_refused(settings_: dict[str, Any], fault: str) -> None:
    with pytest.raises(ModelError, match=fault):
        sample_with(llamagen(), None, LABELS, **settings_)


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        (torch.zeros(0, dtype=torch.long), r"labels are \(0,\)"),
        (torch.zeros(2, 2, dtype=torch.long), r"labels are \(2, 2\)"),
        (torch.tensor([0, -1]), "labels range from -1 to 0; this model has classes 0 to 2, and 3 for no class"),
        (torch.tensor([1, 4]), "labels range from 1 to 4"),
    ],
)
def test_labels_out_of_range_are_refused(labels: Tensor, fault: str) -> None:
    with pytest.raises(ModelError, match=fault):
        sample_with(llamagen(), None, labels)


def test_an_entropy_model_without_a_start_token_is_not_sampled_from() -> None:
    with pytest.raises(ModelError, match="without a start token is an entropy model; it cannot sample"):
        sample_with(unconditional(), None, torch.zeros(2, dtype=torch.long))


def test_a_threshold_without_an_entropy_model_is_refused() -> None:
    with pytest.raises(ModelError, match="an entropy model is needed"):
        sample_with(dpar(), None, LABELS, threshold=2.0)


def test_dpar_without_a_rule_or_a_threshold_is_refused() -> None:
    with pytest.raises(ModelError, match="a DPAR model needs a patch rule"):
        sample(dpar(), LABELS, unconditional())
    with pytest.raises(ModelError, match="the patch rule has no threshold"):
        sample(dpar(), LABELS, unconditional(), PatchRule())


@pytest.mark.parametrize(
    ("name", "value"), [("codebook_size", V + 1), ("grid_height", HEIGHT + 1), ("grid_width", WIDTH + 1)]
)
def test_an_entropy_model_for_other_tokens_is_refused(name: str, value: int) -> None:
    other = llamagen(**{name: value})
    assert dataclasses.asdict(other.config)[name] == value
    with pytest.raises(ModelError, match=f"the entropy model's {name} is {value}, the model's {value - 1}"):
        sample_with(dpar(), other, LABELS, threshold=2.0)


@pytest.mark.parametrize(
    ("settings_", "fault"),
    [
        ({"static_length": 0.5}, "length is 0.5"),
        ({"threshold": math.inf, "max_length": 0}, "max_length is 0"),
        ({"threshold": math.nan}, "threshold is not a number"),
    ],
)
def test_an_invalid_rule_is_refused(settings_: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        sample_with(dpar(), None, LABELS, **settings_)
