"""Shared by the tests of reading: small artifacts of random rows, and changes to their manifests."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from shards.manifest import Container, Kind, Manifest, ShardInfo
from shards.rows import Rows
from shards.writer import ArtifactBuild

CONTAINERS: tuple[Container, ...] = ("arrow", "webdataset")
SIZES = (5, 0, 4, 1)  # rows per shard
GRID, VIEWS, N = (2, 5), 3, 10
TOTAL = sum(SIZES)
CLASSES = tuple(str(i) for i in range(100))


def shard_rows(index: int, kind: Kind) -> Rows:
    rng = np.random.default_rng(index)
    shape = (SIZES[index], VIEWS, N)
    return Rows(
        keys=[f"{index}/ä {i}.jpg" for i in range(SIZES[index])],
        labels=rng.integers(0, len(CLASSES), SIZES[index]).astype(np.int32),
        codes=rng.integers(0, 2**16, shape).astype(np.uint16),
        entropy=rng.random(shape).astype(np.float16) if kind == "patches" else None,
        starts=rng.random(shape) < 0.5 if kind == "patches" else None,
    )


def make(out: Path, container: Container = "arrow", kind: Kind = "patches") -> Path:
    return write_artifact(out, container, [shard_rows(index, kind) for index in range(len(SIZES))], kind=kind)


def write_artifact(
    out: Path, container: Container, rows: list[Rows], grid: tuple[int, int] = GRID, kind: Kind = "patches"
) -> Path:
    build = ArtifactBuild(out, settings={}, n_shards=len(rows), container=container)

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        return Manifest(
            kind=kind,
            container=container,
            grid=grid,
            codebook_size=2**16,
            views=rows[0].codes.shape[1],
            class_names=CLASSES,
            rows=sum(len(part) for part in rows),
            shards=shards,
            settings={},
            source={},
            tokenizer={},
        )

    for index in build.todo():
        build.add(index, rows[index])
    build.finish(manifest)
    return out


def change(path: Path, **values: Any) -> None:
    held = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**held, **values}), encoding="utf-8")


def change_shard(path: Path, **values: Any) -> None:
    held = json.loads(path.read_text(encoding="utf-8"))
    held["shards"][0] |= values
    path.write_text(json.dumps(held), encoding="utf-8")
