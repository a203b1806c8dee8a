import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.build import ArtifactBuild
from shards.errors import ArtifactError
from shards.manifest import MANIFEST, Container, Kind, Manifest, ShardInfo
from shards.reader import Artifact, Shard, open_artifact
from shards.rows import Rows, write_shard

CONTAINERS: tuple[Container, ...] = ("arrow", "webdataset")
SIZES = (5, 0, 4, 1)  # rows a shard
GRID, VIEWS, N = (2, 5), 3, 10
TOTAL = sum(SIZES)
PICKS = st.lists(st.tuples(st.integers(0, TOTAL - 1), st.integers(0, VIEWS - 1)), max_size=25)


def shard_rows(index: int, kind: Kind) -> Rows:
    rng = np.random.default_rng(index)
    shape = (SIZES[index], VIEWS, N)
    return Rows(
        keys=[f"{index}/ä {i}.jpg" for i in range(SIZES[index])],
        labels=rng.integers(0, 2**31, SIZES[index]).astype(np.int32),
        codes=rng.integers(0, 2**16, shape).astype(np.uint16),
        entropy=rng.random(shape).astype(np.float16) if kind == "patches" else None,
        starts=rng.random(shape) < 0.5 if kind == "patches" else None,
    )


def make(out: Path, container: Container = "arrow", kind: Kind = "patches") -> Path:
    build = ArtifactBuild(out, settings={}, n_shards=len(SIZES), container=container)

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        return Manifest(
            kind=kind,
            container=container,
            grid=GRID,
            codebook_size=2**16,
            views=VIEWS,
            class_names=("a",),
            rows=TOTAL,
            shards=shards,
            settings={},
            source={},
            tokenizer={},
        )

    for index in build.todo():
        build.add(index, shard_rows(index, kind))
    build.finish(manifest)
    return out


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Artifact]:
    home = tmp_path_factory.mktemp("artifacts")
    kinds: tuple[Kind, ...] = ("codes", "patches")
    return {
        (container, kind): open_artifact(make(home / container / kind, container, kind))
        for container in CONTAINERS
        for kind in kinds
    }


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ["codes", "patches"])
def test_whole_shards_come_back_as_they_were_written(
    artifacts: dict[tuple[str, str], Artifact], container: Container, kind: Kind
) -> None:
    artifact = artifacts[container, kind]
    assert len(artifact) == TOTAL
    for index in range(len(SIZES)):
        found, written = artifact.shard_rows(index), shard_rows(index, kind)
        assert found.keys == written.keys
        for name in ("labels", "codes", "entropy", "starts"):
            one, other = getattr(found, name), getattr(written, name)
            if other is None:
                assert one is None
            else:
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ["codes", "patches"])
@given(picks=PICKS)
def test_gathering_any_rows_and_views_equals_a_plain_loop_over_whole_shards(
    artifacts: dict[tuple[str, str], Artifact], container: Container, kind: Kind, picks: list[tuple[int, int]]
) -> None:
    artifact = artifacts[container, kind]
    every = [(shard_rows(index, kind), i) for index in range(len(SIZES)) for i in range(SIZES[index])]
    rows, views = np.array(picks, np.int64).reshape(-1, 2).T
    found = artifact.gather(rows, views)
    assert len(found.labels) == len(found.codes) == len(picks)
    assert artifact.keys(rows) == [every[row][0].keys[every[row][1]] for row in rows]
    assert (found.entropy is None) == (found.starts is None) == (kind == "codes")
    for at, (row, view) in enumerate(picks):
        shard, i = every[row]
        assert found.labels[at] == shard.labels[i]
        np.testing.assert_array_equal(found.codes[at], shard.codes[i, view])
        if found.entropy is not None and found.starts is not None:
            assert shard.entropy is not None
            assert shard.starts is not None
            np.testing.assert_array_equal(found.entropy[at], shard.entropy[i, view])
            np.testing.assert_array_equal(found.starts[at], shard.starts[i, view])


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_open_artifact_reads_on_after_its_files_are_unlinked(tmp_path: Path, container: Container) -> None:
    artifact = open_artifact(make(tmp_path / "a", container))
    shards: list[Shard] = [artifact.shard(index) for index in range(len(SIZES))]
    for path in (tmp_path / "a").glob("0*"):
        path.unlink()
    assert shards[0].keys(np.arange(5)) == shard_rows(0, "patches").keys


def change(path: Path, **values: Any) -> None:
    held = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**held, **values}), encoding="utf-8")


