import threading
from collections import Counter
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from shards.errors import ArtifactError
from shards.manifest import Container, Kind, Manifest, ShardInfo
from shards.reader import Artifact, Batch, open_artifact
from shards.rows import Rows
from shards.storage import Url
from shards.training_data import TrainingData
from shards.writer import ArtifactBuild

Place = TypeVar("Place", Path, Url)

CONTAINERS: tuple[Container, ...] = ("arrow", "webdataset")
SIZES = (5, 0, 9, 3, 7, 1, 4, 6, 8, 2, 5, 5)  # rows per shard: two windows
GRID, VIEWS, N = (2, 4), 3, 8
TOTAL = sum(SIZES)
BATCH = 12


def make(out: Place, container: Container, kind: Kind = "patches") -> Place:
    build = ArtifactBuild(out, settings={}, n_shards=len(SIZES), container=container)
    for index in build.todo():
        rng = np.random.default_rng(index)
        shape = (SIZES[index], VIEWS, N)
        starts = rng.random(shape) < 0.5
        starts[..., 0] = True
        rows = Rows(
            keys=[f"{index}/{i}" for i in range(SIZES[index])],
            labels=rng.integers(0, 9, SIZES[index]).astype(np.int32),
            codes=rng.integers(0, 2**16, shape).astype(np.uint16),
            entropy=rng.random(shape).astype(np.float16) if kind == "patches" else None,
            starts=starts if kind == "patches" else None,
        )
        build.add(index, rows)

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        return Manifest(
            kind=kind,
            container=container,
            grid=GRID,
            codebook_size=2**16,
            views=VIEWS,
            class_names=tuple("abcdefghi"),
            rows=TOTAL,
            shards=shards,
            settings={},
            source={},
            tokenizer={},
        )

    build.finish(manifest)
    return out


@pytest.fixture(scope="module", params=CONTAINERS)
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return make(tmp_path_factory.mktemp("data") / "a", request.param)


def same(one: Batch, other: Batch) -> None:
    for name in ("labels", "codes", "starts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_are_the_rows_and_views_of_their_order(folder: Path, streaming: bool) -> None:
    artifact = open_artifact(folder)
    with TrainingData(artifact, batch=BATCH, seed=1, streaming=streaming) as data:
        for step in range(3 * TOTAL // BATCH):
            same(data.batch(step), open_artifact(folder).gather(*data.order.batch(step)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_all_processes_form_the_global_batch(folder: Path, streaming: bool, processes: int) -> None:
    def shares(count: int, step: int) -> list[Batch]:
        found = []
        for rank in range(count):
            options = {"rank": rank, "world_size": count, "streaming": streaming}
            with TrainingData(open_artifact(folder), batch=BATCH, seed=1, **options) as data:  # type: ignore[arg-type]
                found.append(data.batch(step))
        return found

    for step in (0, 4, 9):
        (whole,) = shares(1, step)
        parts = shares(processes, step)
        assert [len(part.codes) for part in parts] == [BATCH // processes] * processes
        np.testing.assert_array_equal(np.concatenate([part.codes for part in parts]), whole.codes)


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_do_not_depend_on_the_order_of_requests(folder: Path, streaming: bool) -> None:
    with TrainingData(open_artifact(folder), batch=BATCH, seed=1, streaming=streaming) as data:
        straight = [data.batch(step) for step in range(12)]
    with TrainingData(open_artifact(folder), batch=BATCH, seed=1, streaming=streaming) as data:
        for step in (7, 8, 2, 3, 3, 11):
            same(data.batch(step), straight[step])


def test_a_batch_larger_than_the_data_takes_from_several_epochs(folder: Path) -> None:
    with TrainingData(open_artifact(folder), batch=3 * TOTAL, seed=1) as data:
        rows, _ = data.order.batch(0)
        assert np.bincount(rows).tolist() == [3] * TOTAL
        same(data.batch(0), open_artifact(folder).gather(*data.order.batch(0)))


def test_arrow_is_shuffled_and_webdataset_streamed_by_default(tmp_path: Path) -> None:
    orders = []
    for container in CONTAINERS:
        artifact = open_artifact(make(tmp_path / container, container))
        for streaming in (None, False, True):
            with TrainingData(artifact, batch=BATCH, seed=1, streaming=streaming) as data:
                orders.append(tuple(data.order.batch(0)[0]))
    assert orders[0] == orders[1] == orders[4]
    assert orders[2] == orders[3] == orders[5]
    assert orders[0] != orders[2]


class Counting(Artifact):
    """An artifact that counts how often each of its shards is opened."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact.folder, artifact.manifest)
        self.opened: Counter[int] = Counter()

    def _map(self, index: int):
        self.opened[index] += 1
        return super()._map(index)


def test_streaming_reads_each_shard_once_per_epoch(folder: Path) -> None:
    artifact = Counting(open_artifact(folder))
    with TrainingData(artifact, batch=5, seed=1, streaming=True) as data:
        for step in range(TOTAL // 5 - 1):  # the step that is read ahead is in this epoch too
            data.batch(step)
    assert all(1 <= artifact.opened[index] <= 2 for index in range(len(SIZES)))  # 2: the next epoch's, read ahead
    assert sum(artifact.opened.values()) <= len(SIZES) + 8


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_shard_is_named_when_its_batch_is_read(tmp_path: Path, streaming: bool) -> None:
    artifact = open_artifact(make(tmp_path / "a", "arrow"))
    for path in (tmp_path / "a").glob("0*"):
        path.unlink()
    with (
        TrainingData(artifact, batch=BATCH, seed=1, streaming=streaming) as data,
        pytest.raises(ArtifactError, match=r"shard .*\.arrow is missing"),
    ):
        data.batch(0)


def test_closing_stops_all_threads(folder: Path) -> None:
    before = threading.active_count()
    with TrainingData(open_artifact(folder), batch=BATCH, seed=1) as data:
        data.batch(0)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_a_batch_that_does_not_divide_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="a batch of 12 does not divide by 5 processes"):
        TrainingData(open_artifact(folder), batch=12, seed=1, world_size=5)


def test_a_part_of_a_batch_has_the_images_of_the_full_batch(folder: Path) -> None:
    with TrainingData(open_artifact(folder), batch=BATCH, seed=1) as data:
        whole = data.batch(0)
    part = whole.part(3, 7)
    np.testing.assert_array_equal(part.codes, whole.codes[3:7])
    np.testing.assert_array_equal(part.labels, whole.labels[3:7])
