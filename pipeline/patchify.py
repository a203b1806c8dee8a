"""``dpar patchify CODES OUT --entropy-model E``: entropies and patch boundaries.

    manifest = patchify(Path("codes"), Path("patches"), PatchifySettings(entropy_model="entropy", target_length=1.81))

On a patches directory it moves the boundaries by the entropies that are stored there, without a model.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpar.llamagen import LlamaGen
from dpar.patching import patch_lengths, patch_starts, static_starts
from pipeline.device import choose_device, precision_name, rank, world_size
from pipeline.errors import StageError
from pipeline.likelihood import entropies, fits
from pipeline.progress import Progress, stops_with
from pipeline.settings import PatchifySettings
from pipeline.versions import made_by
from pipeline.weights import fingerprint_of, load_entropy_model
from shards.build import ArtifactBuild
from shards.manifest import Manifest, ShardInfo
from shards.reader import Artifact, open_artifact
from shards.rows import Rows

PROBE = 64  # images on which a given threshold is tried before all are read


def patchify(codes: Path, out: Path, settings: PatchifySettings, progress: Progress | None = None) -> Manifest | None:
    """Writes a patches artifact to ``out``: the codes of ``codes``, their entropies, and boundaries.

    Returns:
        The artifact's manifest; None where other processes have shards still to write.

    Raises:
        StageError, ModelError, ArtifactError: input, weights, output or settings cannot be used.
        Stopped: the user pressed Ctrl-C.
    """
    progress = progress or Progress()
    artifact = open_artifact(codes)
    before = artifact.manifest
    meter = EntropyMeter(artifact, settings)
    rule = _rule(meter, settings, progress)
    decides: dict[str, Any] = {
        "codes": before.fingerprint() if before.kind == "codes" else before.settings["codes"],
        "codes_settings": before.settings if before.kind == "codes" else before.settings["codes_settings"],
        "entropy_model": None if meter.origin is None else meter.origin["fingerprint"],
        "precision": meter.precision,
        "container": settings.container or before.container,
        **rule,
    }
    build = ArtifactBuild(
        out,
        settings=decides,
        n_shards=len(before.shards),
        container=decides["container"],
        overwrite=settings.overwrite,
    )
    keeps = f"Stopped. Finished shards are kept in {out}; run the same command again to go on."
    with stops_with(keeps), progress.task("patchify", before.rows, "images") as task:
        for index in build.todo(rank(), world_size()):
            rows = artifact.shard_rows(index)
            entropy = meter.measure(rows)
            starts = boundaries(entropy, rule, before.grid[1])
            done = Rows(keys=rows.keys, labels=rows.labels, codes=rows.codes, entropy=entropy, starts=starts)
            build.add(index, done, statistics=_statistics(starts))
            task.advance(len(rows))

    def make_manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        statistics = merge_statistics([shard.statistics for shard in shards], before.n_tokens)
        return Manifest(
            kind="patches",
            container=decides["container"],
            grid=before.grid,
            codebook_size=before.codebook_size,
            views=before.views,
            class_names=before.class_names,
            rows=before.rows,
            shards=shards,
            settings=decides,
            source=before.source,
            tokenizer=before.tokenizer,
            entropy_model=meter.origin,
            statistics=statistics,
            left_out=before.left_out,
            made_by=made_by(),
        )

    manifest = build.finish(make_manifest)
    if manifest is not None and settings.target_length is not None:
        _say_target(manifest, settings, progress)
    return manifest


class EntropyMeter:
    """Where an artifact's entropies come from: a model, what is stored, or nowhere."""

    def __init__(self, artifact: Artifact, settings: PatchifySettings) -> None:
        self.artifact, self.settings = artifact, settings
        manifest = artifact.manifest
        self.model: LlamaGen | None = None
        self.origin = manifest.entropy_model  # path and fingerprint; None where nothing was measured
        self.precision: str | None = manifest.settings["precision"] if manifest.kind == "patches" else None
        if settings.entropy_model is not None and manifest.kind == "patches":
            given = fingerprint_of(settings.entropy_model)
            if self.origin is None:
                raise StageError(f"{artifact.folder} holds no entropies; to measure them, patchify the codes anew")
            if given != self.origin["fingerprint"]:
                raise StageError(
                    f"{artifact.folder} already holds entropies, of another entropy model; "
                    "leave --entropy-model out to use them, or patchify the codes anew"
                )
        elif settings.entropy_model is not None:
            model = load_entropy_model(settings.entropy_model)
            fits(model, manifest, str(artifact.folder), unconditional=True)
            device = choose_device(settings.device)
            self.model = model.to(device)
            self.precision = precision_name(device, settings.precision)
            self.origin = {"path": settings.entropy_model, "fingerprint": fingerprint_of(settings.entropy_model)}
        elif settings.strategy == "entropy" and self.origin is None:
            raise StageError(f"{artifact.folder} holds no entropies; name the entropy model with --entropy-model")

    def measure(self, rows: Rows) -> NDArray[np.float16]:
        """Entropies (R, views, N) float16 of a shard's rows; NaN where nothing measures them (but +inf at token 0)."""
        if rows.entropy is not None and self.model is None:
            return rows.entropy
        return self._of_codes(rows.codes)

    def sample(self, images: int) -> NDArray[np.float16]:
        """Entropies (n, N): every view where there are at most ``images``, else one each of images spread evenly."""
        manifest = self.artifact.manifest
        chosen = np.unique(np.linspace(0, manifest.rows - 1, min(images, manifest.rows)).astype(np.int64))
        drawn = np.arange(len(chosen)) % manifest.views
        if manifest.rows * manifest.views <= images:
            chosen, drawn = np.divmod(np.arange(manifest.rows * manifest.views), manifest.views)
        batch = self.artifact.gather(chosen, drawn)
        if batch.entropy is not None and self.model is None:
            return batch.entropy
        return self._of_codes(batch.codes)

    def _of_codes(self, codes: NDArray[Any]) -> NDArray[np.float16]:
        if self.model is None:
            nothing = np.full(codes.shape, np.nan, np.float16)
            nothing[..., 0] = np.inf
            return nothing
        flat = codes.reshape(-1, codes.shape[-1])
        measured = entropies(self.model, flat, batch=self.settings.batch, precision=self.settings.precision)
        return measured.reshape(codes.shape)