def drop(path: Path, name: str) -> None:
    held = json.loads(path.read_text(encoding="utf-8"))
    del held[name]
    path.write_text(json.dumps(held), encoding="utf-8")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "a list": (lambda path: path.write_text("[]"), "is damaged"),
    "without a field": (lambda path: drop(path, "grid"), "grid"),
    "a field too many": (lambda path: change(path, colour="red"), "colour"),
    "a grid of words": (lambda path: change(path, grid=["x", 2]), "is damaged"),
    "half a grid": (lambda path: change(path, grid=[2]), "is damaged"),
    "shards of words": (lambda path: change(path, shards=["x"]), "is damaged"),
    "another version": (lambda path: change(path, format_version=99), "format version 99; this version reads 1"),
    "another kind": (lambda path: change(path, kind="pixels"), "kind is 'pixels'; this version reads codes, patches"),
    "another container": (lambda path: change(path, container="zip"), "container is 'zip'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_manifest_that_cannot_be_read_is_named_with_what_is_wrong(tmp_path: Path, damage: str) -> None:
    harm, says = DAMAGE[damage]
    path = make(tmp_path / "a") / MANIFEST
    harm(path)
    with pytest.raises(ArtifactError, match=re.escape(says)) as refusal:
        open_artifact(tmp_path / "a")
    assert str(path) in str(refusal.value)


def test_a_directory_that_is_not_there_or_no_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"no artifact at {tmp_path}/a: there is no such directory"):
        open_artifact(tmp_path / "a")
    with pytest.raises(ArtifactError, match=rf"{tmp_path} is no artifact: it has no manifest\.json"):
        open_artifact(tmp_path)


def test_an_unfinished_build_says_how_to_go_on(tmp_path: Path) -> None:
    ArtifactBuild(tmp_path / "a", settings={}, n_shards=2, container="arrow").add(0, shard_rows(0, "codes"))
    with pytest.raises(ArtifactError, match=rf"{tmp_path}/a is not finished: run the command that makes it again"):
        open_artifact(tmp_path / "a")


@pytest.mark.parametrize(
    ("kind", "needed", "command"), [("codes", "patches", "patchify"), ("patches", "codes", "tokenize")]
)
def test_the_wrong_kind_is_refused_with_the_command_that_makes_the_right_one(
    tmp_path: Path, kind: Kind, needed: Kind, command: str
) -> None:
    make(tmp_path / "a", kind=kind)
    with pytest.raises(ArtifactError, match=rf"{tmp_path}/a holds {kind}; {needed} are needed.*`dpar {command}`"):
        open_artifact(tmp_path / "a", kind=needed)


@pytest.mark.parametrize("container", CONTAINERS)
def test_missing_shards_are_counted_and_named_when_an_artifact_is_opened(tmp_path: Path, container: Container) -> None:
    make(tmp_path / "a", container)
    (gone,) = (tmp_path / "a").glob("00002.*")
    gone.unlink()
    with pytest.raises(ArtifactError, match=rf"{tmp_path}/a lacks 1 of 4 shards \({gone.name}\)"):
        open_artifact(tmp_path / "a")


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_shard_that_goes_missing_later_is_named(tmp_path: Path, container: Container) -> None:
    artifact = open_artifact(make(tmp_path / "a", container))
    (gone,) = (tmp_path / "a").glob("00000.*")
    gone.unlink()
    with pytest.raises(ArtifactError, match=re.escape(f"{gone} is missing")):
        artifact.shard_rows(0)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("held", [1, 2])  # shard 1 has no rows, shard 2 has 4; shard 0 should have 5
def test_a_shard_with_another_number_of_rows_is_refused_with_both_numbers(
    tmp_path: Path, container: Container, held: int
) -> None:
    artifact = open_artifact(make(tmp_path / "a", container))
    (path,) = (tmp_path / "a").glob("00000.*")
    write_shard(path, shard_rows(held, "patches"), container)
    with pytest.raises(ArtifactError, match=rf"{path} is damaged: it holds {SIZES[held]} .*5"):
        artifact.gather(np.array([0]), np.array([0]))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("harm", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"x" * len(data)])
def test_a_shard_that_is_not_whole_is_one_message(
    tmp_path: Path, container: Container, harm: Callable[[bytes], bytes]
) -> None:
    artifact = open_artifact(make(tmp_path / "a", container))
    (path,) = (tmp_path / "a").glob("00000.*")
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ArtifactError, match=re.escape(f"{path} is damaged")):
        artifact.gather(np.array([0]), np.array([0]))


@pytest.mark.parametrize("container", CONTAINERS)
def test_shards_with_a_flipped_byte_or_gone_are_found_by_reading_every_byte(
    tmp_path: Path, container: Container
) -> None:
    artifact = open_artifact(make(tmp_path / "a", container))
    assert list(artifact.damaged()) == []
    first, _, third, _ = sorted((tmp_path / "a").glob("0*"))
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 16
    first.write_bytes(data)
    third.unlink()
    found = list(artifact.damaged())
    assert [name for name, _ in found] == [first.name, third.name]
    assert "SHA-256 differs" in found[0][1]
    assert found[1][1] == "missing"


def test_the_fingerprint_is_of_what_is_held_not_of_what_made_it(tmp_path: Path) -> None:
    one = open_artifact(make(tmp_path / "a")).manifest
    change(tmp_path / "a" / MANIFEST, made_by={"python": "9"}, source={"location": "elsewhere"})
    assert open_artifact(tmp_path / "a").manifest.fingerprint() == one.fingerprint()
    prints = {one.fingerprint()}
    for name, value in {"class_names": ["b"], "grid": [5, 2], "codebook_size": 7}.items():
        change(make(tmp_path / name) / MANIFEST, **{name: value})
        prints.add(open_artifact(tmp_path / name).manifest.fingerprint())
    prints.add(open_artifact(make(tmp_path / "tar", "webdataset")).manifest.fingerprint())
    assert len(prints) == 5
