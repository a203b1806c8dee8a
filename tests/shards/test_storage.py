"""Artifacts at URLs, on fsspec's memory:// and on web servers; tests/pipeline/test_urls.py has S3."""

import hashlib
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from numpy.typing import NDArray

from shards import storage
from shards.cache import ShardCache
from shards.errors import ArtifactError
from shards.manifest import BUILD, MANIFEST, Container, Manifest
from shards.reader import Artifact, Batch, open_artifact
from shards.storage import Url, entries, location
from shards.training_data import TrainingData
from tests.shards.builds import N_SHARDS, files, opened, run, shard_rows
from tests.shards.test_training_data import BATCH, SIZES, TOTAL, make
from tests.web import WebServer

CONTAINERS: tuple[Container, ...] = ("arrow", "webdataset")


@pytest.fixture(autouse=True)
def brief_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WAITS", (0.01,) * 4)


@pytest.fixture
def url() -> Iterator[Url]:
    place = location(f"memory://{uuid.uuid4().hex}/a")
    assert isinstance(place, Url)
    yield place
    memory = fsspec.filesystem("memory")
    for path in memory.find(place.partition("://")[2].partition("/")[0]):
        memory.rm_file(path)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    with WebServer(tmp_path / "web") as server:
        yield server


def objects(url: Url) -> dict[str, str]:
    names = entries(url).keys() - {BUILD}
    return {name: hashlib.sha256(storage.read_bytes(url / name)).hexdigest() for name in names}


def overwrite(url: Url, data: bytes) -> None:
    fsspec.filesystem("memory").pipe_file(url.partition("://")[2], data)


def shard_codes(artifact: Artifact, index: int) -> NDArray[np.uint16]:
    return artifact.shard_rows(index).codes


