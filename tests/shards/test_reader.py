import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import ArtifactError
from shards.manifest import MANIFEST, Container, Kind, Manifest, ShardInfo
from shards.reader import Artifact, open_artifact
from shards.rows import Rows, write_shard
from shards.shard_files import Shard
from shards.writer import ArtifactBuild

CONTAINERS: tuple[Container, ...] = ("arrow", "webdataset")
SIZES = (5, 0, 4, 1)  # rows per shard
GRID, VIEWS, N = (2, 5), 3, 10
TOTAL = sum(SIZES)
CLASSES = tuple(str(i) for i in range(100))
PICKS = st.lists(st.tuples(st.integers(0, TOTAL - 1), st.integers(0, VIEWS - 1)), max_size=25)


def shard_rows(index: int, kind: Kind) -> Rows:
    rng = np.random.default_rng(index)
    shape = (SIZES[index], VIEWS, N)
    return Rows(
        keys=[f"{index}/ä {i}.jpg" for i in range(SIZES[index])],
        labels=rng.integers(0, len(CLASSES), SIZES[index]).astype(np.int32),
        codes=rng.integers(0, 2**16, shape).astype(np.uint16),
        entropy=rng.random(shape).astype(np.float16) if kind == "patches" else None,
        starts=rng.random(shape) < 0.5 if kind == "patches" else None,
    )


def make(out: Path, container: Container = "arrow", kind: Kind = "patches") -> Path:
    return write_artifact(out, container, [shard_rows(index, kind) for index in range(len(SIZES))], kind=kind)


def write_artifact(
    out: Path, container: Container, rows: list[Rows], grid: tuple[int, int] = GRID, kind: Kind = "patches"
) -> Path:
    build = ArtifactBuild(out, settings={}, n_shards=len(rows), container=container)

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        return Manifest(
            kind=kind,
            container=container,
            grid=grid,
            codebook_size=2**16,
            views=rows[0].codes.shape[1],
            class_names=CLASSES,
            rows=sum(len(part) for part in rows),
            shards=shards,
            settings={},
            source={},
            tokenizer={},
        )

    for index in build.todo():
        build.add(index, rows[index])
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
def test_shards_are_read_as_they_were_written(
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
def test_gathering_rows_and_views_equals_a_plain_loop_over_shards(
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
def test_an_open_artifact_stays_readable_after_its_files_are_unlinked(tmp_path: Path, container: Container) -> None:
    artifact = open_artifact(make(tmp_path / "a", container))
    shards: list[Shard] = [artifact.shard(index) for index in range(len(SIZES))]
    for path in (tmp_path / "a").glob("0*"):
        path.unlink()
    assert shards[0].keys(np.arange(5)) == shard_rows(0, "patches").keys


def change(path: Path, **values: Any) -> None:
    held = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**held, **values}), encoding="utf-8")


def change_shard(path: Path, **values: Any) -> None:
    held = json.loads(path.read_text(encoding="utf-8"))
    held["shards"][0] |= values
    path.write_text(json.dumps(held), encoding="utf-8")


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


@pytest.mark.parametrize("container", CONTAINERS)
def test_missing_shards_are_counted_and_named_when_an_artifact_is_opened(tmp_path: Path, container: Container) -> None:
    make(tmp_path / "a", container)
    (gone,) = (tmp_path / "a").glob("00002.*")
    gone.unlink()
    with pytest.raises(ArtifactError, match=rf"1 of 4 shards of {tmp_path}/a are damaged: {gone.name} \(missing\)"):
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
def test_a_truncated_shard_is_one_message(tmp_path: Path, container: Container, harm: Callable[[bytes], bytes]) -> None:
    artifact = open_artifact(make(tmp_path / "a", container))
    (path,) = (tmp_path / "a").glob("00000.*")
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ArtifactError, match=re.escape(f"{path} is damaged")):
        artifact.gather(np.array([0]), np.array([0]))


@pytest.mark.parametrize("container", CONTAINERS)
def test_verification_finds_changed_and_missing_shards(tmp_path: Path, container: Container) -> None:
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


