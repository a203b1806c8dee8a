"""The result of ``dpar inspect``: one record, for tables, pages and ``numbers.json``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CodebookUse:
    """How many codes occur."""

    used: int
    share: float  # of the codebook
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class Entropies:
    """Entropies in nats, without token 0."""

    mean: float
    quantiles: dict[str, float]  # by probability, as text


@dataclass(frozen=True, kw_only=True)
class PatchLengths:
    """Patches over all images and views."""

    mean_length: float  # tokens
    patches_per_image: float
    tokens_saved: float  # 1 - M/N


@dataclass(frozen=True, kw_only=True)
class LengthRange:
    """Mean patch lengths of the classes."""

    min: float
    median: float
    max: float


@dataclass(frozen=True, kw_only=True)
class StoredPatches(PatchLengths):
    """The patches stored in the artifact."""

    class_mean_length: LengthRange
    lengths: dict[str, int]  # patches by length


@dataclass(frozen=True, kw_only=True)
class ThresholdPatches(PatchLengths):
    """The patches at another threshold."""

    threshold: float  # nats


@dataclass(frozen=True, kw_only=True)
class CompressibleClass:
    """A class with few or many patches."""

    class_name: str
    images: int
    patches_per_image: float
    mean_length: float


@dataclass(frozen=True, kw_only=True)
class CompressibleImage:
    """An image with few or many patches."""

    key: str
    class_name: str
    patches_per_image: float
    mean_length: float


@dataclass(frozen=True, kw_only=True)
class ClassExtremes:
    """Classes at both ends, the extreme ones first."""

    most: list[CompressibleClass]
    least: list[CompressibleClass]


@dataclass(frozen=True, kw_only=True)
class ImageExtremes:
    """Images at both ends, the extreme ones first."""

    most: list[CompressibleImage]
    least: list[CompressibleImage]


@dataclass(frozen=True, kw_only=True)
class Compressible:
    """The most and the least compressible."""

    classes: ClassExtremes
    images: ImageExtremes


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """An artifact in numbers; None for those that do not apply."""

    artifact: str
    kind: str
    rows: int
    views: int
    grid: list[int]
    tokens_per_image: int
    codebook_size: int
    classes: int
    container: str
    shards: int
    bytes: int
    source: dict[str, Any]
    tokenizer: dict[str, Any]
    entropy_model: dict[str, Any] | None
    left_out: int
    reconstruction: dict[str, Any] | None
    verified: bool
    fingerprint: str
    settings: dict[str, Any]
    made_by: dict[str, Any]
    codebook: CodebookUse
    entropy: Entropies | None = None
    patches: StoredPatches | None = None
    thresholds: list[ThresholdPatches] = field(default_factory=list)
    compressible: Compressible | None = None
    pictures: list[str] = field(default_factory=list)  # file names, next to the page
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values by key."""
        return dataclasses.asdict(self, dict_factory=_json_keys)


def _json_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {"class" if name == "class_name" else name: value for name, value in items}
