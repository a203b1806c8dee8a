import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.manifest import Container
from shards.rows import EXTENSION, Rows, pack_starts, unpack_starts, write_shard

CONTAINERS: tuple[Container, ...] = ("arrow", "webdataset")
KEYS = ["dög/a.b.c/1.jpeg", "chat.é/2 3.png", "x/../y.tar.json", "日本/№.codes.npy", '"q"\\n\u0301.png']
VIEWS, N = 3, 7  # 21 bits a row: the last byte is not full


def some_rows(count: int = len(KEYS), kind: str = "patches") -> Rows:
    rng = np.random.default_rng(0)
    shape = (count, VIEWS, N)
    entropy = (rng.random(shape) * 9.7).astype(np.float16)
    entropy[..., 0] = np.inf
    starts = rng.random(shape) < 0.5
    return Rows(
        keys=KEYS[:count],
        labels=np.arange(count, dtype=np.int32) * 100_000,
        codes=rng.integers(0, 2**16, shape).astype(np.uint16),
        entropy=entropy if kind == "patches" else None,
        starts=starts if kind == "patches" else None,
    )


def unpacked(bits: np.ndarray) -> np.ndarray:
    return np.unpackbits(bits.astype(np.uint8), bitorder="big", count=VIEWS * N).reshape(VIEWS, N).astype(bool)


def load_arrow(paths: list[Path], cache: Path):
    from datasets import load_dataset

    return load_dataset("arrow", data_files=[str(p) for p in paths], split="train", cache_dir=str(cache))


def load_webdataset(paths: list[Path]) -> list[dict]:
    from webdataset import WebDataset

    return list(WebDataset([str(p) for p in paths], shardshuffle=False).decode())


@pytest.mark.parametrize("kind", ["codes", "patches"])
def test_arrow_shards_open_with_datasets_without_our_code(tmp_path: Path, kind: str) -> None:
    rows = some_rows(kind=kind)
    write_shard(tmp_path / "00000.arrow", rows, "arrow")
    found = load_arrow([tmp_path / "00000.arrow"], tmp_path / "cache")
    assert found["key"][:] == rows.keys
    assert found["label"][:] == rows.labels.tolist()
    assert found.features["codes"].feature.dtype == "uint16"
    np.testing.assert_array_equal(np.array(found["codes"][:]).reshape(rows.codes.shape), rows.codes)
    assert set(found.column_names) == {"key", "label", "codes"} | (
        {"entropy", "starts"} if kind == "patches" else set()
    )
    if rows.entropy is not None and rows.starts is not None:
        assert found.features["entropy"].feature.dtype == "float16"
        np.testing.assert_array_equal(np.array(found["entropy"][:], np.float16).reshape(rows.codes.shape), rows.entropy)
        np.testing.assert_array_equal([unpacked(np.array(bits)) for bits in found["starts"][:]], rows.starts)


@pytest.mark.parametrize("kind", ["codes", "patches"])
def test_webdataset_shards_open_with_webdataset_without_our_code(tmp_path: Path, kind: str) -> None:
    rows = some_rows(kind=kind)
    write_shard(tmp_path / "00000.tar", rows, "webdataset")
    found = load_webdataset([tmp_path / "00000.tar"])
    assert [sample["json"] for sample in found] == [
        {"key": key, "label": label} for key, label in zip(rows.keys, rows.labels.tolist(), strict=True)
    ]
    codes = np.stack([sample["codes.npy"] for sample in found])
    assert codes.dtype == np.uint16
    np.testing.assert_array_equal(codes, rows.codes)
    if rows.entropy is not None and rows.starts is not None:
        entropy = np.stack([sample["entropy.npy"] for sample in found])
        assert entropy.dtype == np.float16
        np.testing.assert_array_equal(entropy, rows.entropy)
        np.testing.assert_array_equal([unpacked(sample["starts.npy"]) for sample in found], rows.starts)
    else:
        assert all("entropy.npy" not in sample for sample in found)


def test_other_libraries_read_artifacts_with_an_empty_shard(tmp_path: Path) -> None:
    for container in CONTAINERS:
        for index, count in enumerate((2, 0, 3)):
            write_shard(tmp_path / f"{index:05d}{EXTENSION[container]}", some_rows(count), container)
    arrow = load_arrow(sorted(tmp_path.glob("*.arrow")), tmp_path / "cache")
    assert arrow["key"][:] == KEYS[:2] + KEYS[:3]
    assert [sample["json"]["key"] for sample in load_webdataset(sorted(tmp_path.glob("*.tar")))] == KEYS[:2] + KEYS[:3]


@pytest.mark.parametrize("container", CONTAINERS)
def test_equal_rows_give_equal_bytes_and_their_digest(tmp_path: Path, container: Container) -> None:
    (tmp_path / "elsewhere").mkdir()
    first = write_shard(tmp_path / "a", some_rows(), container)
    second = write_shard(tmp_path / "elsewhere" / "b", some_rows(), container)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "elsewhere" / "b").read_bytes()
    assert first == second == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    other = some_rows()
    other.codes[-1, -1, -1] ^= 1
    assert write_shard(tmp_path / "a", other, container) != first


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_interrupted_write_leaves_the_folder_unchanged(tmp_path: Path, container: Container) -> None:
    whole = some_rows()
    cut_short = Rows(keys=whole.keys, labels=whole.labels[:3], codes=whole.codes)  # fails after the first columns
    path = tmp_path / "shard"
    with pytest.raises((ValueError, IndexError)):
        write_shard(path, cut_short, container)
    assert list(tmp_path.iterdir()) == []
    write_shard(path, whole, container)
    before = path.read_bytes()
    with pytest.raises((ValueError, IndexError)):
        write_shard(path, cut_short, container)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 40), st.randoms(use_true_random=False))
def test_packing_and_unpacking_boundaries_is_a_round_trip(rows: int, views: int, n: int, random) -> None:
    starts = np.array([random.random() < 0.4 for _ in range(rows * views * n)], bool).reshape(rows, views, n)
    packed = pack_starts(starts)
    assert packed.dtype == np.uint8
    assert packed.shape == (rows, -(-views * n // 8))
    np.testing.assert_array_equal(unpack_starts(packed, views, n), starts)


def test_boundaries_are_packed_with_the_first_in_the_highest_bit() -> None:
    starts = np.zeros((1, 1, 10), bool)
    starts[0, 0, [0, 9]] = True
    assert pack_starts(starts).tolist() == [[0b10000000, 0b01000000]]
