"""The cost per image and the sheets of samples that ``dpar train`` reports."""

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dpar import VQConfig, VQTokenizer
from dpar.flops import count
from dpar.presets import preset
from pipeline.patchify import patchify
from pipeline.reports.pictures import LINE_PX
from pipeline.runtime.progress import Progress
from pipeline.settings.artifacts import PatchifySettings, TokenizeSettings
from pipeline.settings.training import EntropySettings, TrainSettings
from pipeline.tokenize import tokenize
from pipeline.train import train, train_entropy
from pipeline.training import loop
from shards.order import TrainingOrder
from shards.reader import open_artifact

QUIET = Progress(quiet=True)
CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
RECIPE: dict[str, Any] = {"steps": 5, "batch": 3, "log_every": 50, "checkpoint_every": 2, **CPU}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    for name in ("bird", "cat"):
        (home / "photos" / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).save(home / "photos" / name / f"{i}.png")
    config = VQConfig(codebook_size=32, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)
    VQTokenizer(config).save_pretrained(home / "vq")
    settings = TokenizeSettings(tokenizer=str(home / "vq"), image_size=8, views="flip", **CPU)
    tokenize(str(home / "photos"), home / "codes", settings, QUIET)
    train_entropy(home / "codes", home / "entropy", EntropySettings(model="llamagen-tiny", lr=1e-2, **RECIPE), QUIET)
    patchify(
        home / "codes",
        home / "patches",
        PatchifySettings(entropy_model=str(home / "entropy"), target_length=1.7, row_reset=False, **CPU),
        QUIET,
    )
    return home / "patches"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measured(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "training_gflops_per_image" in line]


def mean_patches(patches: Path, steps: int) -> float:
    artifact = open_artifact(patches)
    order = TrainingOrder(rows=len(artifact), views=2, batch=3, seed=0)
    counts = []
    for step in range(steps):
        starts = artifact.gather(*order.batch(step)).starts
        assert starts is not None
        counts += starts.sum(axis=1).tolist()
    assert len(set(counts)) > 1  # images differ
    return float(np.mean(counts))


def test_the_mean_cost_is_computed_from_the_patches_of_the_steps(patches: Path, tmp_path: Path) -> None:
    result = train(patches, tmp_path / "run", TrainSettings(model="dpar-tiny", **RECIPE), QUIET)
    (line,) = measured(tmp_path / "run")
    mean = mean_patches(patches, 5)
    assert (line["step"], line["measured_steps"]) == (5, 5)
    assert line["measured_patches_per_image"] == pytest.approx(mean)
    config = preset("dpar-tiny", codebook_size=32, grid_height=4, grid_width=4, classes=2)
    counted = count(config, 16 / mean)
    assert counted.patches == pytest.approx(mean, abs=0.006)  # it counts hundredths of a patch
    assert line["training_gflops_per_image"] == pytest.approx(6 * counted.linear / 1e9, rel=1e-3)
    assert result["training_gflops_per_image"] == line["training_gflops_per_image"]


def test_the_mean_cost_is_right_for_a_resumed_run(patches: Path, tmp_path: Path) -> None:
    settings = TrainSettings(model="dpar-tiny", **RECIPE)
    train(patches, tmp_path, settings, QUIET)
    (whole,) = measured(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000005")  # as after a kill before it
    train(patches, tmp_path, settings, QUIET)
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step-00000004", "step-00000005"]
    (again,) = measured(tmp_path)
    fields = ("step", "measured_steps", "measured_patches_per_image", "training_gflops_per_image")
    assert [again[name] for name in fields] == [whole[name] for name in fields]


def test_a_longer_run_prints_the_cost_once_after_the_first_steps(
    patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MEASURED_STEPS", 3)
    train(patches, tmp_path / "run", TrainSettings(model="dpar-tiny", **RECIPE), QUIET)
    (line,) = measured(tmp_path / "run")
    assert line["step"] == 3
    assert line["measured_patches_per_image"] == pytest.approx(mean_patches(patches, 3))


def test_llamagen_costs_its_tokens_and_the_entropy_model_prints_no_cost(patches: Path, tmp_path: Path) -> None:
    train(patches, tmp_path / "run", TrainSettings(model="llamagen-tiny", **RECIPE), QUIET)
    (line,) = measured(tmp_path / "run")
    config = preset("llamagen-tiny", codebook_size=32, grid_height=4, grid_width=4, classes=2)
    assert line["measured_patches_per_image"] == 16
    assert line["training_gflops_per_image"] == pytest.approx(6 * count(config).linear / 1e9, rel=1e-9)
    assert not measured(patches.parent / "entropy")


@pytest.mark.parametrize("model", ["dpar-tiny", "llamagen-tiny"])
def test_each_validation_draws_a_sheet_of_the_requested_samples(patches: Path, tmp_path: Path, model: str) -> None:
    train(patches, tmp_path / "a", TrainSettings(model=model, eval_every=3, sheet=2, ema=0.5, **RECIPE), QUIET)
    names = ["step-00000003.png", "step-00000005.png"]
    assert sorted(path.name for path in (tmp_path / "a" / "sheets").iterdir()) == names
    train(patches, tmp_path / "b", TrainSettings(model=model, eval_every=3, sheet=10, ema=0.5, **RECIPE), QUIET)
    two, ten = (Image.open(tmp_path / run / "sheets" / names[0]).size for run in ("a", "b"))
    assert ten[0] > 3 * two[0]
    assert ten[1] > 1.5 * two[1]  # eight a row
    assert two[1] == 12 + 256 + LINE_PX + 12  # each with the name of its class below
    one, other = ((tmp_path / run / "model-ema" / "model.safetensors").read_bytes() for run in ("a", "b"))
    assert one == other  # drawing changes nothing


def test_a_missing_tokenizer_is_reported_once_and_training_continues(patches: Path, tmp_path: Path) -> None:
    shutil.copytree(patches, tmp_path / "patches")
    manifest = json.loads((tmp_path / "patches" / "manifest.json").read_text())
    manifest["tokenizer"]["path"] = str(tmp_path / "gone")
    (tmp_path / "patches" / "manifest.json").write_text(json.dumps(manifest))
    said = StringIO()
    settings = TrainSettings(model="dpar-tiny", eval_every=1, **RECIPE)
    train(tmp_path / "patches", tmp_path / "run", settings, Progress(Console(file=said, width=500), quiet=False))
    assert said.getvalue().count("sample sheets are not drawn: no model at") == 1
    assert not (tmp_path / "run" / "sheets").exists()
    assert metrics(tmp_path / "run")[-1]["step"] == 5
