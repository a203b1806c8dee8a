"""Statistics of patch lengths: counted per shard while writing, and merged exactly.

    counts = count_patches(starts, labels)               # JSON values, stored per shard in the manifest
    statistics = merge_counts(counts_per_shard, n_tokens=256, views=20, class_names=names)
    print("\\n".join(summary(statistics)))

Counts are integers, so the result does not depend on how the work was divided.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import ArtifactError
from shards.manifest import Manifest
from shards.records import Positive, parse

BLOCK = 2**20  # tokens measured at once, to bound memory
NAMED = 3  # classes listed at each end of the summary
SHOWN = 8  # lengths in the summary's histogram


@dataclass(frozen=True, kw_only=True)
class ClassRecord:
    """The statistics of one class in a manifest."""

    images: Positive
    patches_per_image: float
    mean_length: float


@dataclass(frozen=True, kw_only=True)
class StatisticsRecord:
    """The statistics in a manifest; see `merge_counts`."""

    mean_length: float
    patches_per_image: float
    tokens_saved: float
    lengths: dict[str, Positive]
    patch_counts: dict[str, Positive]
    classes: tuple[ClassRecord, ...]


def check_statistics(manifest: Manifest, where: str) -> None:
    """Check that a patches manifest has the statistics that `merge_counts` returns.

    Raises:
        ArtifactError: a field is missing, of another type, or has an impossible value.
    """
    record = parse(StatisticsRecord, manifest.statistics, where, at="statistics", ignore_unknown=True)
    most = manifest.n_tokens
    for name in ("lengths", "patch_counts"):
        for value in getattr(record, name):
            if not re.fullmatch("[0-9]{1,10}", value) or int(value) > most:
                raise ArtifactError(f"{where}: field statistics.{name} counts {value[:20]!r}, expected up to {most}")
    for name in ("lengths", "patch_counts", "classes"):
        if not getattr(record, name):
            raise ArtifactError(f"{where}: field statistics.{name} is empty")
    for entry in manifest.statistics["classes"]:
        if not isinstance(entry.get("class"), str):
            raise ArtifactError(f"{where}: field statistics.classes has a class without a name")


def patch_lengths(starts: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the lengths in tokens, (patches,) int64, of all patches of boundaries (..., N) bool, in order.

    Token 0 of every sequence starts a patch, so no patch spans two sequences.
    """
    return np.diff(np.flatnonzero(starts), append=starts.size)


