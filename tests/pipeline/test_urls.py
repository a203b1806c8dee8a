"""Artifacts in buckets and on web servers: a real S3 server (moto) and a web server that breaks connections."""

import hashlib
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
import torch
from PIL import Image
from typer.testing import CliRunner

from cli import app
from dpar import VQConfig, VQTokenizer
from pipeline.inspect import inspect
from pipeline.settings.artifacts import InspectSettings
from shards import storage
from shards.errors import ArtifactError
from shards.manifest import BUILD, MANIFEST
from shards.reader import open_artifact
from shards.storage import Url, entries, location
from tests.object_store import object_store
from tests.pipeline.trained import EXACT, QUIET, build, ends, lines_of, results, together, weights
from tests.pipeline.trained import run as train
from tests.shards.builds import files, opened, start
from tests.shards.builds import run as write
from tests.web import WebServer

PLAIN: dict[str, Any] = {"container": "webdataset", "sizes": (9, 0, 8, 5, 4, 3, 6, 7, 2, 9, 1)}  # two windows of shards
EPOCH: dict[str, Any] = {"steps": 7, "batch": 8, "sheet": 0}  # a little more than an epoch


@pytest.fixture(autouse=True)
def brief_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WAITS", (0.01,) * 4)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address of an S3 server with one bucket; s3fs finds it, and credentials, in the environment."""
    with object_store() as address:
        yield address


@pytest.fixture
def bucket(endpoint: str, request: pytest.FixtureRequest) -> Url:
    """A directory of the bucket for one test."""
    place = location(f"s3://bucket/{hashlib.md5(request.node.name.encode()).hexdigest()}")
    assert isinstance(place, Url)
    return place


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    with WebServer(tmp_path / "web") as server:
        yield server


def objects(url: Url) -> dict[str, str]:
    names = entries(url).keys() - {BUILD}
    return {name: hashlib.sha256(storage.read_bytes(url / name)).hexdigest() for name in names}


def dpar(*arguments: object) -> None:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)


@pytest.mark.slow
def test_commands_on_a_bucket_equal_those_of_a_local_run(tmp_path: Path, bucket: Url) -> None:
    rng = np.random.default_rng(0)
    for i in range(20):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    torch.manual_seed(0)
    config = VQConfig(codebook_size=16, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)
    VQTokenizer(config).save_pretrained(tmp_path / "vq")
    encode = ("--tokenizer", tmp_path / "vq", "--image-size", 8, "--shard-size", 2, "--container", "webdataset")
    cut = ("--strategy", "static", "--static-length", 2)
    recipe = ("--model", "dpar-tiny", "--steps", 4, "--batch", 8, "--log-every", 1, "--sheet", 0, "--device", "cpu")
    places: dict[str, Any] = {"here": tmp_path / "here", "there": bucket}
    numbers = {}
    for name, place in places.items():
        dpar("tokenize", tmp_path / "photos", place / "codes", *encode)
        dpar("patchify", place / "codes", place / "patches", *cut)
        dpar("train", place / "patches", tmp_path / name / "run", *recipe, "--cache", tmp_path / "cache")
        dpar("inspect", place / "patches", "--verify")
        look = InspectSettings(images=0, verify=True)
        numbers[name] = inspect(place / "patches", None, look, QUIET).to_json() | {"artifact": None}
    for stage in ("codes", "patches"):
        assert objects(bucket / stage) == files(tmp_path / "here" / stage)
    assert numbers["here"] == numbers["there"]
    assert results(tmp_path / "here" / "run") == results(tmp_path / "there" / "run")
    digests = {path.name for path in (tmp_path / "cache").iterdir() if path.suffix == ""}
    assert digests == {shard.sha256 for shard in open_artifact(bucket / "patches").manifest.shards}


@pytest.mark.slow
def test_killed_writers_to_a_bucket_leave_no_partial_shard_and_resume_to_the_same_bytes(
    tmp_path: Path, bucket: Url
) -> None:
    write(tmp_path / "a")
    expected = files(tmp_path / "a")
    for kill in range(2):
        process = start(bucket, "arrow", 0, 1, 0.05, 0)
        while process.poll() is None and len(entries(bucket / BUILD)) < 3 * kill + 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.communicate()
        left = objects(bucket)
        assert MANIFEST not in left
        assert {name: expected[name] for name in left if name[0].isdigit()} == {
            name: digest for name, digest in left.items() if name[0].isdigit()
        }
        recorded = [int(name[:5]) for name in entries(bucket / BUILD) if name[0].isdigit()]
        assert not set(opened(bucket).todo()) & set(recorded)
    write(bucket)
    assert objects(bucket) == expected