@pytest.mark.parametrize("container", CONTAINERS)
def test_verification_names_all_damaged_shards_in_one_message(tmp_path: Path, container: Container) -> None:
    make(tmp_path / "a", container)
    first, second, third, _ = sorted((tmp_path / "a").glob("0*"))
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 16
    first.write_bytes(data)
    second.write_bytes(second.read_bytes() + b"x")
    third.unlink()
    with pytest.raises(ArtifactError) as refusal:
        open_artifact(tmp_path / "a", verify=True)
    text = str(refusal.value)
    assert text.startswith(f"3 of 4 shards of {tmp_path / 'a'} are damaged: {first.name} (its SHA-256")
    assert f"{second.name} (its size is" in text
    assert f"{third.name} (missing)" in text
    assert "rerun the command that made it" in text


def test_each_process_verifies_its_own_share(tmp_path: Path) -> None:
    make(tmp_path / "a")
    path = tmp_path / "a" / "00002.arrow"
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")
    assert len(open_artifact(tmp_path / "a", verify=True, share=(1, 2))) == TOTAL
    with pytest.raises(ArtifactError, match=r"1 of 4 shards.*00002\.arrow"):
        open_artifact(tmp_path / "a", verify=True, share=(0, 2))


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_shard_truncated_while_it_is_read_is_one_message(tmp_path: Path, container: Container) -> None:
    artifact = open_artifact(make(tmp_path / "a", container))
    artifact.gather(np.array([0]), np.array([0]))
    (path,) = (tmp_path / "a").glob("00000.*")
    os.truncate(path, 10)
    with pytest.raises(ArtifactError, match="was truncated after it was opened"):
        artifact.gather(np.array([0]), np.array([0]))


