"""Comparable scores of `dpar eval`: intervals, records of the measurement, the protocol, sFID, FD-DINOv2."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpar.tokenizer import VQTokenizer
from pipeline.evaluate import evaluate
from pipeline.generation.generator import decode
from pipeline.runtime.errors import StageError
from pipeline.scoring.dinov2 import DinoFeatures
from pipeline.scoring.features import InceptionFeatures, Statistics, frechet_distance
from pipeline.scoring.records import Results
from pipeline.settings.sampling import EvalSettings
from shards.errors import ArtifactError
from shards.reader import open_artifact
from tests.pipeline.sampled import CPU, QUIET, SIDE, SIZE, save_dino, save_home, save_inception, save_run

DISTANCE = "tokenizer Fréchet distance"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("made")
    save_home(home, ("bird", "cat"), a_class=6)
    save_run(home / "run", home / "patches", "dpar-tiny", std=0.05)
    return home


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inception(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino"))


def run(home: Path, out: Path, model: str = "run", **values: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"reference": home / "patches", "cfg_scale": (1.5,), "samples": 12}
    return evaluate(home / model, out, EvalSettings(**{**defaults, **CPU, **values}), QUIET).to_json()


def sampled_pixels(home: Path, scores: Path, samples: int) -> np.ndarray:
    rows = np.arange(samples)
    codes = open_artifact(scores / "cells" / "cfg-1.5" / "codes").gather(rows, np.zeros_like(rows)).codes
    return decode(VQTokenizer.from_pretrained(home / "vq"), codes, (SIDE, SIDE))


def test_bits_and_distances_have_intervals_in_json_csv_and_markdown(home: Path, tmp_path: Path) -> None:
    found = run(home, tmp_path / "scores", seed=3, bootstrap=50)
    (cell,) = found["cells"]
    for values, name in (
        (found, "bits_per_token"),
        (found, "tokenizer reconstruction distance"),
        (cell, "bits_per_token"),
        (cell, DISTANCE),
        (cell, "tokenizer KID"),
    ):
        interval = values[f"{name}_interval"]
        assert interval["low"] <= values[name] <= interval["high"], name
        assert interval["low"] < interval["high"], name
        assert (interval["level"], interval["resamples"], interval["seed"]) == (0.95, 50, 3)
    table = (tmp_path / "scores/results.md").read_text()
    interval = cell[f"{DISTANCE}_interval"]
    assert f"| {cell[DISTANCE]:.3f} ({interval['low']:.3f} to {interval['high']:.3f}) |" in table
    assert "95% confidence intervals by a bootstrap over images, 50 resamples of bits per token and 50" in table
    with open(tmp_path / "scores/results.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row[f"{DISTANCE}_interval_high"]) == interval["high"]


def test_without_a_bootstrap_scores_are_the_same_and_have_no_intervals(home: Path, tmp_path: Path) -> None:
    with_intervals = run(home, tmp_path / "with")
    without = run(home, tmp_path / "without", bootstrap=0)
    assert without["bits_per_token"] == with_intervals["bits_per_token"]
    assert without["cells"][0][DISTANCE] == with_intervals["cells"][0][DISTANCE]
    assert without["bits_per_token_interval"] is None
    assert f"{DISTANCE}_interval" not in without["cells"][0]
    assert "In brackets" not in (tmp_path / "without/results.md").read_text()


def test_every_score_records_how_it_was_measured(home: Path, tmp_path: Path) -> None:
    found = run(home, tmp_path / "scores", labels="balanced")
    measures = {measure["score"]: measure for measure in found["measures"]}
    assert set(measures) == {DISTANCE, "tokenizer KID", "tokenizer_precision", "tokenizer_recall"}
    assert set(measures) < set(found["cells"][0])
    expected = {
        "reference_images": 12,
        "samples": 12,
        "labels": "balanced",
        "resize": "none",
        "decode_precision": "fp32",
    }
    for measure in measures.values():
        assert expected.items() <= measure.items()
        assert str(home / "patches") in measure["reference"]
        assert measure["weights"] == found["identity"]["features_of"]["tokenizer"]
    table = (tmp_path / "scores/results.md").read_text()
    assert "How each score was measured" in table
    assert f"| {DISTANCE} | the tokenizer's encoder" in table
    assert Results.read(tmp_path / "scores/results.json").to_json() == found


@pytest.mark.slow
def test_sfid_is_the_distance_on_seven_channels_of_the_layer_that_adm_reads(
    home: Path, tmp_path: Path, inception: Path
) -> None:
    values: dict[str, Any] = {"features": "inception", "inception_weights": inception, "bootstrap": 0}
    saved = tmp_path / "statistics.npz"
    found = run(home, tmp_path / "scores", save_reference=saved, **values)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    model = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(inception))
    maps: list[torch.Tensor] = []
    model.Mixed_6c.register_forward_hook(lambda module, inputs, output: maps.append(output))
    pixels = sampled_pixels(home, tmp_path / "scores", 12)
    with torch.no_grad():
        model(torch.from_numpy(pixels).movedim(-1, 1))
        spatial = model.Mixed_6d.branch1x1(maps[0])[:, :7]  # (n, 7, 17, 17)
    expected = spatial.permute(0, 2, 3, 1).reshape(12, -1).numpy()
    extract = InceptionFeatures(inception, torch.device("cpu"))
    np.testing.assert_allclose(extract(pixels)["spatial"], expected, rtol=1e-4, atol=1e-5)
    with np.load(saved) as file:
        reference = Statistics(file["mu_s"], file["sigma_s"], None)
    assert reference.mu.shape == (2023,)
    cell = found["cells"][0]
    assert cell["sFID"] == pytest.approx(frechet_distance(Statistics.of(expected), reference), rel=1e-3)
    again = run(home, tmp_path / "again", reference=saved, held_out=home / "patches", **values)["cells"][0]
    assert again["sFID"] == pytest.approx(cell["sFID"], rel=1e-6)
    assert again["FID"] == pytest.approx(cell["FID"], rel=1e-6)
    measures = {measure["score"]: measure for measure in found["measures"]}
    assert set(measures) == {"FID", "sFID", "KID", "precision", "recall", "inception_score"}
    assert measures["inception_score"]["reference"] is None


def test_dinov2_is_scored_in_addition_to_features(home: Path, tmp_path: Path, dino: Path) -> None:
    found = run(home, tmp_path / "scores", dinov2_weights=dino, bootstrap=0)
    (cell,) = found["cells"]
    assert cell["distance"] == DISTANCE
    extract = DinoFeatures(dino, torch.device("cpu"))
    samples = extract(sampled_pixels(home, tmp_path / "scores", 12))["pool"]
    with np.load(tmp_path / "scores/reference-dinov2.npz") as file:
        reference = Statistics(file["mu"], file["sigma"], None)
    expected = frechet_distance(Statistics.of(samples), reference)
    assert cell["also"]["dinov2"]["FD-DINOv2"] == pytest.approx(expected, rel=1e-4)
    table = (tmp_path / "scores/results.md").read_text()
    assert f"| {expected:.3f} |" in table
    assert "| FD-DINOv2 | DINOv2 ViT-small/14 |" in table
    assert Results.read(tmp_path / "scores/results.json").to_json() == found
    with open(tmp_path / "scores/results.csv", encoding="utf-8", newline="") as file:
        assert "KID-DINOv2" in next(csv.reader(file))


def test_networks_without_stored_statistics_use_the_images(home: Path, tmp_path: Path, dino: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (11, SIZE, SIZE, 3), np.uint8)
    record = np.array(json.dumps({"features": "tokenizer", "images": 5000}))
    np.savez(tmp_path / "both.npz", images, mu=np.zeros(64), sigma=np.eye(64), provenance=record)
    found = run(home, tmp_path / "scores", reference=tmp_path / "both.npz", dinov2_weights=dino)
    measures = {measure["score"]: measure for measure in found["measures"]}
    assert measures[DISTANCE]["reference_images"] == 5000
    assert measures[DISTANCE]["reference"] == f"statistics stored in {tmp_path / 'both.npz'}"
    assert measures["tokenizer KID"]["reference_images"] == 11
    assert measures["FD-DINOv2"]["reference_images"] == 11


@pytest.mark.parametrize("how", ["missing", "other", "registers"])
def test_a_file_that_is_not_dinov2_is_one_message(home: Path, tmp_path: Path, how: str) -> None:
    pytest.importorskip("timm")
    path = tmp_path / "weights.pth"
    if how != "missing":
        tensors = {"cls_token": torch.zeros(1, 1, 384)} | (
            {"register_tokens": torch.zeros(1)} if how != "other" else {}
        )
        torch.save(tensors, path)
    with pytest.raises(StageError, match=r"--dinov2-weights .*weights\.pth cannot be used"):
        run(home, tmp_path / "scores", dinov2_weights=path)
    assert not (tmp_path / "scores").exists()


def test_samples_stand_above_their_nearest_training_images(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "scores", samples=20)
    pairs = json.loads((tmp_path / "scores/cells/cfg-1.5/nearest.json").read_text())
    assert len(pairs) == 16
    training = open_artifact(home / "patches")
    assert {pair["nearest"] for pair in pairs} <= set(training.keys(np.arange(12)))
    assert (tmp_path / "scores/cells/cfg-1.5/nearest.png").is_file()


def test_a_missing_training_artifact_is_a_message_and_no_sheet(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "run", tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    record["inputs"]["data"] = str(tmp_path / "gone")
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    settings = EvalSettings(reference=home / "patches", cfg_scale=(1.5,), samples=4, **CPU)
    evaluate(tmp_path / "run", tmp_path / "scores", settings)
    assert "no sheet of nearest training images" in capsys.readouterr().err
    assert not (tmp_path / "scores/cells/cfg-1.5/nearest.png").exists()
    with pytest.raises(ArtifactError, match="gone"):
        run(home, tmp_path / "more", training=tmp_path / "gone")
    assert not (tmp_path / "more").exists()


def test_the_papers_protocol_sets_missing_options_and_lists_deviations(
    home: Path, tmp_path: Path, inception: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = EvalSettings(reference=Path("r"), protocol="paper")
    assert (paper.samples, paper.features, paper.labels, paper.decode_precision) == (
        50_000,
        "inception",
        "random",
        "fp32",
    )
    assert (EvalSettings(reference=Path("r")).samples, EvalSettings(reference=Path("r")).features) == (
        1000,
        "tokenizer",
    )
    given: dict[str, Any] = {"samples": 4, "labels": "balanced", "features": "tokenizer", "threshold": (3.0,)}
    settings = EvalSettings(reference=home / "patches", cfg_scale=(1.5,), protocol="paper", **given, **CPU)
    found = evaluate(home / "run", tmp_path / "scores", settings)
    shown = capsys.readouterr().err.replace("\n", " ")
    for start in (
        "--samples is 4; the paper's is 50000",
        "--labels is balanced; the paper's is random",
        "--features is tokenizer; the paper's is inception",
        "--threshold changes the patches",
        "--reference",
        "the model has 2 classes",
        "images have 8 px",
    ):
        (line,) = (line for line in found.deviations if line.startswith(start))
        assert f"- {line}\n" in (tmp_path / "scores/results.md").read_text()
        assert start in shown
    assert len(found.deviations) == 7
    assert found.to_json()["protocol"] == "paper"
