import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.evaluate import evaluate
from pipeline.inspect import inspect
from pipeline.patchify import patchify
from pipeline.runtime.progress import Progress
from pipeline.runtime.threshold_warning import warn_if_out_of_reach
from pipeline.sample import sample_pictures
from pipeline.settings.artifacts import InspectSettings, PatchifySettings
from pipeline.settings.sampling import EvalSettings, SampleSettings
from tests.pipeline.sampled import CPU, V, save_home, save_run

HIGH = 50.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("made")
    save_home(home, ("bird", "fish"), a_class=2)
    save_run(home / "dpar", home / "patches", "dpar-tiny")
    return home


def said(command: Callable[[Progress], object]) -> str:
    file = io.StringIO()
    command(Progress(Console(file=file, width=1000), quiet=False))
    return file.getvalue()


@pytest.mark.parametrize("command", ["patchify", "inspect", "sample", "eval"])
def test_a_threshold_above_ln_v_warns(home: Path, tmp_path: Path, command: str) -> None:
    patches, run, out = home / "patches", home / "dpar", tmp_path / "out"

    def call(progress: Progress) -> object:
        if command == "patchify":
            return patchify(patches, out, PatchifySettings(threshold=HIGH, **CPU), progress)
        if command == "inspect":
            return inspect(patches, None, InspectSettings(threshold=(HIGH,), device="cpu"), progress)
        if command == "sample":
            return sample_pictures(run, out, SampleSettings(threshold=HIGH, per_class=1, **CPU), progress)
        settings = EvalSettings(reference=patches, samples=2, cfg_scale=(1.0,), threshold=(HIGH,), **CPU)
        return evaluate(run, out, settings, progress)

    assert f"Warning: the threshold of 50 nats is above ln V = {math.log(V):.2f}" in said(call)


@pytest.mark.parametrize("threshold", [None, 0.0, 7.8, 9.7])
def test_a_threshold_that_entropies_can_reach_does_not_warn(threshold: float | None) -> None:
    assert said(lambda progress: warn_if_out_of_reach(threshold, 16384, progress)) == ""


def test_the_published_threshold_warns_for_1024_codes() -> None:
    text = said(lambda progress: warn_if_out_of_reach(7.8, 1024, progress))
    assert "ln V = 6.93" in text
    assert "--target-length" in text