def test_a_shard_of_another_size_is_refused_without_reading_it(tmp_path: Path) -> None:
    make(tmp_path / "a")
    path = tmp_path / "a" / "00003.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"1 of 4 shards.*00003\.arrow \(its size is"):
        open_artifact(tmp_path / "a")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("values", [{"grid": [2, 6]}, {"views": 2}, {"kind": "codes", "format_version": 1, "views": 6}])
def test_columns_that_contradict_the_manifest_are_refused(
    tmp_path: Path, container: Container, values: dict[str, Any]
) -> None:
    change(make(tmp_path / "a", container) / MANIFEST, **values)
    with pytest.raises(ArtifactError, match=r"shards of .* are damaged: 00000.* are "):
        open_artifact(tmp_path / "a", verify=True)


@pytest.mark.parametrize("container", CONTAINERS)
def test_closing_the_least_recently_used_shards_has_no_effect_on_reads(tmp_path: Path, container: Container) -> None:
    artifact = open_artifact(make(tmp_path / "a", container))
    rows, views = np.arange(TOTAL).repeat(3)[::-1], np.tile(np.arange(VIEWS), TOTAL)
    whole = artifact.gather(rows, views)
    artifact = open_artifact(tmp_path / "a")
    artifact._max_open = 1
    for i in (*range(len(rows)), *range(0, len(rows), 7)):
        found = artifact.gather(rows[i : i + 1], views[i : i + 1])
        np.testing.assert_array_equal(found.codes[0], whole.codes[i])
        assert len(artifact._open) == 1


@pytest.mark.parametrize("n", [8, 10, 13])
@pytest.mark.parametrize("container", CONTAINERS)
def test_boundaries_of_a_view_are_unpacked_at_any_bit_offset(tmp_path: Path, container: Container, n: int) -> None:
    rng = np.random.default_rng(n)
    shape = (3, 5, n)
    rows = Rows(
        keys=list("abc"),
        labels=np.zeros(3, np.int32),
        codes=np.zeros(shape, np.uint16),
        entropy=np.zeros(shape, np.float16),
        starts=rng.random(shape) < 0.5,
    )
    assert rows.starts is not None
    write_artifact(tmp_path / "a", container, [rows], grid=(1, n))
    picked = np.arange(15)
    found = open_artifact(tmp_path / "a").gather(picked // 5, picked % 5)
    np.testing.assert_array_equal(found.starts, rows.starts.reshape(15, n))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_does_not_grow_with_reads(tmp_path: Path) -> None:
    shape = (500, 8, 1024)
    shards = []
    for label in range(5):  # 84 MB
        codes = np.full(shape, label, np.uint16)
        rows = Rows(
            keys=[str(i) for i in range(500)],
            labels=np.full(500, label, np.int32),
            codes=codes,
            entropy=codes.view(np.float16),
            starts=np.ones(shape, np.bool_),
        )
        shards.append(rows)
    write_artifact(tmp_path / "a", "arrow", shards, grid=(32, 32))
    artifact = open_artifact(tmp_path / "a")
    rng = np.random.default_rng(0)

    def mapped() -> int:
        return int(re.findall(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024

    artifact.gather(np.arange(32), np.zeros(32, np.int64))
    before, most = mapped(), 0
    for _ in range(100):
        artifact.gather(rng.integers(0, 2500, 32), rng.integers(0, 8, 32))
        most = max(most, mapped())
    for index in range(5):
        artifact.shard_rows(index)
    assert most - before < 20e6
    assert mapped() - before < 20e6


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


def tampered(home: Path, container: Container, kind: Kind = "codes") -> Path:
    """Return the first shard of a new artifact whose size and SHA-256 are not checked."""
    make(home, container, kind)
    change_shard(home / MANIFEST, bytes=None)
    (path,) = home.glob("00000.*")
    return path


def arrow_shard(path: Path, compression: str | None = None, **columns: Any) -> None:
    rows = SIZES[0]
    values = pa.array(np.zeros(rows * VIEWS * N, np.uint16))
    held = {
        "key": pa.array([f"{i}" for i in range(rows)]),
        "label": pa.array([0] * rows, pa.int32()),
        "codes": pa.FixedSizeListArray.from_arrays(values, VIEWS * N),
    }
    batch = pa.record_batch({name: column for name, column in {**held, **columns}.items() if column is not None})
    with pa.ipc.new_file(path, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(batch)


ARROW_DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "keys that are numbers": ({"key": pa.array(range(5))}, "its key are int64, not string"),
    "a row without a key": ({"key": pa.array(["a", None, "c", "d", "e"])}, "a row has no key"),
    "a row without a label": ({"label": pa.array([0, None, 1, 1, 1], pa.int32())}, "a row has no label"),
    "labels that are text": ({"label": pa.array(list("abcde"))}, "its label are string, not int32"),
    "no labels": ({"label": None}, "label"),
    "no keys": ({"key": None}, "key"),
}


@pytest.mark.parametrize("damage", ARROW_DAMAGE)
def test_an_inconsistent_arrow_shard_is_one_message(tmp_path: Path, damage: str) -> None:
    columns, says = ARROW_DAMAGE[damage]
    path = tampered(tmp_path / "a", "arrow")
    arrow_shard(path, **columns)
    artifact = open_artifact(tmp_path / "a")
    for read in (lambda: artifact.keys(np.arange(5)), lambda: artifact.shard_rows(0)):
        with pytest.raises(ArtifactError, match=f"{re.escape(str(path))} is damaged") as refusal:
            read()
        assert re.search(says, str(refusal.value))


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compressed_arrow_shard_is_one_message_intact_or_damaged(tmp_path: Path, compression: str) -> None:
    path = tampered(tmp_path / "a", "arrow")
    noise = np.random.default_rng(0).integers(0, 2**16, SIZES[0] * VIEWS * N).astype(np.uint16)
    arrow_shard(path, compression, codes=pa.FixedSizeListArray.from_arrays(pa.array(np.sort(noise)), VIEWS * N))
    whole = path.read_bytes()
    for at in (None, *range(0, len(whole), 7)):
        data = bytearray(whole)
        if at is not None:
            data[at] ^= 255
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"00000\.arrow (is damaged: |\(its size is )") as refusal:
            open_artifact(tmp_path / "a").shard_rows(0)
        if at is None:
            assert "are compressed" in str(refusal.value)


@pytest.mark.parametrize("ends", [[0, 1, 2, 3, 4, 2**31 - 1], [0, 4, 1, 3, 2, 5], [-(2**20), 1, 2, 3, 4, 5], None])
def test_invalid_keys_of_an_arrow_shard_are_one_message(tmp_path: Path, ends: list[int] | None) -> None:
    path = tampered(tmp_path / "a", "arrow")
    arrow_shard(path)
    data = path.read_bytes()
    written, forged = np.arange(6, dtype=np.int32).tobytes(), np.array(ends or [0], np.int32).tobytes()
    if ends is None:
        written, forged = b"01234", b"01\xff34"
    assert data.count(written) == 1
    path.write_bytes(data.replace(written, forged))
    with pytest.raises(ArtifactError, match=f"{re.escape(str(path))} is damaged"):
        open_artifact(tmp_path / "a").keys(np.arange(5))


@pytest.mark.parametrize(
    "size", [b"-0000000010", b"+0000000010", b"0000000_010", b"\x80" + b"\0" * 10, b"\xff" * 11, b"        10 "]
)
def test_a_size_that_is_not_octal_in_a_tar_shard_is_one_message(tmp_path: Path, size: bytes) -> None:
    path = tampered(tmp_path / "a", "webdataset")
    data = bytearray(path.read_bytes())
    data[1024 + 124 : 1024 + 135] = size  # of the second member
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{path} is damaged: the size at byte 1148 is not a number in octal"):
        open_artifact(tmp_path / "a").shard_rows(0)


@pytest.mark.parametrize(
    ("found", "forged"),
    [
        (rb'"key"', b'"kex"'),
        (rb'"label"', b'"lapel"'),
        (rb'"0/', b'"\xff/'),
        (rb'"label": \d\d', b'"label": []'),
        (rb'"key": "........', rb'"key": "\\ud800xx'),
    ],
)
@pytest.mark.parametrize("read", ["gather", "keys", "shard_rows", "stream"])
def test_invalid_json_in_a_tar_shard_is_one_message(tmp_path: Path, found: bytes, forged: bytes, read: str) -> None:
    path = tampered(tmp_path / "a", "webdataset")
    data = path.read_bytes()
    changed = re.sub(found, forged, data, count=1)
    assert changed != data
    assert len(changed) == len(data)
    path.write_bytes(changed)
    artifact, zero = open_artifact(tmp_path / "a"), np.array([0])
    reads = {
        "gather": lambda: artifact.gather(zero, zero),
        "keys": lambda: artifact.keys(zero),
        "shard_rows": lambda: artifact.shard_rows(0),
        "stream": lambda: artifact.stream(zero, np.zeros(5, np.int64)),
    }
    with pytest.raises(ArtifactError, match=rf"{path} is damaged: "):
        reads[read]()


@pytest.mark.parametrize("container", CONTAINERS)
def test_codes_outside_the_codebook_are_one_message_for_every_reader(tmp_path: Path, container: Container) -> None:
    change(make(tmp_path / "a", container) / MANIFEST, codebook_size=7)
    artifact, zero = open_artifact(tmp_path / "a"), np.array([0])
    for read in (
        lambda: artifact.gather(zero, zero),
        lambda: artifact.shard_rows(0),
        lambda: artifact.stream(zero, np.zeros(5, np.int64)),
    ):
        with pytest.raises(ArtifactError, match=r"shard .*a.* has code \d+; the codebook ends at 6"):
            read()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("label", [-1, 100, 2**31 - 1])
def test_labels_out_of_range_are_one_message_for_every_reader(tmp_path: Path, container: Container, label: int) -> None:
    rows = dataclasses.replace(shard_rows(0, "codes"), labels=np.array([0, 1, label, 3, 4], np.int32))
    write_artifact(tmp_path / "a", container, [rows], kind="codes")
    artifact, every = open_artifact(tmp_path / "a"), np.arange(5)
    for read in (lambda: artifact.gather(every, every * 0), lambda: artifact.shard_rows(0)):
        with pytest.raises(ArtifactError, match=rf"has label {label}; the classes end at 99"):
            read()


def test_too_many_rows_for_a_shards_size_are_refused_before_allocation(tmp_path: Path) -> None:
    make(tmp_path / "a")
    change_shard(tmp_path / "a" / MANIFEST, bytes=None, rows=10**15)
    change(tmp_path / "a" / MANIFEST, rows=10**15 + TOTAL - SIZES[0])
    with pytest.raises(ArtifactError, match=r"00000\.arrow \(its size is \d+ bytes, too few for 10{15} rows\)"):
        open_artifact(tmp_path / "a")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_named_pipe_as_shard_is_refused_without_waiting(tmp_path: Path, container: Container) -> None:
    path = tampered(tmp_path / "a", container)
    artifact = open_artifact(tmp_path / "a")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match="not a regular file"):
        artifact.shard_rows(0)
    with pytest.raises(ArtifactError, match=rf"{path.name} \(cannot be opened: not a regular file\)"):
        open_artifact(tmp_path / "a")
