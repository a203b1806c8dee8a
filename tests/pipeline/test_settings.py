"""Impossible settings are refused before anything is read or written."""

import dataclasses
from typing import Any

import pytest

from pipeline.runtime.errors import StageError
from pipeline.settings.artifacts import TokenizeSettings
from pipeline.settings.fields import identity, run_time_fields
from pipeline.settings.training import TrainSettings, TrainTokenizerSettings


@pytest.mark.parametrize(
    ("settings", "values", "says"),
    [
        (TrainSettings, {"batch": 1_000_000_007}, "--batch is 1000000007; it must be at most 65536"),
        (TrainSettings, {"micro_batch": 1_000_000_007}, "--micro-batch is 1000000007; it must be at most 65536"),
        (TrainSettings, {"seed": 2**31}, "--seed is 2147483648; it must be at most 2147483647"),
        (TrainSettings, {"steps": 10**5000}, "--steps is a number of too many digits; it must be at most 2147483647"),
        (TrainSettings, {"lr": float("inf")}, "--lr is inf; it must be at least 0"),
        (TrainSettings, {"lr": float("nan")}, "--lr is nan; it must be at least 0"),
        (TokenizeSettings, {"tokenizer": "vq", "batch": 10**9}, "--batch is 1000000000; it must be at most 65536"),
        (TrainTokenizerSettings, {"image_size": 10**9}, "--image-size is 1000000000; it must be at most 65536"),
    ],
)
def test_extreme_numbers_are_refused_with_the_bound(settings: type[Any], values: dict[str, Any], says: str) -> None:
    with pytest.raises(StageError, match=says):
        settings(**values)


def test_run_time_settings_do_not_enter_the_identity_and_all_others_do() -> None:
    settings = TrainSettings()
    assert identity(TrainSettings(device="cpu", micro_batch=2, attention="sdpa", keep=5)) == identity(settings)
    assert run_time_fields(settings) == set(dataclasses.asdict(settings)) - set(identity(settings))
    for change in ({"lr": 2e-4}, {"batch": 128}, {"dropout": 0.0}, {"model": "dpar-l"}, {"precision": "fp32"}):
        assert identity(TrainSettings(**change)) != identity(settings)
