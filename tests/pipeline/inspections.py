"""Shared by the tests of inspecting: an artifact of random codes, and `dpar inspect` on it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import dpar
from dpar.patching import PatchRule, patch_starts, static_starts
from dpar.tokenizer import VQConfig, VQTokenizer
from pipeline.inspect import inspect
from pipeline.reports.inspection_record import Inspection
from pipeline.runtime.progress import Progress
from pipeline.settings.artifacts import InspectSettings
from pipeline.sources import open_indexed
from shards.manifest import Container, Manifest, ShardInfo
from shards.patch_statistics import count_patches, merge_counts
from shards.rows import Rows
from shards.writer import ArtifactBuild

V, GRID, N = 32, (8, 8), 64
CLASSES = ("bird", "cat", "dög & <b>")
A_CLASS = 4  # images
THRESHOLD, MAX_LENGTH = 2.0, 4
QUIET = Progress(quiet=True)


def save_inputs(home: Path) -> Path:
    """Save a folder of images and a tokenizer."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (home / "photos" / name).mkdir(parents=True)
        for i in range(A_CLASS):
            Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(home / "photos" / name / f"{i}.png")
    torch.manual_seed(0)
    config = VQConfig(codebook_size=V, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)
    VQTokenizer(config).save_pretrained(home / "vq")
    return home


def build(
    made: Path,
    out: Path,
    kind: str = "patches",
    container: Container = "arrow",
    n_views: int = 2,
    strategy: str = "entropy",
) -> tuple[Path, Rows]:
    """Build an artifact of random codes and entropies in two shards; return it with its rows."""
    source = open_indexed(str(made / "photos"))
    rng = np.random.default_rng(1)
    shape = (len(source), n_views, N)
    entropy = (rng.random(shape) * 4).astype(np.float16)
    entropy[:4] /= 4  # birds are easy
    if strategy == "static":
        entropy[:] = np.nan
    entropy[..., 0] = np.inf
    starts = patch_starts(entropy, THRESHOLD, MAX_LENGTH, GRID[1], True)
    if strategy == "static":
        starts = np.broadcast_to(static_starts(N, 1.81), shape).copy()
    every = Rows(
        keys=[source.key(i) for i in range(len(source))],
        labels=np.array([source.label(i) for i in range(len(source))], np.int32),
        codes=rng.integers(0, V - 2, shape).astype(np.uint16),
        entropy=entropy if kind == "patches" else None,
        starts=starts if kind == "patches" else None,
    )
    codes_settings: dict[str, Any] = {
        "data": str(made / "photos"),
        "split": None,
        "classes": [],
        "limit": None,
        "image_size": 16,
        "views": "flip",
        "crop_range": [1.0],
    }
    rule = {"threshold": THRESHOLD, "max_length": MAX_LENGTH, "row_reset": True, "strategy": "entropy"}
    if strategy == "static":
        rule = PatchRule.static(1.81).to_dict()
    settings = codes_settings if kind == "codes" else {"codes_settings": codes_settings, **rule}
    writer = ArtifactBuild(out, settings=settings, n_shards=2, container=container)
    for index, here in enumerate((slice(0, 5), slice(5, None))):
        columns: dict[str, Any] = {
            f.name: None if getattr(every, f.name) is None else getattr(every, f.name)[here]
            for f in dataclasses.fields(Rows)
        }
        rows = Rows(**columns)
        writer.add(index, rows, None if rows.starts is None else count_patches(rows.starts, rows.labels))

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        return Manifest(
            kind="codes" if kind == "codes" else "patches",
            container=container,
            grid=GRID,
            codebook_size=V,
            views=n_views,
            class_names=CLASSES,
            rows=len(source),
            shards=shards,
            settings=settings,
            source=source.describe(),
            tokenizer={"path": str(made / "vq"), "fingerprint": dpar.fingerprint(made / "vq")},
            made_by={"python": "3"},
            statistics=merge_counts(
                [shard.statistics for shard in shards], n_tokens=N, views=n_views, class_names=CLASSES
            )
            if kind == "patches"
            else {},
        )

    writer.finish(manifest)
    return out, every


def inspected(artifact: Path, out: Path | None = None, **settings: Any) -> Inspection:
    return inspect(artifact, out, InspectSettings(device="cpu", **settings), QUIET)


def look(artifact: Path, out: Path | None = None, **settings: Any) -> dict[str, Any]:
    return inspected(artifact, out, **settings).to_json()
