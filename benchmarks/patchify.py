"""Speed of `dpar patchify` and `dpar inspect` at ImageNet's size: `python benchmarks/patchify.py`.

Writes a synthetic patches artifact (real shards, no images), changes its boundaries, inspects it, and removes it, each
in a separate process. The peak memory shown includes mapped file pages, which the system can reclaim. Then measures the
entropy model alone, the main cost of patchifying codes: on CUDA, or with a few images on a CPU. Its share of peak is
relative to one large matrix product, measured in the same precision.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dpar.patching import patch_starts
from pipeline.inspect import inspect
from pipeline.patchify import patchify
from pipeline.runtime.progress import Progress
from pipeline.settings.artifacts import InspectSettings, PatchifySettings
from shards.manifest import Manifest, ShardInfo
from shards.patch_statistics import count_patches, merge_counts
from shards.rows import Rows
from shards.writer import ArtifactBuild

CODEBOOK, CLASSES, SHARD = 16384, 1000, 4096
RULE = {"strategy": "entropy", "threshold": 7.8, "max_length": 4, "row_reset": True, "static_length": None}


def make_patches(folder: Path, images: int, views: int, tokens: int) -> None:
    """Write an artifact of random codes and entropies. One shard is drawn; the others are rolled copies of it."""
    side = math.isqrt(tokens)
    settings = {"codes": "synthetic", "codes_settings": {}, "entropy_model": "0" * 64, "precision": "fp32", **RULE}
    rng = np.random.default_rng(0)
    codes = rng.integers(0, CODEBOOK, (min(SHARD, images), views, tokens), np.uint16)
    entropy = rng.uniform(5.5, 9.7, codes.shape).astype(np.float16)
    entropy[..., 0] = np.inf
    build = ArtifactBuild(folder, settings=settings, n_shards=-(-images // SHARD), container="arrow")
    for index in build.todo():
        here = range(index * SHARD, min((index + 1) * SHARD, images))
        shard_entropy = np.roll(entropy, index, axis=0)[: len(here)]
        labels = (np.array(here) * CLASSES // images).astype(np.int32)
        starts = patch_starts(shard_entropy, 7.8, 4, side)
        keys = [f"n{labels[i - here.start]:08d}/n{labels[i - here.start]:08d}_{i}.JPEG" for i in here]
        rows = Rows(
            keys=keys,
            labels=labels,
            codes=np.roll(codes, index, axis=0)[: len(here)],
            entropy=shard_entropy,
            starts=starts,
        )
        build.add(index, rows, statistics=count_patches(starts, labels))

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        names = tuple(f"n{label:08d}" for label in range(CLASSES))
        counts = [shard.statistics for shard in shards]
        return Manifest(
            kind="patches",
            container="arrow",
            grid=(side, side),
            codebook_size=CODEBOOK,
            views=views,
            class_names=names,
            rows=images,
            shards=shards,
            settings=settings,
            source={"kind": "synthetic"},
            tokenizer={"path": "none", "fingerprint": "0" * 64},
            entropy_model={"path": "none", "fingerprint": "0" * 64},
            statistics=merge_counts(counts, n_tokens=tokens, views=views, class_names=names),
        )

    build.finish(manifest)


def nothing() -> None:
    pass


def change_boundaries(patches: Path, out: Path, verify: bool) -> None:
    patchify(patches, out, PatchifySettings(threshold=7.5, verify=verify), Progress(quiet=True))


def inspect_statistics(patches: Path) -> None:
    inspect(patches, None, InspectSettings(images=0), Progress(quiet=True))


def measured(function: Callable[..., None], *arguments: Any) -> tuple[float, float, float]:
    """Call the function; return seconds, seconds of processor time, and the process's peak memory in GB."""
    began, cpu = time.perf_counter(), time.process_time()
    function(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return time.perf_counter() - began, time.process_time() - cpu, peak / 1e9


def apart(function: Callable[..., None], *arguments: Any) -> tuple[float, float, float]:
    """Run :func:`measured` in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, function, *arguments).result()


def artifact_table(folder: Path, images: int, views: int, tokens: int) -> None:
    source, moved = folder / "patches", folder / "moved"
    apart(make_patches, source, images, views, tokens)  # a child's peak memory starts at its parent's memory
    size = sum(path.stat().st_size for path in source.iterdir()) / 1e9
    manifest = (source / "manifest.json").stat().st_size / 1e6
    print(f"{images:,} images × {views} views × {tokens} tokens: {size:.2f} GB, manifest {manifest:.2f} MB\n")
    print("| task | seconds | processor seconds | images/s | M tokens/s | peak memory |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    print(f"| imports only | | | | | {apart(nothing)[2]:.2f} GB |")
    for name, function, arguments in (
        ("rethreshold", change_boundaries, (source, moved, True)),
        ("rethreshold, --no-verify", change_boundaries, (source, moved, False)),
        ("inspect --images 0", inspect_statistics, (source,)),
    ):
        shutil.rmtree(moved, ignore_errors=True)
        seconds, cpu, peak = apart(function, *arguments)
        rate, speed = images / seconds, images * views * tokens / seconds / 1e6
        print(f"| {name} | {seconds:.1f} | {cpu:.1f} | {rate:,.0f} | {speed:,.1f} | {peak:.2f} GB |", flush=True)


def entropy_model_table(name: str, tokens: int, batch: int, images: int) -> None:
    import torch

    from dpar.flops import count
    from dpar.llamagen import LlamaGen, LlamaGenConfig
    from dpar.presets import preset
    from pipeline.runtime.device import autocast, choose_device, precision_name
    from pipeline.scoring.likelihood import entropies

    device = choose_device()
    side = math.isqrt(tokens)
    config = preset(name, classes=0, grid_height=side, grid_width=side)
    assert isinstance(config, LlamaGenConfig)
    model = LlamaGen(config).eval().to(device)
    codes = np.random.default_rng(0).integers(0, config.codebook_size, (images, tokens)).astype(np.uint16)

    def peak() -> float:
        """Return the multiply-accumulates per second of one large matrix product."""
        n = 8192 if device.type == "cuda" else 2048
        a = torch.randn(n, n, device=device)
        with torch.no_grad(), autocast(device, "auto"):
            torch.mm(a, a)
            began = time.perf_counter()
            for _ in range(5):
                product = torch.mm(a, a)
            float(product[0, 0])  # waits for the device
        return 5 * n**3 / (time.perf_counter() - began)

    entropies(model, codes[:batch], batch=batch, precision="auto")
    began = time.perf_counter()
    entropies(model, codes, batch=batch, precision="auto")
    rate = images / (time.perf_counter() - began)
    share = rate * count(config).linear / peak()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    precision = precision_name(device, "auto")
    print("\n| entropy model | tokens | device | precision | batch | images/s | share of peak |")
    print("| --- | ---: | --- | --- | ---: | ---: | ---: |")
    print(f"| {name} | {tokens} | {where} | {precision} | {batch} | {rate:,.1f} | {share:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_281_167, help="0 skips the artifact")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--model", default="llamagen-b")
    parser.add_argument("--model-images", type=int, default=32, help="0 skips the entropy model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where to write the artifact (default: the temporary folder)")
    arguments = parser.parse_args()
    if arguments.images:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            artifact_table(Path(folder), arguments.images, arguments.views, arguments.tokens)
    if arguments.model_images:
        entropy_model_table(arguments.model, arguments.tokens, arguments.batch, arguments.model_images)


if __name__ == "__main__":
    main()