def count_patches(starts: NDArray[np.bool_], labels: NDArray[np.int32]) -> dict[str, Any]:
    """Return the counts of one shard.

    Args:
        starts: (R, views, N) bool, boundaries.
        labels: (R,) int32.

    Returns:
        ``sequences`` (R · views) and ``patches`` as numbers; ``lengths`` (patches per length), ``patch_counts``
        (sequences per number of patches) and ``classes`` (images and patches per label) as text, ``"VALUE:COUNT …"``:
        one line of the manifest, where a JSON object takes thousands.
    """
    rows, views, n_tokens = starts.shape
    lengths = np.zeros(n_tokens + 1, np.int64)
    step = max(1, BLOCK // (views * n_tokens))
    for first in range(0, rows, step):
        lengths += np.bincount(patch_lengths(starts[first : first + step]), minlength=len(lengths))
    of_views = np.count_nonzero(starts, axis=2)
    present, place, images = np.unique(labels, return_inverse=True, return_counts=True)
    patches = np.zeros(len(present), np.int64)
    np.add.at(patches, place, of_views.sum(axis=1))
    return {
        "sequences": rows * views,
        "patches": int(of_views.sum()),
        "lengths": _text(np.flatnonzero(lengths), lengths[lengths > 0]),
        "patch_counts": _text(*np.unique(of_views, return_counts=True)),
        "classes": _text(present, images, patches),
    }


def _text(*columns: NDArray[np.integer[Any]]) -> str:
    return " ".join(":".join(map(str, row)) for row in zip(*(column.tolist() for column in columns), strict=True))


def _numbers(text: str) -> Iterator[list[int]]:
    for row in text.split():
        yield [int(value) for value in row.split(":")]


def merge_counts(
    parts: Sequence[dict[str, Any]], *, n_tokens: int, views: int, class_names: Sequence[str]
) -> dict[str, Any]:
    """Return the statistics of an artifact from the counts of its shards (:func:`count_patches`).

    Returns:
        ``sequences``, ``patches``, ``tokens_per_image``, ``patches_per_image``, ``mean_length``, ``tokens_saved``
        (1 - M/N), ``lengths`` and ``patch_counts`` (``{"VALUE": COUNT}``), and ``classes``, those with images, in
        the order of their labels: ``class``, ``images``, ``patches_per_image``, ``mean_length``.
    """
    sequences, patches = (sum(part[name] for part in parts) for name in ("sequences", "patches"))
    lengths: Counter[int] = Counter()
    counts: Counter[int] = Counter()
    images_of: Counter[int] = Counter()
    patches_of: Counter[int] = Counter()
    for part in parts:
        for counter, name in ((lengths, "lengths"), (counts, "patch_counts")):
            for value, count in _numbers(part[name]):
                counter[value] += count
        for label, n_images, n_patches in _numbers(part["classes"]):
            images_of[label] += n_images
            patches_of[label] += n_patches
    return {
        "sequences": sequences,
        "patches": patches,
        "tokens_per_image": n_tokens,
        "patches_per_image": patches / sequences,
        "mean_length": sequences * n_tokens / patches,
        "tokens_saved": 1 - patches / (sequences * n_tokens),
        "lengths": {str(value): lengths[value] for value in sorted(lengths)},
        "patch_counts": {str(value): counts[value] for value in sorted(counts)},
        "classes": [
            {
                "class": class_name(class_names, label),
                "images": images_of[label],
                "patches_per_image": patches_of[label] / (images_of[label] * views),
                "mean_length": images_of[label] * views * n_tokens / patches_of[label],
            }
            for label in sorted(images_of)
        ],
    }


def class_name(class_names: Sequence[str], label: int) -> str:
    """Return the name of class ``label``; its number if it has no name."""
    return class_names[label] if label < len(class_names) else f"label {label}"


def count_quantile(counts: dict[str, int], quantile: float) -> int:
    """Return the quantile of values counted as ``{"VALUE": COUNT}``: the smallest value with that share at or below."""
    values = np.array([int(value) for value in counts])
    order = np.argsort(values)
    ends = np.cumsum(np.array(list(counts.values()))[order])
    return int(values[order][np.searchsorted(ends, max(1, np.ceil(quantile * ends[-1])))])


def lengths_differ(statistics: dict[str, Any]) -> bool:
    """Return whether images have different numbers of patches; in the static scheme they do not."""
    return len(statistics["patch_counts"]) > 1


def by_compressibility(statistics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the classes of an artifact's statistics, fewest patches per image first."""
    return sorted(statistics["classes"], key=lambda entry: float(entry["patches_per_image"]))


def summary(statistics: dict[str, Any]) -> list[str]:
    """Return the statistics in a few lines of text."""
    low, middle, high = (count_quantile(statistics["patch_counts"], q) for q in (0, 0.5, 1))
    lengths = [(int(length), count) for length, count in statistics["lengths"].items()]
    total = sum(count for _, count in lengths)
    shares = [f"{length} {count / total:.1%}" for length, count in lengths[:SHOWN]]
    if rest := sum(count for _, count in lengths[SHOWN:]):
        shares.append(f"longer {rest / total:.1%}")
    lines = [
        f"mean patch length {statistics['mean_length']:.3f}, {statistics['tokens_saved']:.1%} of tokens saved",
        f"patches per image: mean {statistics['patches_per_image']:.1f}, median {middle}, {low} to {high} "
        f"(of {statistics['tokens_per_image']} tokens)",
        f"patch lengths: {', '.join(shares)}",
    ]
    classes = by_compressibility(statistics) if lengths_differ(statistics) else []
    ends = min(NAMED, len(classes) // 2)
    for end, entries in (("most", classes[:ends]), ("least", classes[::-1][:ends])):
        if entries:
            named = ", ".join(f"{entry['class']} {entry['mean_length']:.2f}" for entry in entries)
            lines.append(f"{end} compressible classes, by mean length: {named}")
    return lines
