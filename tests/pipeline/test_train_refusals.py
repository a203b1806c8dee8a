"""Data, weights and settings that `dpar train` refuses before anything is written."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpar.errors import ModelError
from pipeline.runtime.errors import StageError
from shards.errors import ArtifactError
from tests.pipeline.trained import build, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("made") / "patches")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"tokenizer": "1" * 64}, "was made with tokenizer 111111111111, the training data with 000000000000"),
        ({"grid": (4, 5)}, "its grid is 4×5, the model's 4×4"),
        ({"classes": 3}, "its number of classes is 3, the model's 2"),
        ({"kind": "codes"}, "`dpar patchify`"),
    ],
)
def test_an_incompatible_held_out_artifact_is_refused_before_anything_is_written(
    patches: Path, tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    held_out = build(tmp_path / "other", **other)
    with pytest.raises(StageError, match=says) as refusal:
        run(patches, tmp_path / "a", validation=held_out)
    assert str(held_out) in str(refusal.value)
    assert not (tmp_path / "a").exists()


def test_codes_for_dpar_are_refused_with_the_command_to_make_patches(tmp_path: Path) -> None:
    codes = build(tmp_path / "codes", kind="codes")
    with pytest.raises(StageError, match=f"{codes} holds codes.*DPAR needs patches, as `dpar patchify` writes them"):
        run(codes, tmp_path / "a")


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(
    patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(StageError, match="--batch 4 is not divisible by the 3 processes"):
        run(patches, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"classes": 3}, r"cls_embedding.embedding_table.weight is \(4, 192\), not \(3, 192\)"),
        ({"grid": (2, 8)}, "grid_height 2 is not 4; grid_width 8 is not 4"),
    ],
)
def test_incompatible_weights_are_refused_before_anything_is_written(
    patches: Path, tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    run(build(tmp_path / "other", **other), tmp_path / "a", steps=1)
    with pytest.raises((StageError, ModelError), match=says):
        run(patches, tmp_path / "b", init=str(tmp_path / "a"))
    assert not (tmp_path / "b").exists()


def test_a_damaged_shard_is_found_before_anything_is_written(patches: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "patches"
    shutil.copytree(patches, damaged)
    (shard, *_) = sorted(damaged.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match=shard.name):
        run(damaged, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_tracker_whose_package_is_missing_is_refused_before_anything_is_written(
    patches: Path, tmp_path: Path
) -> None:
    for name in ("tensorboard", "wandb"):
        if importlib.util.find_spec(name) is None:
            with pytest.raises(StageError, match=rf"--{name} needs .*: pip install 'dpar\[{name}\]'"):
                run(patches, tmp_path / "a", **{name: True})
    assert not (tmp_path / "a").exists()
