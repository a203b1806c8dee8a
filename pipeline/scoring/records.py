"""Records of ``dpar eval``, written and read as JSON: held-out rows, reconstruction, cells, and the results.

    row = HeldOutRow.from_json(read_json(path), str(path))
    Results.read(Path("scores/results.json")).cells[0].scores

Files are flat JSON, except for intervals and the scores of further networks. Keys that depend on the features, such as
``FID``, are those of :data:`DISTANCE`, :data:`RECONSTRUCTION` and :data:`PREFIX`; the confidence interval of a quantity
has its key plus "_interval".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pipeline.scoring.bootstrap import Interval
from pipeline.settings.fields import Features, Network
from shards.errors import ArtifactError
from shards.records import parse, read_json

DISTANCE = {
    "inception": "FID",
    "tokenizer": "tokenizer Fréchet distance",
    "efficientnet": "FD (EfficientNet-Lite0)",
    "dinov2": "FD-DINOv2",
}
SPATIAL_DISTANCE = "sFID"
KERNEL_DISTANCE = {
    "inception": "KID",
    "tokenizer": "tokenizer KID",
    "efficientnet": "KID (EfficientNet-Lite0)",
    "dinov2": "KID-DINOv2",
}
RECONSTRUCTION = {
    "inception": "rFID",
    "tokenizer": "tokenizer reconstruction distance",
    "efficientnet": "reconstruction FD (EfficientNet-Lite0)",
}
# Of precision and recall
PREFIX = {"inception": "", "tokenizer": "tokenizer_", "efficientnet": "efficientnet_", "dinov2": "dinov2_"}


@dataclass(frozen=True, kw_only=True)
class HeldOutRow:
    """A model's likelihood of the held-out images, ``likelihood/NAME.json``."""

    weights: str  # fingerprint
    name: str = ""
    checkpoint: str | None = None
    step: int | None = None
    threshold: float | None = None  # of the rule of the held-out patches; it and the next three are None for LlamaGen
    max_length: int | None = None
    row_reset: bool | None = None
    static_length: float | None = None
    bits_per_token: float | None = None  # None without held-out images, like the following except tokens_per_image
    bits_per_token_interval: Interval | None = None
    bits_by_class: dict[str, float] = field(default_factory=dict)
    held_out_images: int | None = None
    patches_per_image: float | None = None
    mean_length: float | None = None  # tokens per patch
    tokens_per_image: int
    gmacs_per_image: float | None = None
    parameters: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values by key."""
        if self.bits_per_token is None:
            return {"weights": self.weights, "tokens_per_image": self.tokens_per_image}
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any, where: str) -> HeldOutRow:
        """Parse the output of :meth:`to_json`; ``where`` names the file in messages.

        Raises:
            ArtifactError: a value is missing or of another type.
        """
        return parse(cls, values, where, ignore_unknown=True)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How well the tokenizer reconstructs the held-out images, ``reconstruction.json``."""

    features: Features
    originals: int  # images compared; 0 if they cannot be read
    psnr_db: float | None = None
    ssim: float | None = None
    distance: float | None = None  # None for a single image
    distance_interval: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values by key."""
        values = dataclasses.asdict(self)
        named = {key: values[name] for name, key in self._keys(self.features).items()}
        return {key: value for key, value in named.items() if value is not None}

    @classmethod
    def from_json(cls, values: dict[str, Any], features: Features, where: str) -> Reconstruction:
        """Parse the output of :meth:`to_json`.

        Raises:
            ArtifactError: a value is missing or of another type.
        """
        return parse(cls, {"features": features} | _renamed(values, cls._keys(features)), where)

    @staticmethod
    def _keys(features: Features) -> dict[str, str]:
        return {
            "originals": "originals",
            "psnr_db": "reconstruction_psnr_db",
            "ssim": "reconstruction_ssim",
            "distance": RECONSTRUCTION[features],
            "distance_interval": f"{RECONSTRUCTION[features]}_interval",
        }


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How far a cell's samples are from the reference."""

    distance: float
    distance_interval: Interval | None = None  # None for few images or without a bootstrap, like all intervals
    spatial_distance: float | None = None  # None without Inception's spatial features on both sides
    spatial_distance_interval: Interval | None = None
    kernel_distance: float | None = None  # None without the reference's features
    kernel_distance_interval: Interval | None = None
    kernel_distance_error: float | None = None  # its standard error; None for few images
    reference_images: int | None  # None if unknown
    inception_score: float | None = None  # None without Inception's logits
    inception_score_std: float | None = None
    precision: float | None = None  # None without the reference's features
    recall: float | None = None

    def to_json(self, features: Network) -> dict[str, Any]:
        """Return JSON values by the quantities' names for these features."""
        values, name = dataclasses.asdict(self), DISTANCE[features]
        named = {"distance": name, name: self.distance, "reference_images": self.reference_images}
        keys = self._keys(features)
        return named | {keys[field]: values[field] for field in keys if values[field] is not None}

    @classmethod
    def from_json(cls, values: dict[str, Any], features: Network, where: str) -> Scores:
        """Parse the output of :meth:`to_json`; other keys of ``values`` are ignored.

        Raises:
            ArtifactError: a value is missing or of another type.
        """
        keys = {"distance": DISTANCE[features], "reference_images": "reference_images"}
        return parse(cls, _renamed(values, keys | cls._keys(features)), where)

    @staticmethod
    def _keys(features: Network) -> dict[str, str]:
        prefix, kernel = PREFIX[features], KERNEL_DISTANCE[features]
        names = {"spatial_distance": SPATIAL_DISTANCE, "kernel_distance": kernel}
        names |= {"kernel_distance_error": f"{kernel} error"}
        intervals = {"distance": DISTANCE[features], "spatial_distance": SPATIAL_DISTANCE, "kernel_distance": kernel}
        names |= {f"{field}_interval": f"{name}_interval" for field, name in intervals.items()}
        names |= {"inception_score": "inception_score", "inception_score_std": "inception_score_std"}
        return names | {"precision": f"{prefix}precision", "recall": f"{prefix}recall"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row at one guidance scale: how its images were sampled, and their scores; ``cells/NAME/cell.json``."""

    name: str
    checkpoint: str | None
    step: int | None
    training_flops: float | None = None
    cfg_scale: float
    cfg_schedule: str
    threshold: float | None
    max_length: int | None
    samples: int
    labels: str
    features: Features
    decode_precision: str
    tokens_per_image: int | None = None
    patches_per_image: float | None = None
    mean_length: float | None = None  # tokens per patch
    bits_per_token: float | None = None
    bits_per_token_interval: Interval | None = None
    held_out_patches_per_image: float | None = None
    held_out_mean_length: float | None = None
    gmacs_per_image: float | None = None
    images_per_second: float | None = None  # of one process; None if some codes were sampled by an earlier call
    scores: Scores | None = None  # None without a reference
    also: dict[str, Scores] = field(default_factory=dict)  # by further networks

    def to_json(self) -> dict[str, Any]:
        """Return JSON values by key, including the scores; those by further networks are in "also"."""
        values = dataclasses.asdict(self)
        del values["scores"]
        values["also"] = {name: scores.to_json(network(name)) for name, scores in self.also.items()}
        return values if self.scores is None else values | self.scores.to_json(self.features)

    def row(self) -> dict[str, Any]:
        """Return the same values without nesting, for a table; names of scores contain the network."""
        values = self.to_json()
        further = values.pop("also")
        shared = ("distance", "reference_images")
        return values | {key: x for scores in further.values() for key, x in scores.items() if key not in shared}

    @classmethod
    def from_json(cls, values: Any, where: str) -> Cell:
        """Parse the output of :meth:`to_json`.

        Raises:
            ArtifactError: a value is missing or of another type.
        """
        further = parse(_Also, values, where, ignore_unknown=True).also
        also = {name: Scores.from_json(scores, network(name), where) for name, scores in further.items()}
        own = {key: value for key, value in values.items() if key not in ("scores", "also")}
        cell = dataclasses.replace(parse(cls, own, where, ignore_unknown=True), also=also)
        if "distance" not in values:
            return cell
        return dataclasses.replace(cell, scores=Scores.from_json(values, cell.features, where))


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The scores of a second set of real images, ``floor/NAME.json``: what samples can be expected to reach."""

    source: str  # where the images are
    fingerprint: str  # of the source
    samples: int  # images compared
    features: Features
    scores: Scores

    def to_json(self) -> dict[str, Any]:
        """Return JSON values by key, including the scores."""
        values = dataclasses.asdict(self)
        del values["scores"]
        return values | self.scores.to_json(self.features)

    @classmethod
    def from_json(cls, values: Any, where: str) -> Floor:
        """Parse the output of :meth:`to_json`.

        Raises:
            ArtifactError: a value is missing or of another type.
        """
        features = parse(_Identity, values, where, ignore_unknown=True).features
        scores = Scores.from_json(values, features, where)
        return parse(cls, {**values, "scores": dataclasses.asdict(scores)}, where, ignore_unknown=True)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How a score of the samples was measured. Scores are comparable only if all of this is equal."""

    score: str  # name
    network: str  # of the features
    weights: str  # fingerprint or name of the network's weights
    resize: str  # how images are resized for the network
    reference: str | None  # None for a score without a reference
    reference_images: int | None  # None if unknown
    samples: int
    labels: str  # how the samples' classes were chosen
    decode_precision: str  # of decoding the samples


@dataclass(frozen=True, kw_only=True)
class Results:
    """All results of an evaluation, ``results.json``."""

    newest: HeldOutRow  # of the first requested checkpoint and rule
    reconstruction: Reconstruction | None  # None without held-out images
    identity: dict[str, Any]
    made_by: dict[str, Any]
    held_out: Sequence[HeldOutRow]
    cells: Sequence[Cell]
    floor: Floor | None = None  # None unless requested
    measures: Sequence[Measure] = ()
    protocol: str | None = None  # the requested one
    deviations: Sequence[str] = ()  # from it

    def to_json(self) -> dict[str, Any]:
        """Return JSON values by key; those of the first row and of the reconstruction are at the top level."""
        rows = [row.to_json() for row in self.held_out]
        for row in rows:
            del row["bits_by_class"]
        return {
            **self.newest.to_json(),
            **({} if self.reconstruction is None else self.reconstruction.to_json()),
            "identity": self.identity,
            "made_by": self.made_by,
            "held_out": rows,
            "cells": [cell.to_json() for cell in self.cells],
            "measures": [dataclasses.asdict(measure) for measure in self.measures],
            "protocol": self.protocol,
            "deviations": list(self.deviations),
            **({} if self.floor is None else {"floor": self.floor.to_json()}),
        }

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read the output of :meth:`to_json` from a file.

        Raises:
            ArtifactError: it cannot be read, or a value is missing or of another type.
        """
        where, file = str(path), read_json(path)
        values = parse(_ResultsFile, file, where, ignore_unknown=True)
        compared = Reconstruction.from_json(file, values.identity.features, where) if "originals" in file else None
        return cls(
            newest=HeldOutRow.from_json(file, where),
            reconstruction=compared,
            identity=file["identity"],
            made_by=values.made_by,
            held_out=[HeldOutRow.from_json(row, where) for row in values.held_out],
            cells=[Cell.from_json(cell, where) for cell in values.cells],
            floor=Floor.from_json(file["floor"], where) if "floor" in file else None,
            measures=values.measures,
            protocol=values.protocol,
            deviations=values.deviations,
        )


@dataclass(frozen=True, kw_only=True)
class _Identity:
    features: Features


@dataclass(frozen=True, kw_only=True)
class _ResultsFile:
    identity: _Identity
    made_by: dict[str, Any]
    held_out: list[Any]
    cells: list[Any]
    measures: list[Measure] = field(default_factory=list)
    protocol: str | None = None
    deviations: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Also:
    also: dict[str, Any] = field(default_factory=dict)


def network(name: str) -> Network:
    """Return the network called ``name``; raise ArtifactError if there is none."""
    for known in get_args(Network):
        if name == known:
            return known
    raise ArtifactError(f"{name!r} is not a network that images are compared by")


def _renamed(values: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """Return ``values`` by field name; ``keys`` maps field names to keys. Missing keys are skipped."""
    return {name: values[key] for name, key in keys.items() if key in values}
