"""Shared by the tests of writing: one artifact, built in this process or, as a program, in another."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from shards.manifest import Container, LeftOut, Manifest, ShardInfo
from shards.rows import Rows
from shards.storage import Location, location
from shards.writer import ArtifactBuild

N_SHARDS = 12
GRID, VIEWS = (8, 8), 2
SETTINGS: dict[str, Any] = {"threshold": 1.5, "data": "föto", "sizes": [1, 2]}
CONTAINERS: tuple[Container, ...] = ("arrow", "webdataset")


def shard_rows(index: int, large: bool = False) -> Rows:
    """Return the rows of shard ``index``; every fifth shard is empty."""
    rng = np.random.default_rng(index)
    count = 0 if index % 5 == 4 else 500 if large else 3
    shape = (count, VIEWS, GRID[0] * GRID[1])
    return Rows(
        keys=[f"é{index}/{i}" for i in range(count)],
        labels=np.full(count, index, np.int32),
        codes=rng.integers(0, 32, shape).astype(np.uint16),
        entropy=rng.random(shape).astype(np.float16),
        starts=rng.random(shape) < 0.5,
    )


def make_manifest(shards: tuple[ShardInfo, ...], settings: dict[str, Any] = SETTINGS) -> Manifest:
    return Manifest(
        kind="patches",
        container="webdataset" if shards[0].name.endswith(".tar") else "arrow",
        grid=GRID,
        codebook_size=32,
        views=VIEWS,
        class_names=("a", "b"),
        rows=sum(shard.rows for shard in shards),
        shards=shards,
        settings=settings,
        source={},
        tokenizer={"path": "vq", "fingerprint": "0" * 64},
        left_out=sum(len(shard.left_out) for shard in shards),
    )


def opened(out: Location, container: Container = "arrow", **options: Any) -> ArtifactBuild:
    values = {"settings": SETTINGS, "n_shards": N_SHARDS, "container": container, **options}
    return ArtifactBuild(out, **values)


def run(
    out: Location,
    container: Container = "arrow",
    rank: int = 0,
    world_size: int = 1,
    pause: float = 0.0,
    large: bool = False,
    **options: Any,
) -> Manifest | None:
    build = opened(out, container, **options)
    for index in build.todo(rank, world_size):
        reasons = [LeftOut(key=f"{index}.jpg", reason="empty file")] if index % 3 == 0 else []
        build.add(index, shard_rows(index, large), statistics={"n": index}, left_out=reasons)
        sys.stdout.write(f"{index}\n")  # for the parent process
        time.sleep(pause)
    return build.finish(lambda shards: make_manifest(shards, build.settings))


def start(out: Location, *arguments: object) -> subprocess.Popen[bytes]:
    """Start ``run`` in a new process."""
    command = [sys.executable, __file__, str(out), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("[0-9]*")}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


if __name__ == "__main__":
    folder, kind, rank, world_size, pause, large = sys.argv[1:]
    run(location(folder), kind, int(rank), int(world_size), float(pause), bool(int(large)))  # type: ignore[arg-type]
