"""The stages on a pretended GPU: no operation mixes devices."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpar import PatchLayout
from pipeline.evaluate import evaluate
from pipeline.patchify import patchify
from pipeline.sample import sample_pictures
from pipeline.settings.artifacts import PatchifySettings, TokenizeSettings
from pipeline.settings.sampling import EvalSettings, SampleSettings
from pipeline.settings.training import TrainSettings
from pipeline.tokenize import tokenize
from pipeline.train import train
from shards.reader import open_artifact
from tests.cuda.shadow import shadow_cuda
from tests.pipeline.sampled import QUIET, RULE, SIZE, save_home, save_run
from tests.pipeline.trained import metrics

GPU: dict[str, Any] = {"device": "cuda", "precision": "bf16"}
MODELS = ("dpar-tiny", "llamagen-tiny")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("made")
    save_home(home, ("bird", "cat"), a_class=3)
    for model in MODELS:
        save_run(home / model, home / "patches", model)
    return home


def test_tokenize_mixes_no_devices_and_equals_the_cpu(home: Path, tmp_path: Path) -> None:
    settings = TokenizeSettings(
        tokenizer=str(home / "vq"), image_size=SIZE, shard_size=4, device="cuda", precision="fp32"
    )
    with shadow_cuda() as counts:
        tokenize(str(home / "photos"), tmp_path / "codes", settings, QUIET)
    assert counts.kernels
    codes = [
        open_artifact(folder).gather(np.arange(6), np.zeros(6, int)) for folder in (tmp_path / "codes", home / "codes")
    ]
    np.testing.assert_array_equal(codes[0].codes, codes[1].codes)


def test_patchify_mixes_no_devices(home: Path, tmp_path: Path) -> None:
    with shadow_cuda() as counts:
        settings = PatchifySettings(entropy_model=str(home / "entropy"), **RULE, **GPU)
        patchify(home / "codes", tmp_path / "patches", settings, QUIET)
    assert counts.kernels


@pytest.mark.parametrize("model", MODELS)
def test_training_mixes_no_devices(home: Path, tmp_path: Path, model: str) -> None:
    settings = TrainSettings(model=model, batch=2, steps=2, log_every=1, ema=0.9, **GPU)
    with shadow_cuda() as counts:
        train(home / "patches", tmp_path / "run", settings, QUIET)
    assert counts.kernels
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2]


@pytest.mark.parametrize("model", MODELS)
def test_a_training_step_waits_only_for_the_result_of_the_step_before(home: Path, tmp_path: Path, model: str) -> None:
    def waits(steps: int) -> Counter[str]:
        rarely: dict[str, Any] = {"log_every": 100, "eval_every": 100, "checkpoint_every": 100, "sheet": 0}
        settings = TrainSettings(model=model, batch=2, steps=steps, **rarely, **GPU)
        with shadow_cuda() as counts:
            train(home / "patches", tmp_path / f"{steps} steps", settings, QUIET)
        return counts.waits

    more = waits(7) - waits(3)
    assert sum(more.values()) == 4
    assert all("step_results.py" in place for place in more)


def test_layouts_are_computed_and_pinned_in_the_background_of_training(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_main_thread: list[bool] = []

    class Recorded(PatchLayout):
        def pin_memory(self) -> PatchLayout:
            in_main_thread.append(threading.current_thread() is threading.main_thread())
            return super().pin_memory()

    monkeypatch.setattr("pipeline.training.micro_batches.PatchLayout", Recorded)
    settings = TrainSettings(model="dpar-tiny", batch=2, steps=3, sheet=0, **GPU)
    with shadow_cuda():
        train(home / "patches", tmp_path / "run", settings, QUIET)
    assert in_main_thread == [False] * 3


@pytest.mark.parametrize("model", MODELS)
def test_sampling_mixes_no_devices(home: Path, tmp_path: Path, model: str) -> None:
    with shadow_cuda() as counts:
        sample_pictures(home / model, tmp_path / "out", SampleSettings(per_class=1, batch=2, **GPU), QUIET)
    assert counts.kernels


def test_evaluation_mixes_no_devices(home: Path, tmp_path: Path) -> None:
    settings = EvalSettings(reference=home / "patches", samples=4, batch=2, cfg_scale=(1.0, 2.0), **GPU)
    with shadow_cuda() as counts:
        evaluate(home / "dpar-tiny", tmp_path / "out", settings, QUIET)
    assert counts.kernels
