import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from dpar.tokenizer import VQConfig, VQTokenizer, psnr, to_uint8
from pipeline.inspect import inspect
from pipeline.reports.inspection import tables
from pipeline.runtime.progress import Progress
from pipeline.scoring.reconstruction_sample import SAMPLE, reconstruction_lines, sampled_positions
from pipeline.settings.artifacts import InspectSettings, TokenizeSettings
from pipeline.sources.originals import load_originals
from pipeline.tokenize import tokenize
from shards.manifest import Manifest
from shards.reader import open_artifact

SIZE = 16


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and a folder of 70 images, two of them unusable."""
    home = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (home / "photos" / name).mkdir(parents=True)
        for i in range(35):
            pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(home / "photos" / name / f"{i:02d}.png")
    for broken in ("a/00.png", "b/20.png"):
        (home / "photos" / broken).write_text("not a picture")
    torch.manual_seed(0)
    config = VQConfig(codebook_size=32, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)
    VQTokenizer(config).save_pretrained(home / "vq")
    return home


def run(home: Path, out: Path, said: io.StringIO | None = None, **values: Any) -> Manifest:
    options = {"tokenizer": str(home / "vq"), "image_size": SIZE, "device": "cpu", **values}
    progress = Progress(Console(file=said, width=500), quiet=False) if said is not None else Progress(quiet=True)
    manifest = tokenize(str(home / "photos"), out, TokenizeSettings(**options), progress)
    assert manifest is not None
    return manifest


def test_the_manifest_holds_the_psnr_of_a_sample_of_the_images(home: Path, tmp_path: Path) -> None:
    manifest = run(home, tmp_path / "codes", views="flip")
    artifact = open_artifact(tmp_path / "codes")
    listed = [f"{name}/{i:02d}.png" for name in ("a", "b") for i in range(35)]
    keys = artifact.keys(np.arange(len(artifact)))
    spread = [listed[i * 70 // SAMPLE] for i in range(SAMPLE)]
    rows = np.array([keys.index(key) for key in spread if key in keys])  # the usable ones
    first = np.zeros_like(rows)
    decoded = VQTokenizer.from_pretrained(home / "vq").decode(
        torch.from_numpy(artifact.gather(rows, first).codes.astype(np.int64))
    )
    originals = torch.from_numpy(load_originals(manifest, artifact.keys(rows), first))
    values = psnr(to_uint8(decoded.detach()), originals)
    found = manifest.statistics["reconstruction"]
    assert 0 < found["images"] == len(rows) < SAMPLE
    assert found["psnr"] == pytest.approx(values.mean().item(), abs=0.01)
    assert found["lowest_psnr"] == pytest.approx(values.min().item(), abs=0.01)


def test_the_psnr_does_not_depend_on_the_shards(home: Path, tmp_path: Path) -> None:
    whole, parts = (run(home, tmp_path / f"{size}", shard_size=size) for size in (100, 7))
    assert parts.statistics == whole.statistics
    assert run(home, tmp_path / "7", shard_size=7) == parts


@given(n_items=st.integers(1, 400), shard_size=st.integers(1, 90))
def test_the_sample_is_spread_evenly_and_does_not_depend_on_the_shards(n_items: int, shard_size: int) -> None:
    n_shards = -(-n_items // shard_size)
    positions = [
        index * shard_size + position
        for index in range(n_shards)
        for position in sampled_positions(index, n_shards=n_shards, shard_size=shard_size, n_items=n_items)
    ]
    assert positions == sampled_positions(0, n_shards=1, shard_size=n_items, n_items=n_items)
    assert len(positions) == min(n_items, SAMPLE)
    gaps = np.diff([*positions, n_items])
    assert gaps.max() - gaps.min() <= 1


@given(n_shards=st.integers(1, 300))
def test_a_stream_is_measured_on_the_first_images_of_evenly_spread_shards(n_shards: int) -> None:
    counts = [sampled_positions(index, n_shards=n_shards, shard_size=1, n_items=None) for index in range(n_shards)]
    assert sum(map(len, counts)) == SAMPLE
    assert all(positions == list(range(len(positions))) for positions in counts)
    assert max(map(len, counts)) - min(map(len, counts)) <= 1


def test_poor_reconstructions_warn_with_the_command_that_trains_a_tokenizer(home: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    manifest = run(home, tmp_path / "codes", said, classes=("a",))
    assert manifest.statistics["reconstruction"]["psnr"] < 20
    assert "reconstruction: " in said.getvalue()
    command = f"dpar train-tokenizer {home / 'photos'} vq --image-size {SIZE} --classes a"
    assert command in said.getvalue()
    again = io.StringIO()
    run(home, tmp_path / "codes", again, classes=("a",))
    assert command in again.getvalue()


def test_inspect_shows_the_figures(home: Path, tmp_path: Path) -> None:
    manifest = run(home, tmp_path / "codes", limit=4)
    found = inspect(tmp_path / "codes", None, InspectSettings(device="cpu"), Progress(quiet=True))
    assert found.reconstruction == manifest.statistics["reconstruction"]
    assert any("dB PSNR" in cell for table in tables(found) for row in table.rows for cell in row)


def test_good_reconstructions_do_not_warn(home: Path, tmp_path: Path) -> None:
    manifest = run(home, tmp_path / "codes")
    good = {"reconstruction": {"images": 64, "psnr": 26.5, "lowest_psnr": 19.0}}
    lines = reconstruction_lines(dataclasses.replace(manifest, statistics=good))
    assert lines == ["reconstruction: 26.5 dB PSNR, mean of 64 images, lowest 19.0"]
    assert reconstruction_lines(dataclasses.replace(manifest, statistics={})) == []