def boundaries(entropy: NDArray[np.float16], rule: dict[str, Any], grid_width: int) -> NDArray[np.bool_]:
    """Starts (..., N) bool of stored entropies (..., N), by the rule that a manifest's settings hold."""
    if rule["strategy"] == "static":
        return np.broadcast_to(static_starts(entropy.shape[-1], rule["static_length"]), entropy.shape).copy()
    limit = rule["max_length"] or None
    return patch_starts(entropy, rule["threshold"], limit, grid_width, rule["row_reset"])


def find_threshold(
    entropy: NDArray[np.float16], target: float, max_length: int | None, grid_width: int, row_reset: bool
) -> float:
    """The threshold whose mean patch length on (n, N) stored entropies comes nearest to ``target``.

    Raises:
        StageError: no threshold can reach it, with the range that can be.
    """
    candidates = np.unique(entropy[:, 1:].astype(np.float32))

    def length(threshold: float) -> float:
        starts = patch_starts(entropy, threshold, max_length, grid_width, row_reset)
        return entropy.size / int(starts.sum())

    longest = length(math.inf)
    if not length(float(candidates[0])) <= target <= longest * (1 + 1e-6):
        raise StageError(
            f"--target-length {target:g} cannot be reached: with --max-length {max_length or 0} and "
            f"--{'' if row_reset else 'no-'}row-reset lengths from 1 to {longest:.3f} can be"
        )
    low, high = 0, len(candidates) - 1  # length rises with the threshold
    while low < high:
        middle = (low + high) // 2
        if length(float(candidates[middle])) < target:
            low = middle + 1
        else:
            high = middle
    near = [float(candidates[i]) for i in (low - 1, low) if i >= 0] + [float(np.nextafter(candidates[-1], np.inf))]
    return min(near, key=lambda threshold: abs(length(threshold) - target))


