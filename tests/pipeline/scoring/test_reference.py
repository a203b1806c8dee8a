"""The images or statistics that samples are compared with."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dpar
from dpar.tokenizer import VQTokenizer
from pipeline.runtime.errors import StageError
from pipeline.scoring.features import Statistics, TokenizerFeatures
from pipeline.settings.artifacts import TokenizeSettings
from pipeline.settings.sampling import EvalSettings
from pipeline.tokenize import tokenize
from tests.pipeline.evaluated import CLASSES, TOKENIZER_DISTANCE, run, save_runs, write_images
from tests.pipeline.sampled import CPU, QUIET, SIZE, VQ, save_patches, save_photos, save_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("made"))


def test_a_folder_an_npz_its_statistics_and_saved_ones_are_the_same_reference(home: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "folder", 3, 8)
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    np.savez(tmp_path / "images.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", images)
    extract = TokenizerFeatures(VQTokenizer.from_pretrained(home / "vq"), "")
    held = Statistics.of(extract(images)["pool"])
    record = np.array(json.dumps({"features": "tokenizer", "images": 8}))
    np.savez(tmp_path / "statistics.npz", mu=held.mu, sigma=held.sigma, provenance=record)
    np.savez(tmp_path / "both.npz", images, mu=held.mu, sigma=held.sigma, provenance=record)
    saved: dict[str, Any] = {"save_reference": tmp_path / "saved.npz"}
    values: dict[str, Any] = {"held_out": home / "patches", "samples": 6}
    found = {}
    for name in ("folder", "images.npz", "packed.npz", "statistics.npz", "both.npz", "saved.npz"):
        more = saved if name == "folder" else {}
        found[name] = run(home, tmp_path / f"of-{name}", reference=tmp_path / name, **values, **more)["cells"][0]
    expected = found["folder"]
    assert expected["reference_images"] == 8
    for name, cell in found.items():
        assert cell[TOKENIZER_DISTANCE] == pytest.approx(expected[TOKENIZER_DISTANCE], rel=1e-5), name
        if name != "statistics.npz":
            assert cell["tokenizer_precision"] == expected["tokenizer_precision"]
            assert cell["tokenizer_recall"] == expected["tokenizer_recall"]
    assert "tokenizer_precision" not in found["statistics.npz"]


def test_a_reference_without_held_out_artifact_gives_no_bits_per_token(home: Path, tmp_path: Path) -> None:
    found = run(home, tmp_path / "scores", reference=write_images(tmp_path / "folder", 3, 8), samples=4)
    assert "bits_per_token" not in found
    assert found["cells"][0]["bits_per_token"] is None
    assert found["cells"][0][TOKENIZER_DISTANCE] > 0


def test_without_originals_there_is_a_likelihood_but_no_distance(home: Path, tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", CLASSES, a_class=2)
    save_patches(home, tmp_path / "photos", tmp_path / "codes", tmp_path / "patches")
    shutil.rmtree(tmp_path / "photos")
    found = run(home, tmp_path / "scores", reference=tmp_path / "patches")
    assert found["originals"] == 0
    assert found["bits_per_token"] > 0
    assert "distance" not in found["cells"][0]
    assert (tmp_path / "scores" / "cells" / "cfg-1.5" / "samples.png").exists()


def test_a_reference_of_one_image_gives_only_bits_per_token(home: Path, tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", CLASSES[:1], a_class=1)
    settings = TokenizeSettings(tokenizer=str(home / "vq"), image_size=SIZE, **CPU)
    tokenize(str(tmp_path / "photos"), tmp_path / "codes", settings, QUIET)
    save_run(tmp_path / "run", tmp_path / "codes", "llamagen-tiny")
    found = run(tmp_path, tmp_path / "bits", "run", reference=tmp_path / "codes", samples=0)
    assert found["held_out_images"] == found["originals"] == 1
    assert "tokenizer reconstruction distance" not in found
    with pytest.raises(StageError, match="codes holds 1 images; a reference needs at least 2"):
        run(tmp_path, tmp_path / "scores", "run", reference=tmp_path / "codes", samples=2)


def test_a_reference_of_another_tokenizer_is_refused_with_both(home: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    VQTokenizer(VQ).save_pretrained(tmp_path / "vq")
    shutil.copytree(home / "entropy", tmp_path / "entropy")
    save_patches(tmp_path, home / "photos", tmp_path / "codes", tmp_path / "patches")
    ours, theirs = (dpar.fingerprint(folder / "vq")[:12] for folder in (home, tmp_path))
    with pytest.raises(StageError, match=f"made with tokenizer {theirs}, the run's training data with {ours}"):
        run(home, tmp_path / "scores", reference=tmp_path / "patches")
    assert not (tmp_path / "scores").exists()


def test_bad_references_are_one_message_before_anything_is_sampled(home: Path, tmp_path: Path) -> None:
    mixed = write_images(tmp_path / "mixed", 0, 3)
    Image.new("RGB", (SIZE, SIZE + 1)).save(mixed / "odd.png")
    grey = write_images(tmp_path / "grey", 0, 2)
    Image.new("L", (SIZE, SIZE)).save(grey / "grey.png")
    np.savez(tmp_path / "grey.npz", np.zeros((4, SIZE, SIZE, 1), np.uint8))
    np.savez(tmp_path / "floats.npz", np.zeros((4, SIZE, SIZE, 3), np.float32))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048), np.float16))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.savez(tmp_path / "objects.npz", mu=np.full(64, None, object), sigma=np.eye(64))
    np.savez(tmp_path / "one.npz", np.zeros((1, SIZE, SIZE, 3), np.uint8))
    mu, sigma, record = np.zeros(64), np.eye(64), np.array(json.dumps({"features": "tokenizer"}))
    skewed = sigma + np.triu(np.full((64, 64), 0.1))
    for name, (a, b) in {
        "nan": (mu * np.nan, sigma),
        "infinite": (mu, sigma + np.inf),
        "complex": (mu + 1j, sigma),
        "dates": (mu.astype("datetime64[s]"), sigma),
        "text": (mu.astype(str), sigma),
        "whole": (mu.astype(int), sigma),
        "objects": (np.full(64, None, object), sigma),
        "shape": (mu, np.eye(63)),
        "flat": (mu[0], sigma),
        "skewed": (mu, skewed),
        "huge": (mu, sigma * 1e200),
        "negative": (mu, -sigma),
    }.items():
        np.savez(tmp_path / f"{name}-statistics.npz", mu=a, sigma=b, provenance=record)
    np.savez(tmp_path / "provenance.npz", mu=mu, sigma=sigma, provenance=np.array('{"images": 1}'))
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    for name, says in {
        "mixed": r"odd.png is 8×9 pixels, .* 8×8; the images of a reference must have the same size",
        "grey": r"grey.png is not in colour \(mode L\)",
        "grey.npz": r"arr_0 is \(4, 8, 8, 1\) uint8; colour images",
        "floats.npz": r"arr_0 is \(4, 8, 8, 3\) float32; colour images",
        "wide.npz": r"statistics of 2048 inception features; --features tokenizer has 64",
        "other.npz": "has weights; a reference needs arr_0, or mu and sigma",
        "objects.npz": "statistics of 64 inception features",
        "one.npz": "holds 1 images; a reference needs at least 2",
        "nan-statistics.npz": "mu holds numbers that are not finite",
        "infinite-statistics.npz": "sigma holds numbers that are not finite",
        "complex-statistics.npz": "mu holds complex128; floating-point numbers are needed",
        "dates-statistics.npz": r"mu holds datetime64\[s\]; floating-point numbers are needed",
        "text-statistics.npz": r"mu holds <U\d+; floating-point numbers are needed",
        "whole-statistics.npz": "mu holds int64; floating-point numbers are needed",
        "objects-statistics.npz": "mu holds object; floating-point numbers are needed",
        "shape-statistics.npz": r"mu is \(64,\) and sigma \(63, 63\)",
        "flat-statistics.npz": r"mu is \(\) and sigma",
        "skewed-statistics.npz": "sigma is not a covariance: it is not symmetric",
        "huge-statistics.npz": "sigma is not a covariance",
        "negative-statistics.npz": "sigma is not a covariance: it has a negative number on its diagonal",
        "provenance.npz": "its provenance is damaged",
        "pipe.npz": "pipe.npz is not a regular file",
        "text.npz": "is not an .npz file",
        "empty": "holds 0 images",
        "gone": "does not exist",
    }.items():
        with pytest.raises(StageError, match=says):
            run(home, tmp_path / "scores", reference=tmp_path / name)
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("name", ["", "saved", "."])
def test_an_invalid_path_to_save_the_reference_is_wrong_usage(name: str) -> None:
    with pytest.raises(StageError, match=r"--save-reference is .*; it must be a file that ends in \.npz"):
        EvalSettings(reference=Path("r"), save_reference=Path(name))
