"""Reading artifacts: rows, views and keys, with few shards open and little memory."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.manifest import Container, Kind
from shards.reader import Artifact, open_artifact
from shards.rows import Rows
from shards.shard_files import Shard
from tests.shards.small_artifacts import CONTAINERS, SIZES, TOTAL, VIEWS, make, shard_rows, write_artifact

PICKS = st.lists(st.tuples(st.integers(0, TOTAL - 1), st.integers(0, VIEWS - 1)), max_size=25)


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
