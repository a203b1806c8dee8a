"""Write sampled images as an artifact that every other command opens, with any number of processes.

    plan = Plan(labels=labels_of([0, 1, 2], 50_000, "balanced", seed=0), cfg_scale=2.0)
    artifact = write_sampled(generator, plan, out / "codes", progress, "sample", engine)

An image is a function of weights, seed, index, label and settings. A shard holds a range of indices and is written
atomically, so a killed run resumes with the missing shards and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from collections.abc import Generator as Indices
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.generation.editing import Edit
from pipeline.generation.generator import Generator, SampledImages
from pipeline.runtime.device import precision_name
from pipeline.runtime.engine import Count, Engine
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.runtime.provenance import made_by
from pipeline.runtime.threshold_warning import warn_if_out_of_reach
from pipeline.runtime.work_sharing import Pieces
from shards.manifest import MANIFEST, Manifest, ShardInfo
from shards.patch_statistics import count_patches, merge_counts
from shards.reader import Artifact, open_artifact
from shards.rows import Rows
from shards.writer import ArtifactBuild


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The images to sample: image i has class ``labels[i]``."""

    labels: NDArray[np.int64]  # (n,)
    cfg_scale: float
    edit: Edit | None = None  # the image that all of them are versions of


def labels_of(classes: list[int], count: int, how: str, seed: int) -> NDArray[np.int64]:
    """Return the classes of ``count`` images, (count,) int64: ``balanced`` cycles, ``random`` draws with the seed."""
    if how == "balanced":
        return np.asarray(classes, np.int64)[np.arange(count) % len(classes)]
    drawn = np.random.Generator(np.random.Philox(key=[seed, 2**63])).integers(0, len(classes), count)
    return np.asarray(classes, np.int64)[drawn]


def labels_like(labels: NDArray[np.integer[Any]], count: int) -> NDArray[np.int64]:
    """Return classes (count,) int64, sorted, in the proportions of ``labels`` (n,); the same if ``count`` is n."""
    return np.sort(labels).astype(np.int64)[np.arange(count) * len(labels) // count]


def write_sampled(
    generator: Generator,
    plan: Plan,
    folder: Path,
    progress: Progress,
    title: str,
    engine: Engine,
    *,
    overwrite: bool = False,
    sampled: Callable[[int, float], None] = lambda shard, seconds: None,
) -> Artifact:
    """Sample the images of ``plan`` into an artifact: patches for DPAR, codes for LlamaGen.

    Concurrent processes sample different shards; each returns when all shards are finished.

    Args:
        generator: the model to sample from, with its rule.
        plan: the images.
        folder: the artifact.
        progress: where to report.
        title: of the progress bar.
        engine: computes the shards.
        overwrite: replace an artifact that was made with other settings.
        sampled: called with the index of each shard and its duration in seconds, in the process that sampled it.

    Raises:
        ArtifactError: the folder holds something else, or images sampled with other settings.
        ModelError: the generator's parts are incompatible.
    """
    warn_if_out_of_reach(
        None if generator.rule is None else generator.rule.threshold, generator.model.config.codebook_size, progress
    )
    size = generator.settings.shard_size
    n_shards = -(-len(plan.labels) // size)
    known = None if plan.edit is None else plan.edit.known
    identity = _identity(generator, plan)
    build = ArtifactBuild(folder, settings=identity, n_shards=n_shards, container="arrow", overwrite=overwrite)
    manifest_file = folder / MANIFEST

    def is_done(index: int) -> bool:
        return build.done(index) is not None or manifest_file.is_file()  # in this order: it replaces the records

    def work(shards: Indices[int, None, None], count: Count) -> None:
        if _identity(generator, plan) != identity:
            raise StageError(f"{generator.name} has other weights on the worker than on the driver")
        for index in shards:
            indices = np.arange(index * size, min((index + 1) * size, len(plan.labels)))
            labels = plan.labels[indices]
            began = time.monotonic()
            drawn = generator.sample(labels, indices, plan.cfg_scale, known, count.advance)
            sampled(index, time.monotonic() - began)
            rows = _rows(generator, drawn, labels, indices)
            build.add(index, rows, statistics=None if rows.starts is None else count_patches(rows.starts, rows.labels))

    with progress.task(title, len(plan.labels), "images") as task:
        task.begin_at(sum(len(plan.labels[i * size : (i + 1) * size]) for i in range(n_shards) if is_done(i)))
        engine.run(Pieces(folder, n_shards, is_done), work, task)
    build.finish(lambda shards: _manifest(generator, identity, shards))
    return open_artifact(folder)


def _rows(
    generator: Generator, drawn: SampledImages, labels: NDArray[np.int64], indices: NDArray[np.integer[Any]]
) -> Rows:
    keys = [f"{i:06d}" for i in indices]
    codes = drawn.codes[:, None].astype(np.uint16)
    if generator.trained_rule is None:
        return Rows(keys=keys, labels=labels.astype(np.int32), codes=codes)
    entropy = np.full(codes.shape, np.nan, np.float16)
    entropy[..., 0] = np.inf
    return Rows(keys=keys, labels=labels.astype(np.int32), codes=codes, entropy=entropy, starts=drawn.starts[:, None])


def _identity(generator: Generator, plan: Plan) -> dict[str, Any]:
    """Return the settings that determine the artifact's bytes, under the names that other stages read."""
    s = generator.settings
    # in place of the settings of tokenized images; there are no originals
    codes_settings = {
        "data": f"sampled from {generator.weights_fingerprint[:12]}",
        "split": None,
        "classes": [],
        "image_size": generator.image_size[0],
        "views": "center",
        "crop_range": [1.0],
    }
    sampling = {
        "weights": generator.weights_fingerprint,
        "entropy_model": None if generator.entropy_origin is None else generator.entropy_origin["fingerprint"],
        "tokenizer": generator.tokenizer_origin["fingerprint"],
        "images": len(plan.labels),
        "labels": hashlib.sha256(plan.labels.astype("<i8").tobytes()).hexdigest()[:16],
        "cfg_scale": plan.cfg_scale,
        "cfg_schedule": s.cfg_schedule,
        "cfg_power": s.cfg_power,
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
        "seed": s.seed,
        "known": None if plan.edit is None else plan.edit.record(),
        "shard_size": s.shard_size,
        "precision": precision_name(generator.device, s.precision),
    }
    if generator.rule is None:
        return sampling | codes_settings
    return sampling | generator.rule.to_dict() | {"codes": "sampled", "codes_settings": codes_settings}


def _manifest(generator: Generator, identity: dict[str, Any], shards: tuple[ShardInfo, ...]) -> Manifest:
    patches = generator.trained_rule is not None
    n_tokens = generator.model.config.n_tokens
    return Manifest(
        kind="patches" if patches else "codes",
        container="arrow",
        grid=generator.grid,
        codebook_size=generator.model.config.codebook_size,
        views=1,
        class_names=generator.class_names,
        rows=sum(shard.rows for shard in shards),
        shards=shards,
        settings=identity,
        source={"kind": "sampled", "weights": generator.name},
        tokenizer=generator.tokenizer_origin,
        entropy_model=None,  # the entropies that determined boundaries are not stored
        statistics=merge_counts(
            [shard.statistics for shard in shards], n_tokens=n_tokens, views=1, class_names=generator.class_names
        )
        if patches
        else {},
        made_by=made_by(),
    )