def same(one: Batch, other: Batch) -> None:
    for name in ("labels", "codes", "starts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_urls_stay_urls_and_paths_stay_paths() -> None:
    assert location("s3://bucket/codes/") == Url("s3://bucket/codes")
    assert location("s3://bucket/codes") / "a.tar" == Url("s3://bucket/codes/a.tar")
    assert location("a//b/") == Path("a/b")
    assert location("file:///data/my%20codes") == Path("/data/my codes")


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_artifact_at_a_url_has_the_same_bytes_as_on_disk(tmp_path: Path, url: Url, container: Container) -> None:
    run(tmp_path / "a", container)
    run(url, container)
    assert objects(url) == files(tmp_path / "a")


def test_a_second_run_writes_only_the_shards_that_the_first_did_not(tmp_path: Path, url: Url) -> None:
    build = opened(url)
    for index in build.todo():
        build.add(index, shard_rows(index))
        if index == 4:
            break
    with pytest.raises(ArtifactError, match=f"{url} is not finished: rerun the command that makes it"):
        open_artifact(url)
    assert list(opened(url).todo()) == list(range(5, N_SHARDS))
    run(url)
    run(tmp_path / "a")
    read, expected = open_artifact(url), open_artifact(tmp_path / "a")
    assert [shard.sha256 for shard in read.manifest.shards] == [shard.sha256 for shard in expected.manifest.shards]
    assert BUILD not in entries(url)


def test_processes_start_at_different_places_and_skip_what_others_finished(url: Url) -> None:
    one, other = opened(url), opened(url)
    first, second = one.todo(0, 2), other.todo(1, 2)
    order = []
    for _ in range(N_SHARDS // 2):
        for build, todo in ((one, first), (other, second)):
            index = next(todo)
            build.add(index, shard_rows(index))
            order.append(index)
    assert order == [index for pair in zip(range(6), range(6, 12), strict=True) for index in pair]
    one.records._valid_until = other.records._valid_until = 0.0  # type: ignore[union-attr]
    assert [*first, *second] == []


def test_which_shards_are_unfinished_takes_a_listing_and_not_a_request_per_shard(
    url: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = opened(url)
    for index in (0, 7):
        build.add(index, shard_rows(index))
    memory, requests = type(fsspec.filesystem("memory")), list[str]()

    def count(name: str) -> None:
        request = getattr(memory, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            requests.append(name)
            return request(*arguments, **options)

        monkeypatch.setattr(memory, name, counted)

    for name in ("ls", "info", "cat_file"):
        count(name)
    assert build.unfinished() == [index for index in range(N_SHARDS) if index not in (0, 7)]
    assert requests.count("ls") == 1
    assert len(requests) < 5


@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_that_was_damaged_at_the_url_is_written_again(tmp_path: Path, url: Url, finished: bool) -> None:
    if finished:
        run(url)
    else:
        build = opened(url)
        for index in build.todo():
            build.add(index, shard_rows(index))
    data = storage.read_bytes(url / "00003.arrow")
    overwrite(url / "00003.arrow", data[:-40] + bytes(40))
    storage.remove([url / "00007.arrow"])
    assert list(opened(url).todo()) == [3, 7]
    run(url)
    run(tmp_path / "a")
    assert objects(url).keys() == files(tmp_path / "a").keys()
    assert objects(url)["00003.arrow"] == files(tmp_path / "a")["00003.arrow"]


def test_a_late_process_leaves_no_records_in_a_finished_artifact(url: Url) -> None:
    late = opened(url)
    todo = late.todo()
    index = next(todo)
    run(url)
    late.add(index, shard_rows(index))
    assert late.finish(lambda shards: pytest.fail("the manifest is there")) is not None
    assert BUILD not in entries(url)


def test_other_settings_and_foreign_files_are_refused_at_a_url(url: Url) -> None:
    run(url)
    with pytest.raises(ArtifactError, match=r"made with other settings: .*threshold was 1\.5 and is now 2"):
        opened(url, settings={"threshold": 2})
    replaced = opened(url, settings={"threshold": 2}, overwrite=True)
    assert len(list(replaced.todo())) == N_SHARDS
    foreign = url.with_name("b")
    overwrite(foreign / "letter.txt", b"Dear")
    with pytest.raises(ArtifactError, match="holds something else"):
        opened(foreign)


def test_processes_that_replace_an_artifact_together_keep_the_new_one(url: Url) -> None:
    run(url)
    new: dict[str, Any] = {"settings": {"threshold": 2}, "overwrite": True}
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(opened, url, share=(1, 2), **new)
        time.sleep(0.5)
        assert MANIFEST in entries(url)
        first = opened(url, share=(0, 2), **new)
        index = next(first.todo(0, 2))
        first.add(index, shard_rows(index))
        assert list(second.result().todo(1, 2)) == [*range(6, 12), *range(1, 6)]


def test_missing_shards_and_those_of_another_size_are_named_when_an_artifact_is_opened(url: Url) -> None:
    run(url)
    storage.remove([url / "00001.arrow"])
    overwrite(url / "00002.arrow", b"short")
    with pytest.raises(ArtifactError, match=r"2 of 12 shards .* 00001.arrow \(missing\), 00002.arrow \(its size is 5"):
        open_artifact(url)


def test_a_shard_that_was_replaced_under_a_reader_is_refused_by_its_name(url: Url) -> None:
    make(url, "arrow")
    artifact = open_artifact(url)
    data = storage.read_bytes(url / "00003.arrow")
    overwrite(url / "00003.arrow", data[:-40] + bytes(40))
    storage.remove([url / "00005.arrow"])
    overwrite(url / "00006.arrow", data[:99])
    with pytest.raises(ArtifactError, match=r"00003.arrow is damaged: its SHA-256 differs from the manifest's"):
        artifact.shard_rows(3)
    with pytest.raises(ArtifactError, match=r"00005.arrow is missing"):
        artifact.shard_rows(5)
    with pytest.raises(ArtifactError, match=r"00006.arrow has fewer bytes than its manifest says"):
        artifact.shard_rows(6)
    assert [name for name, _ in artifact.damaged()] == ["00003.arrow", "00005.arrow", "00006.arrow"]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("cache_bytes", [1, 10**9])
def test_training_from_a_url_reads_the_batches_that_streaming_from_disk_reads(
    tmp_path: Path, url: Url, container: Container, cache_bytes: int
) -> None:
    make(tmp_path / "a", container)
    make(url, container)
    cache = ShardCache(tmp_path / "cache", cache_bytes)
    on_disk = TrainingData(open_artifact(tmp_path / "a"), batch=BATCH, seed=1, streaming=True)
    with on_disk, TrainingData(open_artifact(url, cache=cache), batch=BATCH, seed=1) as data:
        for step in range(3 * TOTAL // BATCH):
            same(data.batch(step), on_disk.batch(step))
    for rank in range(2):
        artifact = open_artifact(url, cache=cache)
        with TrainingData(artifact, batch=BATCH, seed=1, rank=rank, world_size=2) as data:
            for step in (0, 4):
                with TrainingData(open_artifact(tmp_path / "a"), batch=BATCH, seed=1, streaming=True) as whole:
                    same(data.batch(step), whole.batch(step).part(rank * BATCH // 2, (rank + 1) * BATCH // 2))


def test_later_runs_read_the_cache_without_the_network(tmp_path: Path, url: Url) -> None:
    make(url, "arrow")
    expected = [shard_codes(open_artifact(url, cache=ShardCache(tmp_path, 10**9)), index) for index in range(3)]
    artifact = open_artifact(url, cache=ShardCache(tmp_path, 10**9))
    storage.remove([url / name for name in entries(url)])
    for index, codes in enumerate(expected):
        np.testing.assert_array_equal(shard_codes(artifact, index), codes)


def test_a_damaged_shard_in_the_cache_is_downloaded_again(tmp_path: Path, url: Url) -> None:
    make(url, "arrow")
    codes = shard_codes(open_artifact(url, cache=ShardCache(tmp_path, 10**9)), 3)
    (path,) = [path for path in tmp_path.iterdir() if path.suffix == ""]
    data = path.read_bytes()
    path.write_bytes(data[:-40] + bytes(40))
    np.testing.assert_array_equal(shard_codes(open_artifact(url, cache=ShardCache(tmp_path, 10**9)), 3), codes)
    assert path.read_bytes() == data


def test_a_cache_keeps_the_most_recent_shards_within_its_size_and_no_other_file_is_touched(
    tmp_path: Path, url: Url
) -> None:
    make(url, "arrow")
    (tmp_path / "mine.txt").write_text("keep")
    shards = open_artifact(url).manifest.shards
    most = (shards[0].bytes or 0) + max(shards[index].bytes or 0 for index in (3, 4))
    artifact = open_artifact(url, cache=ShardCache(tmp_path, most))
    for index in (0, 3, 0, 4):
        artifact.shard_rows(index)
        sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir() if re.fullmatch("[0-9a-f]{64}", p.name)}
        assert sum(sizes.values()) <= most
    assert sizes.keys() == {shards[index].sha256 for index in (0, 4)}
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", "", ".lock", ".lock", ".txt"]


def test_a_shard_that_several_readers_want_at_once_is_downloaded_once(tmp_path: Path, web: WebServer) -> None:
    make(web.folder / "a", "webdataset")
    readers = [open_artifact(f"{web.url}/a", cache=ShardCache(tmp_path / "cache", 10**9)) for _ in range(4)]
    start = threading.Barrier(4)

    def read(reader: Artifact) -> int:
        start.wait()
        return len(reader.shard_rows(2))

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, readers)) == {SIZES[2]}
    assert web.requests.count("/a/00002.tar") == 1


def test_an_interrupted_download_resumes(web: WebServer) -> None:
    data = np.random.default_rng(0).bytes(3 * 2**20)
    (web.folder / "file").write_bytes(data)
    web.most_bytes = 2**18  # of every answer
    url = location(f"{web.url}/file")
    assert isinstance(url, Url)
    assert b"".join(storage.pieces(url, len(data))) == data
    assert web.sent < 2 * len(data)


def test_a_request_without_an_answer_is_retried(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SILENCE", 0.5)
    (web.folder / "file").write_bytes(b"x" * 5000)
    web.silent = 1
    url = location(f"{web.url}/file")
    assert isinstance(url, Url)
    assert b"".join(storage.pieces(url, 5000)) == b"x" * 5000
    assert "ended in silence" not in web.requests


def test_a_server_without_ranges_is_read_too(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PIECE", 1000)
    make(web.folder / "a", "arrow")
    web.ranges = False
    expected = open_artifact(web.folder / "a").shard_rows(3)
    np.testing.assert_array_equal(open_artifact(f"{web.url}/a").shard_rows(3).codes, expected.codes)


def test_an_unavailable_file_is_named_after_all_tries(web: WebServer) -> None:
    make(web.folder / "a", "arrow")
    artifact = open_artifact(f"{web.url}/a")
    web.refused = "/a/00003.arrow"
    with pytest.raises(ArtifactError, match=rf"{web.url}/a/00003.arrow cannot be read after 5 tries.*503"):
        artifact.shard_rows(3)
    assert web.requests.count("/a/00003.arrow") == 5


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("gs://bucket/a", r"gs://bucket/a.*: gs:// needs a package that is not installed: pip install 'dpar\[gs\]'"),
        ("s3://bucket/a", r"s3://bucket/a.*: s3:// needs a package that is not installed: pip install 'dpar\[s3\]'"),
        ("sea://bucket/a", r"sea://bucket/a.*: this kind of URL is not supported"),
    ],
)
def test_a_url_that_needs_another_package_is_refused_with_its_name(
    place: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for name in ("gs", "s3"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, name, raising=False)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(place)
    with pytest.raises(ArtifactError, match=message):
        opened(location(place))


class LikeGoogles(MemoryFileSystem):
    """A store that reports what is missing as gcsfs does: by the address of its API, which has the bucket's name."""

    protocol = "like-googles"

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        raise FileNotFoundError(f"b/{self._strip_protocol(path).strip('/').replace('/', '/o/', 1)}")

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        raise FileNotFoundError(f"https://storage.googleapis.com/upload/storage/v1/b/{rpath.strip('/')}")

    pipe_file = put_file


def test_a_missing_directory_in_a_bucket_of_google_is_not_a_missing_bucket(tmp_path: Path) -> None:
    fsspec.register_implementation("like-googles", LikeGoogles, clobber=True)
    url = location("like-googles://region-bucket/codes")
    assert isinstance(url, Url)
    assert entries(url) == {}
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=rf"{url}/file cannot be written: there is no such bucket. Create it"):
        storage.put(tmp_path / "file", url / "file")


def test_nothing_is_written_to_a_web_server() -> None:
    with pytest.raises(ArtifactError, match=r"https://example.org/a cannot be written: https:// is read-only"):
        opened(location("https://example.org/a"))


def test_a_web_server_without_the_artifact_is_one_message(web: WebServer) -> None:
    with pytest.raises(ArtifactError, match=rf"{web.url}/a is not an artifact: it has no {MANIFEST}"):
        open_artifact(f"{web.url}/a")
    build = opened(web.folder / "a")
    with pytest.raises(ArtifactError, match=f"{web.url}/a is not finished"):
        open_artifact(f"{web.url}/a")
    build.close()


def test_a_manifest_cannot_name_a_file_outside_the_cache(tmp_path: Path, url: Url) -> None:
    run(url)
    text = storage.read_bytes(url / MANIFEST).decode()
    digest = Manifest.read(url).shards[0].sha256
    overwrite(url / MANIFEST, text.replace(digest, "../../outside").encode())
    with pytest.raises(ArtifactError, match=r"'\.\./\.\./outside' is not a SHA-256"):
        open_artifact(url, cache=ShardCache(tmp_path / "cache", 10**9)).shard_rows(0)
