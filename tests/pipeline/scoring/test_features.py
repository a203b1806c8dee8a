"""Features of images, and the distances and scores computed from them."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpar.tokenizer import VQTokenizer
from pipeline.evaluate import evaluate
from pipeline.generation.generator import decode
from pipeline.runtime.errors import StageError
from pipeline.scoring.features import (
    InceptionFeatures,
    Statistics,
    TokenizerFeatures,
    frechet_distance,
    inception_score,
    precision_recall,
)
from pipeline.settings.sampling import EvalSettings
from shards.reader import open_artifact
from tests.pipeline.evaluated import run, save_runs, write_images
from tests.pipeline.sampled import CPU, SIDE, SIZE, N, V, save_inception

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inception(tmp_path_factory.mktemp("inception"))


def features(seed: int, n: int = 400, d: int = 48) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found: np.ndarray = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    return found


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(Statistics.of(a), Statistics.of(b))


def test_the_distance_is_zero_for_equal_sets_and_the_square_of_a_shift() -> None:
    a = features(0)
    assert distance(a, a) == pytest.approx(0, abs=1e-6)
    assert distance(a, a[::-1]) == pytest.approx(0, abs=1e-6)
    assert distance(a, a + 3.0) == pytest.approx(9 * a.shape[1], rel=1e-9)


@pytest.mark.parametrize("d", [1, 48])
def test_the_distance_equals_torch_fidelitys(d: int) -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = features(0, d=d), features(1, n=300, d=d)
    statistics = [{"mu": x.mean(axis=0), "sigma": np.atleast_2d(np.cov(x, rowvar=False))} for x in (a, b)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    assert distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert distance(a, b) > 0.1


def test_the_distance_equals_that_of_the_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    a, b = features(2), features(3)
    one, other = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_features_of_the_tokenizer_do_not_depend_on_the_batch_size(home: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3)).astype(np.uint8)
    tokenizer = VQTokenizer.from_pretrained(home / "vq")
    one, other = (TokenizerFeatures(tokenizer, "", batch)(pixels)["pool"] for batch in (2, 5))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_larger_samples_are_resized_to_256_px_as_in_llamagens_script(home: Path, inception: Path) -> None:
    tokenizer = VQTokenizer.from_pretrained(home / "vq")
    codes = np.random.default_rng(0).integers(0, V, (2, N))
    with torch.no_grad():
        images = tokenizer.decode(torch.from_numpy(codes), (SIDE, SIDE))
    images = torch.nn.functional.interpolate(images, size=(6, 6), mode="bicubic")
    expected = torch.clamp(127.5 * images + 128.0, 0, 255).to(torch.uint8).movedim(1, -1).numpy()
    np.testing.assert_array_equal(decode(tokenizer, codes, (SIDE, SIDE), size=6), expected)
    extract = InceptionFeatures(inception, torch.device("cpu"))
    assert [extract.side(side) for side in (128, 256, 384)] == [128, 256, 256]


@pytest.mark.slow
def test_the_four_scores_are_torch_fidelitys_own_on_the_same_folders_and_weights(
    home: Path, tmp_path: Path, inception: Path
) -> None:
    torch_fidelity = pytest.importorskip("torch_fidelity")
    reference = write_images(tmp_path / "reference", 0, 9, brightest=160)
    values: dict[str, Any] = {"features": "inception", "inception_weights": inception}
    found = run(home, tmp_path / "scores", reference=reference, samples=12, shard_size=5, **values)
    drawn = open_artifact(tmp_path / "scores" / "cells" / "cfg-1.5" / "codes")
    tokenizer = VQTokenizer.from_pretrained(home / "vq")
    pixels = decode(tokenizer, drawn.gather(np.arange(12), np.zeros(12, np.int64)).codes, (SIDE, SIDE))
    (tmp_path / "samples").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "samples" / f"{i:03d}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "samples"),
        input2=str(reference),
        cuda=False,
        fid=True,
        isc=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        cache=False,
        verbose=False,
        save_cpu_ram=True,  # no worker processes
        feature_extractor_weights_path=str(inception),
    )
    cell = found["cells"][0]
    assert theirs["frechet_inception_distance"] > 0
    assert cell["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert cell["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert cell["inception_score_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-2, abs=1e-6)
    assert (cell["precision"], cell["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]))
    assert cell["reference_images"] == 9


def test_scores_that_need_more_images_are_omitted() -> None:
    pytest.importorskip("torch_fidelity")
    few, more = features(0, n=3).astype(np.float32), features(1, n=9).astype(np.float32)
    assert precision_recall(few, more) is None
    assert inception_score(more) is None
    assert precision_recall(more, more) == (1.0, 1.0)


def test_few_images_give_a_warning_about_bias(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = EvalSettings(reference=home / "patches", cfg_scale=(1.5,), samples=4, **CPU)
    evaluate(home / "dpar-tiny", tmp_path / "scores", settings)
    said = capsys.readouterr().err
    assert said.count("images are few for 64 features") == 1
    assert "10 reference and 4 samples images are few for 64 features" in said
    assert "are not FID" in said


class Trap:
    """Unpickling it without restrictions creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_code_in_a_weights_file_is_refused_not_executed(home: Path, tmp_path: Path, how: str) -> None:
    pytest.importorskip("torch_fidelity")
    held = {"Conv2d_1a_3x3.conv.weight": Trap(tmp_path / "sprung")}
    weights = tmp_path / "inception.pth"
    if how == "torch":
        torch.save(held, weights)
    else:
        weights.write_bytes(pickle.dumps(held, protocol=2))
    with pytest.raises(StageError, match=f"Inception's weights are unavailable in {weights}"):
        run(home, tmp_path / "scores", features="inception", inception_weights=weights)
    assert not (tmp_path / "sprung").exists()


def test_invalid_inception_weights_are_one_message(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("other.pth", "missing.pth"):
        with pytest.raises(StageError, match=f"are unavailable in {tmp_path / name}"):
            InceptionFeatures(tmp_path / name, torch.device("cpu"))
