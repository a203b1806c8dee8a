"""Shards that are missing, changed, truncated or hold values that contradict the manifest."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shards.errors import ArtifactError
from shards.manifest import MANIFEST, Container, Kind
from shards.reader import open_artifact
from shards.rows import write_shard
from tests.shards.small_artifacts import (
    CONTAINERS,
    SIZES,
    TOTAL,
    VIEWS,
    N,
    change,
    change_shard,
    make,
    shard_rows,
    write_artifact,
)


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
