"""``--engine ray`` on a real cluster: nodes are raylets on this machine, with workers of their own."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.evaluate import evaluate
from pipeline.patchify import patchify
from pipeline.runtime.errors import StageError
from pipeline.sample import sample_pictures
from pipeline.settings.artifacts import PatchifySettings, TokenizeSettings
from pipeline.settings.sampling import EvalSettings, SampleSettings
from pipeline.tokenize import tokenize
from shards.storage import Url, entries, read_bytes
from tests.kill_campaign.outputs import Folder, rewritten, stamps
from tests.kill_campaign.victims import ROOT, send
from tests.object_store import BUCKET, object_store
from tests.pipeline.sampled import CPU, QUIET, RULE, SIZE, everything, save_home, save_run
from tests.ray_nodes import NODE, PATIENCE, ray_cluster, raylet, workers

RAY: dict[str, Any] = {**CPU, "engine": "ray"}
ONE: dict[str, Any] = {**RAY, "ray_workers": 1}  # for what several workers would only make slower

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, weights, artifacts and a run, all made by one process; 40 shards of codes in `small/`."""
    home = tmp_path_factory.mktemp("home")
    save_home(home, ("bird", "cat"), 20)
    save_run(home / "run", home / "patches", "dpar-tiny")
    tokenize(str(home / "photos"), home / "small", encode(home), QUIET)
    return home


@pytest.fixture(scope="module")
def bucket() -> Iterator[Url]:
    """A bucket of an S3 server whose address and credentials are in the environment."""
    with object_store():
        yield Url(f"s3://{BUCKET}")


@pytest.fixture(scope="module")
def cluster(bucket: Url) -> Iterator[Cluster]:
    """Two nodes with one CPU each, whose workers inherit the environment of this process."""
    with ray_cluster(1) as cluster:
        ray.init(cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()


def encode(home: Path, **options: Any) -> TokenizeSettings:
    return TokenizeSettings(**{"tokenizer": str(home / "vq"), "image_size": SIZE, "shard_size": 1, **CPU, **options})


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_when_a_node_joins_and_one_is_lost_the_bytes_are_those_of_one_process_and_no_shard_is_written_twice(
    home: Path, cluster: Cluster, tmp_path: Path
) -> None:
    out = Folder(tmp_path / "codes")
    first, lost = cluster.list_all_nodes()

    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(tokenize, str(home / "photos"), out.path, encode(home, **RAY), QUIET)
        wait_until(lambda: stamps(out) or run.done())
        stopped = [*workers(first), *workers(lost)]
        send(signal.SIGSTOP, stopped)  # while they hold claims on shards
        try:
            written = len(stamps(out))
            cluster.add_node(**NODE)
            wait_until(lambda: len(stamps(out)) > written)  # only the new node's worker can have written it
            before = stamps(out)
            send(signal.SIGKILL, [raylet(lost), *workers(lost)])
        finally:
            send(signal.SIGCONT, stopped)
        manifest = run.result()
    cluster.remove_node(lost, allow_graceful=False)
    assert manifest is not None
    assert everything(out.path) == everything(home / "small")
    assert 0 < len(before) < 40
    assert rewritten(out, before) == []


def test_ctrl_c_stops_the_workers_and_keeps_finished_shards(home: Path, cluster: Cluster, tmp_path: Path) -> None:
    out = Folder(tmp_path / "patches")
    options: dict[str, Any] = {"entropy_model": str(home / "entropy"), "target_length": 1.5}
    words = ["patchify", home / "small", out.path, "--engine", "ray", "--ray-address", cluster.address]
    for name, value in (options | CPU).items():
        words += [f"--{name.replace('_', '-')}", value]
    driver = subprocess.Popen(
        [sys.executable, "-m", "dpar", *map(str, words)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: stamps(out) or driver.poll() is not None)
    driver.send_signal(signal.SIGINT)
    _, message = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 130
    assert "Finished shards are kept" in message
    kept = stamps(out)
    assert 0 < len(kept) < 40
    wait_until(lambda: ray.available_resources().get("CPU", 0) == 2)  # the workers are gone
    patchify(home / "small", out.path, PatchifySettings(**options, **ONE), QUIET)
    patchify(home / "small", tmp_path / "alone", PatchifySettings(**options, **CPU), QUIET)
    assert everything(out.path) == everything(tmp_path / "alone")
    assert rewritten(out, kept) == []


def test_from_bucket_to_bucket_the_bytes_are_those_of_one_process_on_a_disk(
    home: Path, cluster: Cluster, bucket: Url, tmp_path: Path
) -> None:
    cut: dict[str, Any] = {"entropy_model": str(home / "entropy"), "target_length": 1.5, "container": "webdataset"}
    patchify(home / "codes", tmp_path / "patches", PatchifySettings(**cut, **CPU), QUIET)
    tokenize(str(home / "photos"), bucket / "codes", encode(home, **RAY, shard_size=4), QUIET)
    patchify(bucket / "codes", bucket / "patches", PatchifySettings(**cut, **RAY), QUIET)
    assert everything(tmp_path / "patches")
    for name, folder in {"codes": home / "codes", "patches": tmp_path / "patches"}.items():
        there = {file: read_bytes(bucket / name / file) for file in entries(bucket / name)}
        assert there == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_samples_and_scores_are_those_of_one_process(home: Path, cluster: Cluster, tmp_path: Path) -> None:
    pictures: dict[str, Any] = {"per_class": 5, "shard_size": 3, "npz": True, "show_nearest": home / "patches"}
    sample_pictures(home / "run", tmp_path / "alone", SampleSettings(**pictures, **CPU), QUIET)
    sample_pictures(home / "run", tmp_path / "ray", SampleSettings(**pictures, **RAY), QUIET)
    assert everything(tmp_path / "ray") == everything(tmp_path / "alone")
    scores: dict[str, Any] = {"reference": home / "patches", "samples": 6, "shard_size": 2, "cfg_scale": (2.0,)}
    scores |= {"threshold": (RULE["threshold"], 3.0), "floor": home / "photos" / "cat"}
    alone = evaluate(home / "run", tmp_path / "scores-alone", EvalSettings(**scores, **CPU), QUIET)
    on_ray = evaluate(home / "run", tmp_path / "scores-ray", EvalSettings(**scores, **ONE), QUIET)
    assert timeless(on_ray.to_json()) == timeless(alone.to_json())


def timeless(value: Any) -> Any:
    """The same without speeds."""
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if name != "images_per_second"}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def test_an_image_that_cannot_be_used_ends_the_run_with_its_message(
    home: Path, cluster: Cluster, tmp_path: Path
) -> None:
    photos = tmp_path / "photos" / "cat"
    photos.mkdir(parents=True)
    (photos / "broken.png").write_text("not a picture")
    with pytest.raises(StageError, match=r"^cat/broken\.png: .*Without --strict it would be left out$"):
        tokenize(str(tmp_path / "photos"), tmp_path / "out", encode(home, strict=True, **ONE), QUIET)