def test_a_missing_bucket_is_one_message_for_readers_and_writers(tmp_path: Path, endpoint: str) -> None:
    gone = location("s3://another-bucket/codes")
    with pytest.raises(ArtifactError, match=r"^s3://another-bucket/codes cannot be listed: there is no such bucket"):
        open_artifact(gone)
    with pytest.raises(ArtifactError, match=r"^s3://another-bucket/codes cannot be listed: there is no such bucket"):
        opened(gone)


def test_a_forbidden_bucket_is_one_message_for_readers_and_writers(bucket: Url, endpoint: str) -> None:
    def require_keys(after: bytes) -> None:
        request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", after, {"Content-Type": "text/plain"})
        urllib.request.urlopen(request).close()

    require_keys(b"0")
    try:
        with pytest.raises(ArtifactError, match=f"^{bucket} cannot be listed: permission denied .*Check the creden"):
            open_artifact(bucket)
        with pytest.raises(ArtifactError, match=f"^{bucket} cannot be listed: permission denied .*Check the creden"):
            opened(bucket)
    finally:
        require_keys(b"inf")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-west-1'"),
        (301, "PermanentRedirect", "The bucket must be addressed using the specified endpoint"),
    ],
)
def test_a_bucket_in_another_region_is_one_message(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str
) -> None:
    """moto accepts every region, so this uses a server that answers like S3."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(ArtifactError, match=r"another region.* Set AWS_DEFAULT_REGION to the region of the bucket"):
            open_artifact("s3://bucket/codes")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        server.server_close()


def test_training_refuses_an_artifact_that_is_still_being_written(tmp_path: Path, bucket: Url) -> None:
    opened(bucket)
    with pytest.raises(ArtifactError, match=f"^{bucket} is not finished: rerun the command that makes it"):
        train(bucket, tmp_path / "run")


@pytest.mark.parametrize("arguments", [("train", "a", "s3://b/run"), ("train", "a", "run", "--cache", "s3://b/c")])
def test_a_url_in_place_of_a_local_folder_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert f"{arguments[-1]} is a URL; only a path on this machine is possible here" in " ".join(done.output.split())


@pytest.mark.slow
def test_training_over_connections_that_break_gives_the_losses_of_a_local_run(tmp_path: Path, web: WebServer) -> None:
    build(web.folder / "patches", **PLAIN)
    expected = train(web.folder / "patches", tmp_path / "local", **EPOCH)
    web.most_bytes = 5000
    assert (open_artifact(web.folder / "patches").manifest.shards[0].bytes or 0) > 2 * web.most_bytes
    assert train(location(f"{web.url}/patches"), tmp_path / "remote", **EPOCH)["loss"] == expected["loss"]
    assert results(tmp_path / "remote") == results(tmp_path / "local")
    for name, tensor in weights(tmp_path / "local").items():
        assert torch.equal(tensor, weights(tmp_path / "remote")[name])


@pytest.mark.slow
def test_an_unavailable_shard_ends_training_with_its_name_and_the_run_resumes(tmp_path: Path, web: WebServer) -> None:
    build(web.folder / "patches", **PLAIN)
    url = location(f"{web.url}/patches")
    settings: dict[str, Any] = {**EPOCH, "checkpoint_every": 2}
    train(web.folder / "patches", tmp_path / "local", **settings)
    web.refused = "/patches/00003.tar"
    with pytest.raises(ArtifactError, match=rf"{url}/00003\.tar cannot be read after 5 tries"):
        train(url, tmp_path / "remote", **settings)
    assert lines_of(tmp_path / "remote") < EPOCH["steps"]
    web.refused = None
    train(url, tmp_path / "remote", **settings)
    assert results(tmp_path / "remote") == results(tmp_path / "local")


@pytest.mark.slow
def test_the_processes_of_a_machine_download_each_shard_once_into_their_cache(tmp_path: Path, web: WebServer) -> None:
    build(web.folder / "patches", **PLAIN)
    settings: dict[str, Any] = {**EPOCH, **EXACT, "cache": tmp_path / "cache"}
    ends(together(location(f"{web.url}/patches"), tmp_path / "run", **settings))
    gets = [path for path in web.requests if path.endswith(".tar")]
    assert sorted(gets) == sorted(set(gets))
    assert len(gets) == len(PLAIN["sizes"])
    train(web.folder / "patches", tmp_path / "local", **settings)
    for (_, *ours), (_, *expected) in zip(results(tmp_path / "run"), results(tmp_path / "local"), strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)