def _rule(meter: EntropyMeter, settings: PatchifySettings, progress: Progress) -> dict[str, Any]:
    """The resolved rule: strategy, threshold, max_length (0: no limit), row_reset, static_length."""
    manifest = meter.artifact.manifest
    rule: dict[str, Any] = {
        "strategy": settings.strategy,
        "threshold": settings.threshold,
        "max_length": settings.max_length,
        "row_reset": settings.row_reset,
        "static_length": settings.static_length,
    }
    if settings.strategy == "static":
        return rule | {"max_length": 0, "row_reset": False}
    limit = settings.max_length or None
    sample = meter.sample(PROBE if settings.target_length is None else settings.sample)
    if settings.target_length is not None:
        rule["threshold"] = find_threshold(sample, settings.target_length, limit, manifest.grid[1], settings.row_reset)
        progress.say(f"threshold {rule['threshold']:.4f} nats, found on {len(sample)} sequences")
    starts = boundaries(sample, rule, manifest.grid[1])
    if bool(starts.all()) and settings.max_length != 1:
        finite = sample[:, 1:].astype(np.float32)
        if settings.target_length is not None:
            raise StageError(
                f"--target-length {settings.target_length:g} cannot be reached: the entropies are too alike to tell "
                f"tokens apart ({finite.min():.3f} to {finite.max():.3f} nats); train the entropy model longer"
            )
        raise StageError(
            f"--threshold {rule['threshold']:g} makes every token its own patch: on {len(sample)} images entropies "
            f"reach from {finite.min():.2f} to {finite.max():.2f} nats. Raise it, or give --target-length; "
            "--max-length 1 if one token a patch is what you want"
        )
    return rule


def _statistics(starts: NDArray[np.bool_]) -> dict[str, Any]:
    """Sequences, patches, and how many patches have each length, of (R, views, N) boundaries."""
    if starts.size == 0:
        return {"sequences": 0, "patches": 0, "lengths": {}}
    lengths = patch_lengths(starts)
    values, counts = np.unique(lengths, return_counts=True)
    return {
        "sequences": int(np.prod(starts.shape[:-1])),
        "patches": len(lengths),
        "lengths": {str(int(v)): int(c) for v, c in zip(values, counts, strict=True)},
    }


def merge_statistics(parts: list[dict[str, Any]], n_tokens: int) -> dict[str, Any]:
    """Statistics of an artifact from those of its shards."""
    sequences, patches = (sum(part[name] for part in parts) for name in ("sequences", "patches"))
    lengths: Counter[str] = Counter()
    for part in parts:
        lengths.update(part["lengths"])
    return {
        "sequences": sequences,
        "tokens_per_image": n_tokens,
        "patches_per_image": patches / sequences,
        "mean_length": sequences * n_tokens / patches,
        "lengths": dict(sorted(lengths.items(), key=lambda item: int(item[0]))),
    }


def _say_target(manifest: Manifest, settings: PatchifySettings, progress: Progress) -> None:
    assert settings.target_length is not None
    reached = manifest.statistics["mean_length"]
    off = abs(reached / settings.target_length - 1)
    why = (
        "no threshold comes nearer: too many entropies are alike"
        if manifest.rows * manifest.views <= settings.sample
        else "the sample was not like the rest: raise --sample"
    )
    progress.say(
        f"mean patch length {reached:.3f} on all data, {off:.1%} from --target-length {settings.target_length:g}"
        + ("" if off <= 0.01 else f"; {why}")
    )
