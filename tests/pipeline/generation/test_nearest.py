"""The nearest training image of a sample."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpar.tokenizer import VQTokenizer
from pipeline.generation.generator import Generator
from pipeline.generation.nearest import find_nearest, open_training
from pipeline.runtime.errors import StageError
from pipeline.settings.artifacts import TokenizeSettings
from pipeline.settings.sampling import SampleSettings
from pipeline.tokenize import tokenize
from shards.reader import open_artifact
from tests.pipeline.sample_runs import run, save_runs
from tests.pipeline.sampled import CPU, QUIET, SIZE, N, V

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("made"))


def test_the_nearest_training_image_of_a_copy_is_its_original(home: Path) -> None:
    generator = Generator.load(home / "dpar", SampleSettings(**CPU))
    training = open_training(home / "patches", generator, "--show-nearest")
    rows = np.array([3, 0])
    copied = training.gather(rows, np.zeros_like(rows)).codes
    altered = copied.copy()
    altered[1, 5] = (altered[1, 5] + 1) % V
    nearest = find_nearest(altered, training, generator.tokenizer)
    assert nearest.rows.tolist() == rows.tolist()
    assert nearest.keys == training.keys(rows)
    assert nearest.distance[0] == pytest.approx(0, abs=1e-3)
    vectors = generator.tokenizer.quantize.vectors()
    moved = (vectors[int(altered[1, 5])] - vectors[int(copied[1, 5])]).square().sum().item()
    assert nearest.distance[1] == pytest.approx((moved / N) ** 0.5, abs=1e-3)


def test_samples_and_their_nearest_training_images_are_written(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "out", show_nearest=home / "patches")
    listed = json.loads((tmp_path / "out" / "nearest.json").read_text(encoding="utf-8"))
    assert [entry["sample"] for entry in listed] == [f"{i:06d}" for i in range(6)]
    artifact = open_artifact(home / "patches")
    assert {entry["nearest"] for entry in listed} <= set(artifact.keys(np.arange(len(artifact))))
    assert Image.open(tmp_path / "out" / "nearest.png").width > 6 * 128


def test_nearest_images_of_another_tokenizer_are_refused(home: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    VQTokenizer(VQTokenizer.from_pretrained(home / "vq").config).save_pretrained(tmp_path / "vq")
    settings = TokenizeSettings(tokenizer=str(tmp_path / "vq"), image_size=SIZE, **CPU)
    tokenize(str(home / "photos"), tmp_path / "codes", settings, QUIET)
    with pytest.raises(StageError, match="Name the artifact that the model was trained on"):
        run(home, tmp_path / "out", show_nearest=tmp_path / "codes")
    assert not (tmp_path / "out").exists()
