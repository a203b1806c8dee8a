"""One pass over an artifact: counts of each code and each entropy, and of the patches of its images.

survey = Survey.of(artifact, thresholds=(7.0, 8.5), rule=rule, progress=progress)
inspection = numbers(artifact, survey, settings)         # the result of ``dpar inspect``
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpar.patching import PatchRule
from pipeline.reports.charts import entropy_scale
from pipeline.reports.inspection_record import (
    ClassExtremes,
    CodebookUse,
    Compressible,
    CompressibleClass,
    CompressibleImage,
    Entropies,
    ImageExtremes,
    Inspection,
    LengthRange,
    StoredPatches,
    ThresholdPatches,
)
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.settings.artifacts import InspectSettings
from shards.manifest import Manifest
from shards.patch_statistics import by_compressibility, class_name, lengths_differ
from shards.reader import Artifact
from shards.rows import Rows
from shards.storage import size

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
EXTREMES = 5  # images and classes listed at each end
BLOCK = 2**20  # tokens counted at once, to bound memory

# All values that a stored entropy can have, by its 16 bits.
_HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)


def starts_at(rule: PatchRule, entropy: NDArray[np.float16], threshold: float, grid_width: int) -> NDArray[np.bool_]:
    """Return boundaries (..., N) bool of stored entropies (..., N) with another ``threshold``."""
    return dataclasses.replace(rule, strategy="entropy", static_length=None, threshold=threshold).starts(
        entropy, grid_width
    )


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Counts of one pass over an artifact. The last three are zero for codes."""

    labels: NDArray[np.int32]  # (rows,)
    codes: NDArray[np.int64]  # (V,) how often each code occurs
    patches: NDArray[np.int32]  # (rows,) over all views
    entropy: NDArray[np.int64]  # (65536,) how often each float16 occurs, by its bits, without token 0
    thresholds: NDArray[np.int64]  # (thresholds,) patches of the entire artifact at each

    @classmethod
    def of(cls, artifact: Artifact, thresholds: Sequence[float], rule: PatchRule, progress: Progress) -> Survey:
        """Read every shard once, one at a time."""
        manifest = artifact.manifest
        survey = cls(
            labels=np.zeros(manifest.rows, np.int32),
            codes=np.zeros(manifest.codebook_size, np.int64),
            patches=np.zeros(manifest.rows, np.int32),
            entropy=np.zeros(2**16, np.int64),
            thresholds=np.zeros(len(thresholds), np.int64),
        )
        first = 0
        with progress.task("inspect", manifest.rows, "images") as task:
            for index in range(len(manifest.shards)):
                rows = artifact.shard_rows(index)
                survey._add(rows, first, thresholds, rule, manifest.grid[1])
                first += len(rows)
                task.advance(len(rows))
        if thresholds and not survey.finite_entropies:
            raise StageError(f"{artifact.folder} holds no entropies, which --threshold needs")
        return survey

    def _add(self, rows: Rows, first: int, thresholds: Sequence[float], rule: PatchRule, grid_width: int) -> None:
        here = slice(first, first + len(rows))
        self.labels[here] = rows.labels
        self.patches[here] = 0 if rows.starts is None else np.count_nonzero(rows.starts, axis=(1, 2))
        step = max(1, BLOCK // int(np.prod(rows.codes.shape[1:])))
        for first in range(0, len(rows), step):
            block = slice(first, first + step)
            self.codes[:] += np.bincount(rows.codes[block].reshape(-1), minlength=len(self.codes))
            if rows.entropy is None:
                continue
            later = np.ascontiguousarray(rows.entropy[block][..., 1:])
            self.entropy[:] += np.bincount(later.view(np.uint16).reshape(-1), minlength=2**16)
            for i, threshold in enumerate(thresholds):
                self.thresholds[i] += np.count_nonzero(starts_at(rule, rows.entropy[block], threshold, grid_width))

    @property
    def finite_entropies(self) -> int:
        """Number of tokens with a measured entropy."""
        return int(self.entropy[np.isfinite(_HALVES)].sum())

    @property
    def entropy_scale(self) -> tuple[float, float]:
        """Colour scale for all entropy maps of the artifact."""
        percentiles = entropy_quantiles(self.entropy, np.arange(1, 100) / 100) if self.finite_entropies else []
        return entropy_scale(np.array(percentiles))


def entropy_quantiles(counts: NDArray[np.int64], quantiles: Sequence[float] | NDArray[np.float64]) -> list[float]:
    """Return exact quantiles in nats of finite entropies, from counts by their float16 bits, (65536,)."""
    bits = np.flatnonzero(np.isfinite(_HALVES) & (counts > 0))
    bits = bits[np.argsort(_HALVES[bits], kind="stable")]
    ends = np.cumsum(counts[bits])
    ranks = np.maximum(np.ceil(np.asarray(quantiles) * ends[-1]), 1)
    return [float(x) for x in _HALVES[bits[np.searchsorted(ends, ranks)]]]


def numbers(artifact: Artifact, survey: Survey, settings: InspectSettings) -> Inspection:
    """Return the result of ``dpar inspect`` for an artifact, without pictures."""
    manifest = artifact.manifest
    used = int(np.count_nonzero(survey.codes))
    share = survey.codes[survey.codes > 0] / max(int(survey.codes.sum()), 1)
    inspection = Inspection(
        artifact=str(artifact.folder),
        kind=manifest.kind,
        rows=manifest.rows,
        views=manifest.views,
        grid=list(manifest.grid),
        tokens_per_image=manifest.n_tokens,
        codebook_size=manifest.codebook_size,
        classes=len(manifest.class_names),
        container=manifest.container,
        shards=len(manifest.shards),
        bytes=sum(size(artifact.folder / s.name) if s.bytes is None else s.bytes for s in manifest.shards),
        source=manifest.source,
        tokenizer=manifest.tokenizer,
        entropy_model=manifest.entropy_model,
        left_out=manifest.left_out,
        reconstruction=manifest.statistics.get("reconstruction"),
        verified=settings.verify,
        fingerprint=manifest.fingerprint(),
        settings=manifest.settings,
        made_by=manifest.made_by,
        codebook=CodebookUse(
            used=used,
            share=used / manifest.codebook_size,
            perplexity=float(np.exp(-(share * np.log(share)).sum())),
        ),
    )
    if manifest.kind != "patches":
        return inspection
    counted = zip(settings.threshold, survey.thresholds, strict=True)
    return dataclasses.replace(
        inspection,
        entropy=_entropies(survey) if survey.finite_entropies else None,
        patches=_stored_patches(manifest),
        thresholds=[_at_threshold(threshold, int(patches), manifest) for threshold, patches in counted],
        compressible=_compressible(artifact, survey) if lengths_differ(manifest.statistics) else None,
    )


def _entropies(survey: Survey) -> Entropies:
    finite = np.flatnonzero(np.isfinite(_HALVES) & (survey.entropy > 0))
    mean = float((_HALVES[finite] * survey.entropy[finite]).sum() / survey.finite_entropies)
    values = entropy_quantiles(survey.entropy, QUANTILES)
    return Entropies(mean=mean, quantiles={f"{q:g}": value for q, value in zip(QUANTILES, values, strict=True)})


def _at_threshold(threshold: float, patches: int, manifest: Manifest) -> ThresholdPatches:
    sequences = manifest.rows * manifest.views
    tokens = sequences * manifest.n_tokens
    return ThresholdPatches(
        threshold=threshold,
        mean_length=tokens / max(patches, 1),
        patches_per_image=patches / max(sequences, 1),
        tokens_saved=1 - patches / max(tokens, 1),
    )


def _stored_patches(manifest: Manifest) -> StoredPatches:
    statistics = manifest.statistics
    by_class = [entry["mean_length"] for entry in statistics["classes"]]
    return StoredPatches(
        mean_length=statistics["mean_length"],
        patches_per_image=statistics["patches_per_image"],
        tokens_saved=statistics["tokens_saved"],
        class_mean_length=LengthRange(min=min(by_class), median=float(np.median(by_class)), max=max(by_class)),
        lengths=statistics["lengths"],
    )


def _compressible(artifact: Artifact, survey: Survey) -> Compressible:
    """Return the classes and images with the fewest and the most patches per image, the most extreme first."""
    manifest = artifact.manifest
    classes = [
        CompressibleClass(
            class_name=entry["class"],
            images=entry["images"],
            patches_per_image=entry["patches_per_image"],
            mean_length=entry["mean_length"],
        )
        for entry in by_compressibility(manifest.statistics)
    ]
    order = np.argsort(survey.patches, kind="stable")
    few, many = order[:EXTREMES], order[::-1][: min(EXTREMES, max(len(order) - EXTREMES, 0))]

    def images(rows: NDArray[np.int64]) -> list[CompressibleImage]:
        return [
            CompressibleImage(
                key=key,
                class_name=class_name(manifest.class_names, int(survey.labels[row])),
                patches_per_image=float(survey.patches[row] / manifest.views),
                mean_length=float(manifest.views * manifest.n_tokens / survey.patches[row]),
            )
            for row, key in zip(rows, artifact.keys(rows), strict=True)
        ]

    return Compressible(
        classes=ClassExtremes(most=classes[:EXTREMES], least=classes[: EXTREMES - 1 : -1][:EXTREMES]),
        images=ImageExtremes(most=images(few), least=images(many)),
    )
