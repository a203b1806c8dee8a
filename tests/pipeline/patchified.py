"""Shared by the tests of patchifying: codes, entropy models, `dpar patchify` on them, and what it wrote."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dpar import LlamaGen, LlamaGenConfig
from pipeline.patchify import patchify
from pipeline.runtime.progress import Progress
from pipeline.settings.artifacts import PatchifySettings
from shards.manifest import Container, Manifest, ShardInfo
from shards.reader import open_artifact
from shards.rows import Rows
from shards.writer import ArtifactBuild

V, GRID, N, VIEWS = 32, (4, 6), 24, 2
SIZES = (20, 0, 13)  # images per shard
CONTAINERS: tuple[Container, ...] = ("arrow", "webdataset")
QUIET = Progress(quiet=True)
TOKENIZER = {"path": "vq", "fingerprint": "0" * 64}


def save_model(path: Path, seed: int = 0, std: float = 0.4, **sizes: Any) -> Path:
    torch.manual_seed(seed)
    values: dict[str, Any] = {"codebook_size": V, "grid_height": GRID[0], "grid_width": GRID[1], **sizes}
    model = LlamaGen(LlamaGenConfig(classes=0, start_token=False, width=32, heads=2, layers=2, **values))
    torch.nn.init.normal_(model.output.weight, std=std)
    return model.save_pretrained(path)


def save_entropy_run(run: Path, tokenizer: dict[str, str], seed: int = 0) -> Path:
    """Save a run as `dpar entropy` does, trained on codes of ``tokenizer``."""
    save_model(run / "model", seed)
    record = {"format_version": 2, "kind": "entropy", "settings": {}, "inputs": {"tokenizer": tokenizer}}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return run


def build_codes(
    out: Path, sizes: tuple[int, ...] = SIZES, container: Container = "arrow", first: int = 0, views: int = VIEWS
) -> Path:
    """Build an artifact of random codes; image ``i`` of shard ``s`` has the same codes in any artifact."""
    settings = {"data": "photos", "image_size": 16}
    build = ArtifactBuild(out, settings=settings, n_shards=len(sizes), container=container)
    for index in build.todo():
        count = sizes[index]
        codes = np.stack(
            [np.random.default_rng([index, i]).integers(0, V, (views, N)) for i in range(first, first + count)]
            or [np.zeros((views, N), np.int64)]
        )[:count]
        keys = [f"{index}/{i}.png" for i in range(first, first + count)]
        labels = np.arange(first, first + count, dtype=np.int32) % 2
        build.add(index, Rows(keys=keys, labels=labels, codes=codes.astype(np.uint16)))

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        return Manifest(
            kind="codes",
            container=container,
            grid=GRID,
            codebook_size=V,
            views=views,
            class_names=("a", "b"),
            rows=sum(sizes),
            shards=shards,
            settings=settings,
            source={"kind": "folder"},
            tokenizer=TOKENIZER,
            left_out=3,
        )

    build.finish(manifest)
    return out


def save_inputs(home: Path) -> Path:
    """Save an entropy model and an artifact of codes in each container."""
    save_model(home / "entropy")
    for container in CONTAINERS:
        build_codes(home / container, container=container)
    return home


def run(codes: Path, out: Path, **values: Any) -> Manifest:
    progress = values.pop("progress", QUIET)
    manifest = patchify(codes, out, PatchifySettings(**{"device": "cpu", "precision": "fp32", **values}), progress)
    assert manifest is not None
    return manifest


class Said(Progress):
    """Records the messages of a stage."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO(), width=1000), quiet=False)

    @property
    def text(self) -> str:
        return self.console.file.getvalue()  # type: ignore[attr-defined]


def everything(artifact: Path) -> Rows:
    opened = open_artifact(artifact)
    parts = [opened.shard_rows(index) for index in range(len(opened.manifest.shards))]
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("labels", "codes", "entropy", "starts")
        if getattr(parts[0], name) is not None
    }
    return Rows(keys=[key for part in parts for key in part.keys], **columns)


def entropy_of(artifact: Path) -> np.ndarray:
    found = everything(artifact).entropy
    assert found is not None
    return found


def starts_of(artifact: Path) -> np.ndarray:
    found = everything(artifact).starts
    assert found is not None
    return found


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
