import hashlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from rich.console import Console

from dpar.tokenizer import VQConfig, VQTokenizer
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.settings.artifacts import TokenizeSettings
from pipeline.sources import IndexedSource, open_indexed
from pipeline.sources.holdout import split_holdout
from pipeline.sources.originals import load_originals
from pipeline.tokenize import holdout_folder, tokenize
from shards.errors import ArtifactError
from shards.manifest import Manifest
from shards.reader import open_artifact

SIZE = 16
GROUPS = r"(\w+)-\d+\.png"
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and twenty objects of two classes with three variants each."""
    home = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (home / "photos" / name).mkdir(parents=True)
        for i in range(30):
            pixels = rng.integers(0, 256, (18, 18, 3), np.uint8)
            Image.fromarray(pixels).save(home / "photos" / name / f"object{i // 3}-{i % 3}.png")
    torch.manual_seed(0)
    config = VQConfig(codebook_size=32, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)
    VQTokenizer(config).save_pretrained(home / "vq")
    return home


def chosen(home: Path, **values: Any) -> TokenizeSettings:
    options = {"tokenizer": str(home / "vq"), "image_size": SIZE, "device": "cpu", "shard_size": 8, "holdout": 0.3}
    return TokenizeSettings(**{**options, **values})


def run(home: Path, out: Path, **values: Any) -> tuple[Manifest, Manifest]:
    tokenize(str(home / "photos"), out, chosen(home, **values), QUIET)
    return Manifest.read(out), Manifest.read(holdout_folder(out))


def keys_of(folder: Path) -> list[str]:
    artifact = open_artifact(folder)
    return artifact.keys(np.arange(len(artifact)))


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def keys(source: IndexedSource) -> set[str]:
    return {source.key(i) for i in range(len(source))}


def test_every_image_is_in_one_of_the_two_artifacts_with_the_label_that_it_has_without(
    home: Path, tmp_path: Path
) -> None:
    training, held_out = run(home, tmp_path / "codes")
    source = open_indexed(str(home / "photos"))
    assert sorted(keys_of(tmp_path / "codes") + keys_of(tmp_path / "codes-holdout")) == sorted(keys(source))
    assert training.class_names == held_out.class_names == source.class_names
    assert 0.1 < held_out.rows / len(source) < 0.5
    labels = {source.key(i): source.label(i) for i in range(len(source))}
    artifact = open_artifact(tmp_path / "codes-holdout")
    rows = np.arange(len(artifact))
    found = artifact.gather(rows, np.zeros_like(rows)).labels
    assert [labels[key] for key in artifact.keys(rows)] == found.tolist()
    assert load_originals(held_out, artifact.keys(rows), np.zeros_like(rows)).shape == (len(rows), SIZE, SIZE, 3)


def test_variants_of_one_object_stay_together(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "codes", group_regex=GROUPS)
    parts = [{re.search(GROUPS, key)[1] for key in keys_of(tmp_path / name)} for name in ("codes", "codes-holdout")]  # type: ignore[index]
    assert parts[0]
    assert parts[1]
    assert not parts[0] & parts[1]


def test_without_a_group_in_the_regex_the_entire_match_is_the_group(home: Path) -> None:
    source = open_indexed(str(home / "photos"))
    by_group, by_match = (split_holdout(source, 0.3, 0, regex)[1] for regex in (r"(object\d+)-", r"object\d+"))
    assert keys(by_group) == keys(by_match)


def test_an_image_keeps_its_part_when_images_are_added_or_the_fraction_grows(home: Path, tmp_path: Path) -> None:
    source = open_indexed(str(home / "photos"))
    only_b = open_indexed(str(home / "photos"), classes=["b"])
    held_out = keys(split_holdout(source, 0.3)[1])
    assert keys(split_holdout(only_b, 0.3)[1]) == {key for key in held_out if key.startswith("b/")}
    assert held_out < keys(split_holdout(source, 0.6)[1])
    assert held_out != keys(split_holdout(source, 0.3, seed=1)[1])


def test_rerunning_writes_nothing_and_another_holdout_is_refused(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "codes"
    training, held_out = run(home, out)
    assert training.settings["holdout"] == {"fraction": 0.3, "seed": 0, "group_regex": None, "part": "training"}
    assert held_out.settings["holdout"]["part"] == "held out"
    before = files(out) | files(holdout_folder(out))
    run(home, out)
    assert files(out) | files(holdout_folder(out)) == before
    for other in ({"holdout": 0.4}, {"seed": 1}, {"group_regex": GROUPS}, {"holdout": None}):
        with pytest.raises(ArtifactError, match="made with other settings: holdout was"):
            run(home, out, **other)
    assert run(home, out, holdout=0.4, overwrite=True)[1].settings["holdout"]["fraction"] == 0.4


def test_a_missing_part_is_rebuilt_with_the_same_bytes(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "codes"
    run(home, out)
    before = files(holdout_folder(out))
    for path in holdout_folder(out).iterdir():
        path.unlink()
    run(home, out)
    assert files(holdout_folder(out)) == before


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "one")
    options = ["--tokenizer", str(home / "vq"), "--image-size", str(SIZE), "--shard-size", "8", "--device", "cpu"]
    options += ["--holdout", "0.3"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "dpar", "tokenize", str(home / "photos"), str(tmp_path / "two"), *options],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            cwd=home,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    for name in ("", "-holdout"):
        assert files(tmp_path / f"two{name}") == files(tmp_path / f"one{name}")


def test_a_holdout_folder_with_other_files_is_refused_before_any_work(home: Path, tmp_path: Path) -> None:
    (tmp_path / "codes-holdout").mkdir()
    (tmp_path / "codes-holdout" / "thesis.tex").write_text("do not lose me")
    with pytest.raises(ArtifactError, match="codes-holdout holds something else"):
        run(home, tmp_path / "codes")
    assert not list((tmp_path / "codes").glob("*.arrow"))


def test_the_held_out_images_are_counted_and_their_folder_named(home: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    tokenize(str(home / "photos"), tmp_path / "codes", chosen(home), Progress(Console(file=said, width=500), False))
    rows = Manifest.read(tmp_path / "codes-holdout").rows
    assert f"held out: {rows} images in {tmp_path / 'codes-holdout'}" in said.getvalue()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"holdout": 0.0}, "--holdout is 0.0; it must be above 0 and below 1"),
        ({"holdout": 1.0}, "--holdout is 1.0; it must be above 0 and below 1"),
        ({"holdout": -0.1}, "--holdout is -0.1"),
        ({"holdout": float("nan")}, "--holdout is nan"),
        ({"group_regex": "a("}, r"--group-regex 'a\(' is not a regular expression: missing \)"),
        ({"holdout": None, "group_regex": "a"}, "--group-regex needs --holdout"),
    ],
)
def test_invalid_settings_are_refused(home: Path, values: dict[str, Any], says: str) -> None:
    with pytest.raises(StageError, match=says):
        chosen(home, **values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"group_regex": r"a/(object\d)"}, r"does not match 30 of 60 keys, such as 'b/object0-0\.png'"),
        ({"group_regex": "photo|object(x)?"}, "does not match 60 of 60 keys"),
        ({"holdout": 1e-9}, "--holdout 1e-09 of 60 images leaves none held out"),
        ({"holdout": 1 - 1e-9}, "leaves none to train on"),
    ],
)
def test_a_fraction_that_leaves_one_part_empty_is_refused(
    home: Path, tmp_path: Path, values: dict[str, Any], says: str
) -> None:
    with pytest.raises(StageError, match=says):
        run(home, tmp_path / "codes", **values)
    assert not (tmp_path / "codes").exists()


def test_holdout_of_tars_over_the_network_is_refused(home: Path, tmp_path: Path) -> None:
    with fsspec.filesystem("memory").open("/held/0.tar", "wb") as file, webdataset.TarWriter(file) as tar:
        tar.write({"__key__": "a", "png": Image.new("RGB", (20, 20)), "cls": 0})
    with pytest.raises(StageError, match="hold out some of the tars instead"):
        tokenize("memory://held/0.tar", tmp_path / "codes", chosen(home), QUIET)
