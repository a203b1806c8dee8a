"""The engines without a cluster; :mod:`tests.pipeline.runtime.test_ray_engine` runs one."""

import sys
from typing import Any

import pytest
import torch

from pipeline.runtime.engine import open_engine
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.runtime.ray_engine import Calls, Models, room
from pipeline.settings.artifacts import TokenizeSettings
from pipeline.settings.fields import identity

QUIET = Progress(quiet=True)
made: list[tuple[Any, ...]] = []


class Weights(torch.nn.Module):
    """A model that records its creation."""

    def __init__(self, name: str, base: "Weights | None" = None) -> None:
        super().__init__()
        self.name, self.base = name, base


def load(name: str) -> Weights:
    made.append(("load", name))
    return Weights(name)


def derive(base: Weights, name: str) -> Weights:
    made.append(("derive", base.name, name))
    return Weights(name, base)


def test_a_worker_loads_a_model_once() -> None:
    calls, models = Calls(), Models()
    model = calls.make(load, "a")
    made.clear()
    functions = [models.loads(calls.dumps(lambda: model)) for _ in range(2)]
    assert made == [("load", "a")]
    assert functions[0]() is functions[1]()
    assert functions[0]() is not model


def test_a_worker_frees_a_model_and_its_derivatives_when_another_replaces_it() -> None:
    calls, models = Calls(), Models()
    first, second = calls.make(load, "a"), calls.make(load, "b")
    derived = calls.make(derive, first, "a+")
    made.clear()
    assert models.loads(calls.dumps(lambda: derived))().base.name == "a"
    assert models.loads(calls.dumps(lambda: second))().name == "b"
    assert made == [("load", "a"), ("derive", "a", "a+"), ("load", "b")]
    assert models.loads(calls.dumps(lambda: derived))().base.name == "a"
    assert made[3:] == [("load", "a"), ("derive", "a", "a+")]


def test_a_model_without_a_recorded_call_is_not_sent() -> None:
    model = Weights("a")
    with pytest.raises(TypeError, match="a Weights cannot be sent to workers"):
        Calls().dumps(lambda: model)


@pytest.mark.parametrize(
    ("resources", "gpus", "workers"),
    [({"GPU": 8.0, "CPU": 96.0}, 1.0, 8), ({"GPU": 1.0}, 0.1, 10), ({"CPU": 4.0}, 0.0, 4), ({"CPU": 4.0}, 1.0, 0)],
)
def test_a_node_has_one_worker_per_gpu_or_per_cpu(resources: dict[str, float], gpus: float, workers: int) -> None:
    assert room(resources, gpus) == workers


def test_without_ray_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(StageError, match=r"--engine ray needs Ray: pip install 'dpar\[ray\]'"),
        open_engine(TokenizeSettings(tokenizer="vq", engine="ray"), QUIET),
    ):
        pass


def test_the_ray_engine_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(StageError, match="run the command without torchrun"),
        open_engine(TokenizeSettings(tokenizer="vq", engine="ray"), QUIET),
    ):
        pass


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"gpus_per_worker": 0.5}, "--gpus-per-worker needs --engine ray"),
        ({"ray_address": "auto"}, "--ray-address needs --engine ray"),
        ({"engine": "ray", "gpus_per_worker": 1.5}, "--gpus-per-worker is 1.5; it must be a whole number"),
        ({"engine": "ray", "ray_workers": 0}, "--ray-workers is 0; it must be at least 1"),
    ],
)
def test_invalid_options_of_ray_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(StageError, match=says):
        TokenizeSettings(tokenizer="vq", **values)


def test_the_engine_is_a_run_time_setting() -> None:
    ray = TokenizeSettings(tokenizer="vq", engine="ray", ray_address="auto", ray_workers=2, gpus_per_worker=0.5)
    assert identity(ray) == identity(TokenizeSettings(tokenizer="vq"))
