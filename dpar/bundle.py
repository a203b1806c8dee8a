"""A bundle: everything that sampling needs in one directory, laid out like a diffusers pipeline.

    bundle = Bundle.read(Path("bundle"))
    bundle.class_names, bundle.rule, bundle.parts["tokenizer"]

    bundle.json          class names, patch rule, training cost, and the SHA-256 of each part
    generator/           the DPAR or LlamaGen: config.json, model.safetensors, README.md
    entropy_model/       the unconditional LlamaGen that decides patch boundaries; absent for a LlamaGen generator
    tokenizer/           the VQ tokenizer
    README.md            the model card

A bundle is accepted wherever weights are: the part needed there is used.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dpar.errors import ModelError
from dpar.files import atomic_path
from dpar.patching import PatchRule
from dpar.tensors import shown

BUNDLE = "bundle.json"
FORMAT = 1
LARGEST = 2**24  # bytes of bundle.json
Part = Literal["generator", "entropy_model", "tokenizer"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """How long the generator was trained."""

    model: str  # preset
    steps: int
    batch: int  # images per step
    gflops_per_image: float  # forward and backward


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The contents of ``bundle.json``."""

    class_names: tuple[str, ...]
    parts: Mapping[Part, str]  # SHA-256 of each part's weights
    rule: PatchRule | None  # of the training data; None for a LlamaGen
    training: TrainingCost | None = None  # None: unknown

    def write(self, folder: Path) -> None:
        """Write ``bundle.json`` into ``folder``. Call it last: it marks the bundle as complete."""
        values = {
            "format": FORMAT,
            "class_names": list(self.class_names),
            "patch_rule": None if self.rule is None else self.rule.to_dict(),
            "training": None if self.training is None else dataclasses.asdict(self.training),
            "parts": {name: self.parts[name] for name in PARTS if name in self.parts},
        }
        with atomic_path(folder / BUNDLE) as part:
            part.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Bundle:
        """Return the bundle in ``folder``.

        Raises:
            ModelError: ``bundle.json`` is missing, damaged, or of a format that this version does not read.
        """
        path = folder / BUNDLE
        try:
            if path.stat().st_size > LARGEST:
                raise ModelError(f"{path} cannot be read: {path.stat().st_size:,} bytes are too many for a {BUNDLE}")
            values = json.loads(path.read_text(encoding="utf-8"))
        except ModelError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            version = values.get("format") if isinstance(values, dict) else None
            raise ModelError(f"{path} has format version {shown(version)}; this version reads {FORMAT}")
        try:
            return cls(
                class_names=_class_names(values["class_names"]),
                parts=_parts(values["parts"]),
                rule=None if values["patch_rule"] is None else PatchRule.from_dict(values["patch_rule"]),
                training=_training(values.get("training")),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ModelError(f"{path} is damaged: {reason}") from error


def _class_names(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError("class_names must be a list of strings")
    return tuple(names)


def _training(values: Any) -> TrainingCost | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise TypeError("training must be an object")
    cost = TrainingCost(**values)
    if not isinstance(cost.model, str) or any(
        isinstance(number, bool) or not isinstance(number, (int, float))
        for number in (cost.steps, cost.batch, cost.gflops_per_image)
    ):
        raise TypeError("training must have a model name and three numbers")
    return cost


def _parts(values: Any) -> dict[Part, str]:
    if not isinstance(values, dict):
        raise TypeError("parts must be an object")
    if unknown := sorted(set(values) - set(PARTS)):
        raise TypeError(f"{shown(unknown[0])} is not a part of a bundle")
    for name, recorded in values.items():
        if not isinstance(recorded, str):
            raise TypeError(f"the fingerprint of {name} must be a string")
    for needed in ("generator", "tokenizer"):
        if needed not in values:
            raise KeyError(needed)
    return {name: values[name] for name in PARTS if name in values}
