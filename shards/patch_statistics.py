"""How long an artifact's patches are: counted shard by shard in the pass that makes them, and put together exactly.

    counted = count_patches(starts, labels)              # JSON values; each shard's stand in the manifest
    statistics = merge_counts(counts_of_shards, n_tokens=256, views=20, class_names=names)
    print("\\n".join(summary(statistics)))

Counts are integers, so however the work was split they add up to the same numbers.
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

BLOCK = 2**20  # tokens whose patches are measured at once, so that memory stays small
NAMED = 3  # classes named at each end of the summary
SHOWN = 8  # lengths in the summary's histogram


@dataclass(frozen=True, kw_only=True)
class ClassRecord:
    """What a manifest's statistics hold of a class."""

    images: Positive
    patches_per_image: float
    mean_length: float


@dataclass(frozen=True, kw_only=True)
class StatisticsRecord:
    """What a manifest's statistics hold; see `merge_counts`."""

    mean_length: float
    patches_per_image: float
    tokens_saved: float
    lengths: dict[str, Positive]
    patch_counts: dict[str, Positive]
    classes: tuple[ClassRecord, ...]


def check_statistics(manifest: Manifest, where: str) -> None:
    """Check that a patches manifest's statistics are what `merge_counts` gives.

    Raises:
        ArtifactError: something is missing, of another type, or counts what cannot be.
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
    """Lengths in tokens of all patches of (..., N) boundaries, in order: (patches,) int64.

    Token 0 of every sequence starts a patch, so none spans two sequences.
    """
    return np.diff(np.flatnonzero(starts), append=starts.size)


def count_patches(starts: NDArray[np.bool_], labels: NDArray[np.int32]) -> dict[str, Any]:
    """What boundaries (R, views, N) bool of images with labels (R,) add to the statistics.

    Returns:
        ``sequences`` (R · views) and ``patches`` in numbers; ``lengths`` (patches of each length), ``patch_counts``
        (sequences of each number of patches) and ``classes`` (images and patches of each label) in text,
        ``"VALUE:COUNT …"``, which is a line of the manifest where a JSON object would be thousands.
    """
    rows, views, n_tokens = starts.shape
    lengths = np.zeros(n_tokens + 1, np.int64)
    step = max(1, BLOCK // (views * n_tokens))
    for first in range(0, rows, step):
        lengths += np.bincount(patch_lengths(starts[first : first + step]), minlength=len(lengths))
    of_views = np.count_nonzero(starts, axis=2)
    found, home, images = np.unique(labels, return_inverse=True, return_counts=True)
    patches = np.zeros(len(found), np.int64)
    np.add.at(patches, home, of_views.sum(axis=1))
    return {
        "sequences": rows * views,
        "patches": int(of_views.sum()),
        "lengths": _text(np.flatnonzero(lengths), lengths[lengths > 0]),
        "patch_counts": _text(*np.unique(of_views, return_counts=True)),
        "classes": _text(found, images, patches),
    }


def _text(*columns: NDArray[np.integer[Any]]) -> str:
    return " ".join(":".join(map(str, row)) for row in zip(*(column.tolist() for column in columns), strict=True))


def _numbers(text: str) -> Iterator[list[int]]:
    for row in text.split():
        yield [int(value) for value in row.split(":")]


def merge_counts(
    parts: Sequence[dict[str, Any]], *, n_tokens: int, views: int, class_names: Sequence[str]
) -> dict[str, Any]:
    """The statistics of an artifact from what :func:`count_patches` gave for its shards.

    Returns:
        ``sequences``, ``patches``, ``tokens_per_image``, ``patches_per_image``, ``mean_length``, ``tokens_saved``
        (1 - M/N), ``lengths`` and ``patch_counts`` (``{"VALUE": COUNT}``), and ``classes``, those that have images in
        the order of their labels: ``class``, ``images``, ``patches_per_image``, ``mean_length``.
    """
    sequences, patches = (sum(part[name] for part in parts) for name in ("sequences", "patches"))
    lengths: Counter[int] = Counter()
    counts: Counter[int] = Counter()
    images_of: Counter[int] = Counter()
    patches_of: Counter[int] = Counter()
    for part in parts:
        for of, name in ((lengths, "lengths"), (counts, "patch_counts")):
            for value, count in _numbers(part[name]):
                of[value] += count
        for label, images, held in _numbers(part["classes"]):
            images_of[label] += images
            patches_of[label] += held
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
    """What class ``label`` is called; one past the names goes by its number."""
    return class_names[label] if label < len(class_names) else f"label {label}"


def count_quantile(counts: dict[str, int], quantile: float) -> int:
    """The value at ``quantile`` of values counted as ``{"VALUE": COUNT}``: the smallest that so many do not exceed."""
    values = np.array([int(value) for value in counts])
    order = np.argsort(values)
    ends = np.cumsum(np.array(list(counts.values()))[order])
    return int(values[order][np.searchsorted(ends, max(1, np.ceil(quantile * ends[-1])))])


def lengths_differ(statistics: dict[str, Any]) -> bool:
    """Whether images have different numbers of patches, which they do not in the static scheme."""
    return len(statistics["patch_counts"]) > 1


def by_compressibility(statistics: dict[str, Any]) -> list[dict[str, Any]]:
    """The classes of an artifact's statistics, fewest patches per image first."""
    return sorted(statistics["classes"], key=lambda entry: float(entry["patches_per_image"]))


def summary(statistics: dict[str, Any]) -> list[str]:
    """The statistics in a few lines of text."""
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
