"""Manifests that are invalid, missing, unfinished or of the wrong kind; and fingerprints."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.errors import ArtifactError
from shards.manifest import MANIFEST, Kind
from shards.reader import open_artifact
from shards.writer import ArtifactBuild
from tests.shards.small_artifacts import TOTAL, change, change_shard, make, shard_rows


def drop(path: Path, name: str) -> None:
    held = json.loads(path.read_text(encoding="utf-8"))
    del held[name]
    path.write_text(json.dumps(held), encoding="utf-8")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "a list": (lambda path: path.write_text("[]"), "is [], expected an object"),
    "nested too deep": (lambda path: path.write_text("[" * 10**5), "is not valid JSON"),
    "a number of 400 digits": (lambda path: change(path, rows=10**400), "has more than 64 bits"),
    "a number of 65 bits": (lambda path: change(path, settings={"limit": 2**63}), "has more than 64 bits"),
    "text that is not Unicode": (lambda path: change(path, class_names=["\ud800"]), "is not valid JSON"),
    "without a field": (lambda path: drop(path, "grid"), "field grid is missing, expected a list of 2"),
    "without a version": (lambda path: drop(path, "format_version"), "format version 'missing'"),
    "a field too many": (lambda path: change(path, colour="red"), "field 'colour' is unknown, expected only kind, "),
    "a grid of words": (lambda path: change(path, grid=["x", 2]), "field grid[0] is 'x', expected an integer"),
    "half a grid": (lambda path: change(path, grid=[2]), "field grid is [2], expected a list of 2"),
    "three sides": (lambda path: change(path, grid=[2, 5, 1]), "field grid is [2, 5, 1], expected a list of 2"),
    "a grid of nothing": (lambda path: change(path, grid=[0, 5]), "field grid[0] is 0, expected an integer of at"),
    "a grid without end": (lambda path: change(path, grid=[2**40, 2**40]), "values per row"),
    "no codes": (lambda path: change(path, codebook_size=0), "codebook_size is 0, expected an integer of at least 1"),
    "shards of words": (lambda path: change(path, shards=["x"]), "field shards[0] is 'x', expected an object"),
    "a number of shards": (lambda path: change(path, shards=3), "field shards is 3, expected a list"),
    "null settings": (lambda path: change(path, settings=None), "field settings is null, expected an object"),
    "rows as text": (lambda path: change(path, rows="10"), "field rows is '10', expected an integer of at least 0"),
    "rows as a fraction": (lambda path: change(path, rows=10.0), "field rows is 10.0, expected an integer"),
    "true views": (lambda path: change(path, views=True), "field views is True, expected an integer of at least 1"),
    "a class without a name": (lambda path: change(path, class_names=["a", None]), "class_names[1] is null, expected"),
    "a shard's rows as text": (lambda path: change_shard(path, rows="5"), "field shards[0].rows is '5', expected"),
    "a shard's size as text": (lambda path: change_shard(path, bytes=""), "shards[0].bytes is '', expected an integer"),
    "another version": (lambda path: change(path, format_version=99), "format version 99; this version reads 2"),
    "another kind": (lambda path: change(path, kind="pixels"), "kind is 'pixels', expected one of codes, patches"),
    "an older rule": (
        lambda path: change(path, format_version=1),
        r"make the patches again from the codes, with `dpar patchify`",
    ),
    "a row too many": (lambda path: change(path, rows=TOTAL + 1), f"have {TOTAL} rows in total, not {TOTAL + 1}"),
    "a shard elsewhere": (lambda path: change_shard(path, name="../a/00000.arrow"), "is not a plain file name"),
    "a shard of a bad name": (lambda path: change_shard(path, name=".."), "is not a plain file name"),
    "a shard twice": (lambda path: change_shard(path, name="00001.arrow"), "a shard is listed twice"),
    "a shard of less than nothing": (lambda path: change_shard(path, rows=-5), "field shards[0].rows is -5, expected"),
    "another container": (lambda path: change(path, container="zip"), "container is 'zip'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_invalid_manifest_is_named_with_the_reason(tmp_path: Path, damage: str) -> None:
    harm, says = DAMAGE[damage]
    path = make(tmp_path / "a") / MANIFEST
    harm(path)
    with pytest.raises(ArtifactError, match=re.escape(says)) as refusal:
        open_artifact(tmp_path / "a")
    assert str(path) in str(refusal.value)


def test_a_missing_directory_or_one_without_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"no artifact at {tmp_path}/a: there is no such directory"):
        open_artifact(tmp_path / "a")
    with pytest.raises(ArtifactError, match=rf"{tmp_path} is not an artifact: it has no manifest\.json"):
        open_artifact(tmp_path)


def test_an_unfinished_build_is_refused_with_how_to_resume(tmp_path: Path) -> None:
    ArtifactBuild(tmp_path / "a", settings={}, n_shards=2, container="arrow").add(0, shard_rows(0, "codes"))
    with pytest.raises(ArtifactError, match=rf"{tmp_path}/a is not finished: rerun the command that makes it"):
        open_artifact(tmp_path / "a")


@pytest.mark.parametrize(
    ("kind", "needed", "command"), [("codes", "patches", "patchify"), ("patches", "codes", "tokenize")]
)
def test_the_wrong_kind_is_refused_with_the_command_to_make_the_right_one(
    tmp_path: Path, kind: Kind, needed: Kind, command: str
) -> None:
    make(tmp_path / "a", kind=kind)
    with pytest.raises(ArtifactError, match=rf"{tmp_path}/a holds {kind}; {needed} are needed.*`dpar {command}`"):
        open_artifact(tmp_path / "a", kind=needed)


def test_the_fingerprint_depends_on_the_content_not_on_its_origin(tmp_path: Path) -> None:
    one = open_artifact(make(tmp_path / "a")).manifest
    change(tmp_path / "a" / MANIFEST, made_by={"python": "9"}, source={"location": "elsewhere"})
    assert open_artifact(tmp_path / "a").manifest.fingerprint() == one.fingerprint()
    prints = {one.fingerprint()}
    for name, value in {"class_names": ["b"], "grid": [5, 2], "codebook_size": 7}.items():
        change(make(tmp_path / name) / MANIFEST, **{name: value})
        prints.add(open_artifact(tmp_path / name).manifest.fingerprint())
    prints.add(open_artifact(make(tmp_path / "tar", "webdataset")).manifest.fingerprint())
    assert len(prints) == 5
