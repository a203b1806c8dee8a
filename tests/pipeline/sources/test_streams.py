"""WebDataset tars over the network: real servers on this machine, some of which fail, change or refuse."""

import io
import json
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.runtime.errors import StageError
from pipeline.sources import IndexedSource, Item, LeftOut, Source, open_indexed, open_source, remote, require_indexed
from pipeline.sources.tar_stream import TarStream
from shards import storage


def image(colour: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(colour).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def tar_of(samples: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer) as writer:
        for sample in samples:
            writer.write(sample)
    return buffer.getvalue()


def numbered(first: int, count: int) -> bytes:
    return tar_of([{"__key__": f"{i:05d}", "png": image(i), "cls": i % 7} for i in range(first, first + count)])


class Server:
    """Files over HTTP. ``hook`` may answer a request itself, by giving True; ``requests`` counts those for a range."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.hook: Callable[[BaseHTTPRequestHandler, int], bool] = lambda handler, start: False
        self.ranges = True
        self.requests = 0
        self.url = ""


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    server = Server(files)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(head=True)

        def do_GET(self) -> None:
            self._answer(head=False)

        def _answer(self, head: bool) -> None:
            data = server.files.get(self.path[1:])
            if data is None:
                self.send_error(404)
                return
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if server.ranges else None
            start, end = (int(asked[1]), min(int(asked[2]) + 1, len(data))) if asked else (0, len(data))
            if not head:
                server.requests += 1
                if server.hook(self, start):
                    return
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(end - start))
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            self.send_header("ETag", f'"{hash(data)}"')
            self.end_headers()
            if not head:
                self.wfile.write(data[start:end])

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def drop_half_way(handler: BaseHTTPRequestHandler, start: int) -> bool:
    handler.send_response(206)
    handler.send_header("Content-Length", "100000")
    handler.send_header("Content-Range", f"bytes {start}-{start + 99999}/1000000")
    handler.end_headers()
    handler.wfile.write(b"x" * 500)
    handler.close_connection = True
    return True


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE", 4096)


def stream(server: Server, names: str = "t-{000..002}.tar", **options: Any) -> TarStream:
    from pipeline.sources.locations import expand

    location = f"{server.url}/{names}"
    return TarStream(expand(location), location=location, waits=(0.0, 0.0, 0.0, 0.0), **options)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving({f"t-{i:03d}.tar": numbered(5 * i, 5) for i in range(3)}) as server:
        yield server


def items(source: Source, part: int | None = None) -> list[Item]:
    parts = range(source.n_parts(1000)) if part is None else [part]
    found = [item for index in parts for item in source.part(index, 1000)]
    assert all(isinstance(item, Item) for item in found)
    return [item for item in found if isinstance(item, Item)]


def content(items: list[Item]) -> list[tuple[str, int, bytes]]:
    return [(item.key, item.label, item.load().tobytes()) for item in items]


def test_tars_over_http_equal_local_tars(tmp_path: Path, server: Server) -> None:
    for name, data in server.files.items():
        (tmp_path / name).write_bytes(data)
    local = open_indexed(str(tmp_path / "t-{000..002}.tar"))
    source = open_source(f"{server.url}/t-{{000..002}}.tar")
    assert not isinstance(source, IndexedSource)
    assert source.n_items is None
    assert source.n_parts(2) == 3
    assert content(items(source)) == [(local.key(i), local.label(i), local.load(i).tobytes()) for i in range(15)]
    assert source.name_classes(7) == local.class_names == tuple("0123456")


def test_tars_in_any_file_system_of_fsspec_are_read() -> None:
    with fsspec.open("memory://dpar-test/a.tar", "wb") as file:
        file.write(numbered(0, 4))
    assert [item.key for item in items(open_source("memory://dpar-test/a.tar"))] == [f"a/{i:05d}" for i in range(4)]


def test_listing_reads_no_image_and_a_part_only_its_own_tar(server: Server) -> None:
    source = stream(server)
    assert server.requests == 0
    items(source, part=1)
    assert 0 < server.requests <= -(-len(server.files["t-001.tar"]) // 4096)


def test_a_stream_can_be_pickled(server: Server) -> None:
    source = stream(server)
    assert content(items(pickle.loads(pickle.dumps(source)))) == content(items(source))


def test_interrupted_reads_resume(server: Server) -> None:
    undisturbed = content(items(stream(server)))
    seen: list[int] = []

    def breaks(handler: BaseHTTPRequestHandler, start: int) -> bool:
        seen.append(start)
        if seen.count(start) == 1:
            return drop_half_way(handler, start)
        if seen.count(start) == 2:
            handler.send_error(503)
            return True
        return False

    server.hook = breaks
    assert content(items(stream(server))) == undisturbed
    assert len(seen) > 20


def test_a_request_without_an_answer_is_repeated(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SILENCE", 0.5)
    undisturbed = content(items(stream(server)))
    answer, unanswered = threading.Event(), [4096]

    def waits(handler: BaseHTTPRequestHandler, start: int) -> bool:
        if start not in unanswered:
            return False
        unanswered.remove(start)
        answer.wait()
        return True

    server.hook = waits
    try:
        assert content(items(stream(server))) == undisturbed
    finally:
        answer.set()
    assert not unanswered


def test_a_read_interrupted_five_times_is_an_error_that_names_the_byte(server: Server) -> None:
    server.hook = lambda handler, start: start > 8000 and drop_half_way(handler, start)
    source = stream(server)
    server.requests = 0
    with pytest.raises(
        StageError, match=r"t-000\.tar: broke off at byte 8192 after 5 tries .*finished shards are kept, run the same"
    ):
        items(source)
    assert server.requests == 2 + 5


def test_a_missing_server_is_an_error_and_the_read_resumes_when_it_is_back(server: Server) -> None:
    source = stream(server)
    kept = dict(server.files)
    server.files.clear()
    with pytest.raises(StageError, match=r"t-000\.tar: no such file"):
        items(source)
    server.files.update(kept)
    assert len(items(source)) == 15


def test_an_unreachable_server_is_one_message() -> None:
    with pytest.raises(StageError, match=r"a\.tar: cannot be reached after 2 tries"):
        TarStream(["http://127.0.0.1:9/a.tar"], location="x", waits=(0.0,))


@pytest.mark.parametrize("when", ["before", "while it breaks off", "while it is read"])
def test_a_tar_that_changes_after_it_was_listed_is_an_error(server: Server, when: str) -> None:
    name = "t-000.tar"
    source = stream(server)
    other = bytearray(server.files[name])
    other[700] ^= 1  # as long as before

    def change(handler: BaseHTTPRequestHandler, start: int) -> bool:
        if when != "before" and start > 0:
            first_time = server.files[name] != bytes(other)
            server.files[name] = bytes(other)
            return when == "while it breaks off" and first_time and drop_half_way(handler, start)
        return False

    if when == "before":
        server.files[name] = bytes(other)
    server.hook = change
    with pytest.raises(StageError, match=r"t-000\.tar: has changed since it was listed .* run again with --overwrite"):
        items(source)


def test_a_server_without_ranges_is_refused_with_the_advice_to_download(server: Server) -> None:
    server.ranges = False
    with pytest.raises(StageError, match=r"t-000\.tar: cannot be read from the middle .* download it first"):
        items(stream(server))


def test_a_tar_cut_short_on_the_server_is_an_error(server: Server) -> None:
    server.files["t-000.tar"] = server.files["t-000.tar"][:6000]
    with pytest.raises(StageError, match=r"t-000\.tar: ends at byte 6000"):
        items(stream(server))


def test_chosen_numbers_are_renumbered_in_their_order(server: Server) -> None:
    source = stream(server, classes=["6", "2"])
    assert source.class_names == source.name_classes(1) == ("2", "6")
    assert [(item.key, item.label) for item in items(source)] == [
        ("t-000/00002", 0),
        ("t-001/00006", 1),
        ("t-001/00009", 0),
        ("t-002/00013", 1),
    ]
    with pytest.raises(
        StageError, match=r"no class 'cat' in .*: the classes of tars read over the network are numbers"
    ):
        stream(server, classes=["cat"])


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 10, 15, 99])
def test_a_limit_is_shared_evenly_by_the_tars(server: Server, limit: int) -> None:
    source = stream(server, limit=limit)
    counts = [len(items(source, part)) for part in range(3)]
    assert sum(counts) == min(limit, 15)
    assert max(counts) - min(counts) <= 1
    assert items(source, 0)[0].key == "t-000/00000"


def test_text_labels_are_refused_with_a_remedy() -> None:
    message = r"the label of 'a' is text \('cat'\).* download the tars"
    tar = tar_of([{"__key__": "a", "png": image(0), "cls": "cat"}])
    with serving({"t.tar": tar}) as server, pytest.raises(StageError, match=message):
        items(stream(server, "t.tar"))


def test_unusable_images_are_left_out_in_order() -> None:
    samples: list[dict[str, Any]] = [
        {"__key__": "a", "png": image(0), "cls": 1},
        {"__key__": "b", "png": image(1), "txt": "no label"},
        {"__key__": "c", "png": image(2), "json": b"{"},
        {"__key__": "d", "txt": "no image"},
        {"__key__": "e", "png": image(3), "json": {"label": 4}},
        {"__key__": "a", "png": image(4), "cls": 1},
    ]
    with serving({"t.tar": tar_of(samples)}) as server:
        found = list(stream(server, "t.tar").part(0, 1))
    assert [x if isinstance(x, LeftOut) else (x.key, x.label) for x in found] == [
        ("t/a", 1),
        LeftOut("t/b", "no label"),
        LeftOut("t/c", "its json is not valid JSON"),
        ("t/e", 4),
        LeftOut("t/a", "key occurs twice"),
    ]


def test_finding_images_of_a_stream_by_key_reads_only_their_tars(server: Server) -> None:
    source = stream(server)
    by_key = {item.key: item.load().tobytes() for item in items(source)}
    server.requests = 0
    found = source.find(["t-002/00012", "t-002/00010", "t-009/1"])
    assert {key: load().tobytes() for key, load in found.items()} == {
        key: by_key[key] for key in ("t-002/00010", "t-002/00012")
    }
    assert server.requests <= -(-len(server.files["t-002.tar"]) // 4096)


def test_tars_of_one_name_in_two_places_have_different_keys() -> None:
    with serving({"a/0.tar": numbered(0, 1), "b/0.tar": numbered(0, 1)}) as server:
        assert [item.key for item in items(stream(server, "{a,b}/0.tar"))] == ["a/0/00000", "b/0/00000"]


def test_a_description_is_json_and_its_listing_covers_tars_and_sizes(server: Server) -> None:
    described = json.loads(json.dumps(stream(server).describe()))
    assert described["kind"] == "webdataset-stream"
    assert described["images"] is None
    again = open_source(described["location"]).describe()
    assert again == described
    server.files["t-000.tar"] += b"\0" * 512
    assert stream(server).describe()["listing_sha256"] != described["listing_sha256"]


def test_random_access_to_a_stream_is_refused_with_a_remedy(server: Server) -> None:
    with pytest.raises(StageError, match=r"is read sequentially over the network.* download the tars first"):
        require_indexed(stream(server))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("pipe:touch /tmp/owned.tar", "pipe: would run a command"),
        ("http://x/a.tar::pipe:touch x.tar", "pipe: would run a command"),
        ("http://x/images.zip", "over the network only tars are read"),
        ("nosuch://x/a.tar", "this kind of URL is not supported"),
        ("http://x/{a.tar", "its braces cannot be read|over the network only tars"),
        ("http://x/{a,a}.tar", "names http://x/a.tar twice"),
    ],
)
def test_unsupported_urls_are_refused(data: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        open_source(data)
