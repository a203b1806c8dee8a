"""Speed of verifying artifacts and reading them for training: `python benchmarks/dataset.py [--images N] [--views V]`.

Writes patches artifacts of random codes and entropies, Arrow and WebDataset, and measures each way of reading them in
a separate process, with its peak memory (including mapped file pages, and torch where patches are collated).
Rates are per second of wall time and per second of the reader's processor time, which a busy machine affects less.
"""

import argparse
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.manifest import Container, Manifest, ShardInfo
from shards.reader import Batch, open_artifact
from shards.rows import Rows
from shards.training_data import TrainingData
from shards.writer import ArtifactBuild

SHARD = 4096
BATCH = 256
VOCABULARY = 16384


def make_artifact(out: Path, *, images: int, views: int, tokens: int, container: Container = "arrow") -> Path:
    """Write a patches artifact of random codes and entropies into ``out``, with 1000 classes."""
    from dpar.patching import patch_starts

    side = math.isqrt(tokens)
    build = ArtifactBuild(out, settings={"synthetic": images}, n_shards=-(-images // SHARD), container=container)
    for index in build.todo():
        rng = np.random.default_rng(index)
        count = min(SHARD, images - index * SHARD)
        shape = (count, views, side * side)
        entropy = (rng.random(shape, np.float32) * 9.7).astype(np.float16)
        entropy[..., 0] = np.inf
        starts = patch_starts(entropy.reshape(-1, side * side), 7.8, 4, side)
        rows = Rows(
            keys=[f"{index * SHARD + i}.jpg" for i in range(count)],
            labels=rng.integers(0, 1000, count, np.int32),
            codes=rng.integers(0, VOCABULARY, shape, np.uint16),
            entropy=entropy,
            starts=np.asarray(starts).reshape(shape),
        )
        build.add(index, rows)

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        return Manifest(
            kind="patches",
            container=container,
            grid=(side, side),
            codebook_size=VOCABULARY,
            views=views,
            class_names=tuple(str(label) for label in range(1000)),
            rows=images,
            shards=shards,
            settings={"synthetic": images},
            source={},
            tokenizer={},
        )

    build.finish(manifest)
    return out


def peak_memory() -> int:
    """Return the peak memory of this process in bytes, including file pages."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def verify(folder: Path, most: int) -> float:
    """Verify every shard and return their bytes."""
    artifact = open_artifact(folder, verify=True)
    return float(sum(shard.bytes or 0 for shard in artifact.manifest.shards))


def read(folder: Path, most: int) -> float:
    """Read images in training order and return their number."""
    return _batches(folder, most, lambda batch: None)


def collate(folder: Path, most: int) -> float:
    """Read images in training order, build their patch layouts, and return their number."""
    import torch

    from dpar.packing import PatchLayout

    torch.set_num_threads(1)
    return _batches(folder, most, lambda batch: PatchLayout.from_starts(torch.from_numpy(batch.starts)))


def _batches(folder: Path, most: int, use: Callable[[Batch], object]) -> float:
    artifact = open_artifact(folder)
    steps = max(1, min(len(artifact), most) // BATCH)
    with TrainingData(artifact, batch=BATCH, seed=0) as data:
        for step in range(steps):
            use(data.batch(step))
    return float(steps * BATCH)


def webdataset(folder: Path, most: int) -> float:
    """Read images with the webdataset library, shuffled in a buffer, and return their number."""
    from webdataset import WebDataset

    artifact = open_artifact(folder)
    tokens = artifact.manifest.n_tokens
    paths = [str(folder / shard.name) for shard in artifact.manifest.shards]
    seen = 0
    for sample in WebDataset(paths, shardshuffle=False).shuffle(1000).decode():
        np.unpackbits(sample["starts.npy"])[:tokens].astype(bool), sample["codes.npy"][0], sample["json"]["label"]
        seen += 1
        if seen >= most:
            break
    return float(seen)


@dataclass(frozen=True)
class Measured:
    amount: float
    seconds: float
    processor_seconds: float
    memory: int


def timed(work: Callable[[Path, int], float], folder: Path, most: int) -> Measured:
    work(folder, min(BATCH, most))  # imports and opens files before the measurement
    began, worked = time.perf_counter(), time.process_time()
    amount = work(folder, most)
    return Measured(amount, time.perf_counter() - began, time.process_time() - worked, peak_memory())


def fresh(work: Callable[[Path, int], float], folder: Path, most: int) -> Measured:
    """Run :func:`timed` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(timed, work, folder, most).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_280_000)
    parser.add_argument("--tar-images", type=int, default=200_000, help="images of the WebDataset artifact")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where to make the artifacts (default: a temporary directory)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as home:
        shape = {"views": arguments.views, "tokens": arguments.tokens}
        began = time.perf_counter()
        arrow = make_artifact(Path(home) / "arrow", images=arguments.images, **shape)
        writing = time.perf_counter() - began
        tar_images = min(arguments.images, arguments.tar_images)
        tar = make_artifact(Path(home) / "tar", images=tar_images, container="webdataset", **shape)
        print(
            f"{arguments.images:,} images × {arguments.views} views × {arguments.tokens} tokens, "
            f"written in {writing:.0f} s\n"
        )
        print("| | amount | seconds | per second | per second of processor time | peak memory |")
        print("| --- | --- | --- | --- | --- | --- |")
        few = min(arguments.images, 100_000)
        rates = {}
        for name, work, folder, most in (
            ("verification of every SHA-256", verify, arrow, 0),
            ("Arrow, random order", read, arrow, few),
            ("Arrow, random order, collated", collate, arrow, few),
            ("Arrow, a full epoch, collated", collate, arrow, arguments.images),
            ("WebDataset, streamed", read, tar, tar_images),
            ("WebDataset, streamed, collated", collate, tar, tar_images),
            ("WebDataset, the webdataset library", webdataset, tar, min(tar_images, 20_000)),
        ):
            measured = fresh(work, folder, most)
            unit, scale = ("MB", 1e6) if work is verify else ("images", 1)
            done = measured.amount
            amounts = [done, done / measured.seconds, done / measured.processor_seconds]
            amount, rate, by_processor = (f"{value / scale:,.0f} {unit}" for value in amounts)
            rates[name] = amounts[2]
            memory = f"{measured.memory / 1e6:.0f} MB"
            print(f"| {name} | {amount} | {measured.seconds:.1f} | {rate} | {by_processor} | {memory} |", flush=True)
        ratio = rates["WebDataset, streamed"] / rates["WebDataset, the webdataset library"]
        print(f"\nStreaming takes 1/{ratio:.1f} of the processor time of the webdataset library.")


if __name__ == "__main__":
    main()
