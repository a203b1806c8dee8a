"""Speed of reading an artifact from a URL for training: `python benchmarks/streaming.py [--images N] [--views V]`.

Writes a WebDataset and an Arrow artifact of random patches, serves them with ``python -m http.server`` on this machine,
and reads them in training order: from disk, from the server with an empty cache, and from a warm cache (``--cache``).
The webdataset library reads from the same server for comparison. Each measurement has a separate process. Rates are per
second of wall time and per second of the reader's processor time, which a busy machine affects less; the ratios use
processor time, which excludes the server.
"""

import argparse
import functools
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.dataset import BATCH, fresh, make_artifact
from shards.cache import ShardCache
from shards.reader import open_artifact
from shards.training_data import TrainingData


def read(_: Path, most: int, place: str, cache: Path | None = None) -> float:
    """Read images from ``place``, a folder or URL, in training order, and return their number.

    Without ``cache`` a temporary one is used.
    """
    artifact = open_artifact(place, cache=None if cache is None else ShardCache(cache, 10**12))
    steps = max(1, most // BATCH)
    with TrainingData(artifact, batch=BATCH, seed=0) as data:
        for step in range(steps):
            data.batch(step)
    return float(steps * BATCH)


def webdataset(_: Path, most: int, place: str) -> float:
    """Read images from a URL with the webdataset library, shuffled in a buffer, and return their number."""
    from webdataset import WebDataset

    artifact = open_artifact(place)
    urls = [f"{place}/{shard.name}" for shard in artifact.manifest.shards]
    seen = 0
    for sample in WebDataset(urls, shardshuffle=False).shuffle(1000).decode():
        np.unpackbits(sample["starts.npy"]).astype(bool), sample["codes.npy"][0], sample["json"]["label"]
        seen += 1
        if seen >= most:
            break
    return float(seen)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback and yield the URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=131_072)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where to make the artifacts (default: a temporary directory)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        home, images = Path(folder), arguments.images
        shape = {"images": images, "views": arguments.views, "tokens": arguments.tokens}
        make_artifact(home / "tar", container="webdataset", **shape)
        make_artifact(home / "arrow", container="arrow", **shape)
        size = sum(path.stat().st_size for path in (home / "tar").iterdir()) / images
        print(f"{images:,} images × {arguments.views} views × {arguments.tokens} tokens, {size:,.0f} bytes each as tar")
        print("\n| | images | seconds | per second | per second of processor time | peak memory |")
        print("| --- | --- | --- | --- | --- | --- |")
        with serving(home) as url:
            here, there, arrow = str(home / "tar"), f"{url}/tar", f"{url}/arrow"
            kept = functools.partial(read, place=there, cache=home / "cache")
            library = functools.partial(webdataset, place=there)
            disk = row("WebDataset on disk", functools.partial(read, place=here), images)
            server = row("WebDataset, server, empty cache", functools.partial(read, place=there), images)
            row("the same, filling --cache", kept, images)
            cached = row("WebDataset, server, from --cache", kept, images)
            row("Arrow, server, empty cache", functools.partial(read, place=arrow), images)
            plain = row("WebDataset, server, the webdataset library", library, min(images, 20_000))
        print(
            f"\nOf the rate from disk: {cached / disk:.2f} from the cache, {server / disk:.2f} from the server. "
            f"Reading from the server is {server / plain:.1f} times as fast as with the webdataset library."
        )


def row(name: str, work: Callable[[Path, int], float], most: int) -> float:
    """Measure ``work``, print its line of the table, and return images per second of processor time."""
    measured = fresh(work, Path(), most)
    by_clock, by_processor = measured.amount / measured.seconds, measured.amount / measured.processor_seconds
    print(
        f"| {name} | {measured.amount:,.0f} | {measured.seconds:.1f} | {by_clock:,.0f} | {by_processor:,.0f} | "
        f"{measured.memory / 1e6:.0f} MB |",
        flush=True,
    )
    return by_processor


if __name__ == "__main__":
    main()
