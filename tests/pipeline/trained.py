"""Shared by the tests of training: a small patches artifact, and runs on it in this process and in others."""

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file

from pipeline.runtime.progress import Progress
from pipeline.settings.training import TrainSettings
from pipeline.train import train
from shards.manifest import Container, Kind, Manifest, ShardInfo
from shards.rows import Rows
from shards.storage import Location, Url
from shards.writer import ArtifactBuild

Place = TypeVar("Place", Path, Url)

V, GRID, N, VIEWS = 16, (4, 4), 16, 2
QUIET = Progress(quiet=True)
SIZES = (9, 0, 8)  # images per shard
EXACT = {"dropout": 0.0, "guidance_dropout": 0.0}


def build(
    out: Place,
    kind: Kind = "patches",
    grid: tuple[int, int] = GRID,
    tokenizer: str = "0" * 64,
    classes: int = 2,
    seed: int = 0,
    container: Container = "arrow",
    sizes: tuple[int, ...] = SIZES,
) -> Place:
    """Build an artifact of codes that count up by their class, a few of them wrong."""
    settings = {"strategy": "entropy", "threshold": 2.0, "max_length": 4, "row_reset": True, "static_length": None}
    maker = ArtifactBuild(out, settings=settings, n_shards=len(sizes), container=container)
    rng = np.random.default_rng(seed)
    for index in maker.todo():
        shape = (sizes[index], VIEWS, grid[0] * grid[1])
        labels = np.arange(sizes[index]) % classes
        codes = (np.arange(shape[-1]) * (labels[:, None, None] + 1) + np.zeros(shape, int)) % V
        codes = np.where(rng.random(shape) < 0.1, rng.integers(0, V, shape), codes)
        starts = rng.random(shape) < 0.5
        starts[..., 0] = True
        rows = Rows(
            keys=[f"{index}/{i}" for i in range(shape[0])],
            labels=labels.astype(np.int32),
            codes=codes.astype(np.uint16),
            entropy=rng.random(shape).astype(np.float16) if kind == "patches" else None,
            starts=starts if kind == "patches" else None,
        )
        maker.add(index, rows)

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        return Manifest(
            kind=kind,
            container=container,
            grid=grid,
            codebook_size=V,
            views=VIEWS,
            class_names=("a", "b", "c")[:classes],
            rows=sum(sizes),
            shards=shards,
            settings=settings,
            source={},
            tokenizer={"path": "vq", "fingerprint": tokenizer},
        )

    maker.finish(manifest)
    return out


def chosen(**values: Any) -> TrainSettings:
    defaults = {
        "model": "dpar-tiny",
        "batch": 4,
        "steps": 3,
        "lr": 1e-3,
        "log_every": 1,
        "seed": 1,
        "device": "cpu",
        "precision": "fp32",
    }
    return TrainSettings(**{**defaults, **values})


def run(patches: Location, out: Path, **values: Any) -> dict[str, Any]:
    return train(patches, out, chosen(**values), QUIET)


def options(settings: TrainSettings) -> list[str]:
    """Return the settings that are not the default as command-line options."""
    found: list[str] = []
    for field in dataclasses.fields(settings):
        value, option = getattr(settings, field.name), "--" + field.name.replace("_", "-")
        if value == field.default:
            continue
        found += (
            [option if value else option.replace("--", "--no-", 1)] if isinstance(value, bool) else [option, str(value)]
        )
    return found


def command(patches: Location, out: Path, environment: dict[str, str] | None = None, **values: Any) -> Any:
    """Start ``dpar train`` in a new process, with the settings of ``chosen(**values)``."""
    return subprocess.Popen(
        [sys.executable, "-m", "dpar", "train", str(patches), str(out), *options(chosen(**values))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "500", **(environment or {})},
        cwd=out.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def together(patches: Location, out: Path, n: int = 2, **values: Any) -> list[Any]:
    """Start the ``n`` processes of one run as ``torchrun`` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        command(patches, out, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **values) for rank in range(n)
    ]


def ends(processes: list[Any], status: int = 0) -> list[str]:
    """Wait for processes, which must end with ``status``, and return their output."""
    said = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), said
    return [error for _, error in said]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def results(out: Path) -> list[tuple[Any, ...]]:
    return [tuple(line.get(name) for name in ("step", "loss", "lr", "patches_per_image")) for line in metrics(out)]


def weights(out: Path, kind: str = "model") -> dict[str, torch.Tensor]:
    return load_file(out / kind / "model.safetensors")


def digests(out: Path) -> dict[str, str]:
    """Return a digest of every tensor in the safetensors files of a run: weights and checkpoints."""
    found = {}
    for path in out.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            found[f"{path.relative_to(out).as_posix()} {name}"] = digest
    return found


def saved(out: Path) -> list[str]:
    """Return the names of a run's checkpoints."""
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def largest_difference(one: Path, other: Path, kind: str = "model") -> float:
    a, b = weights(one, kind), weights(other, kind)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def lines_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
