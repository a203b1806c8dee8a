"""The actions of the tabs as plain functions of the model: sample, edit, measure an image, place its patches.

pictures = generate(model, [3], 4, Choices(cfg_scale=2.0))
pictures = edit(model, image, 3, 4, Choices(), keep_rows=8)
measured = model.pipe.patchify(image)                    # the model runs once
view = place_patches(model, measured, threshold=5.0, max_length=4, row_reset=True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from dpar.image_pipeline import DPARPipeline, PatchedImage, PipelineImages
from pipeline.app.model import Model
from pipeline.app.pictures import LARGE, Picture
from pipeline.reports.charts import entropy_scale
from pipeline.reports.pictures import draw_patches, enlarge, entropy_map, scale_for
from pipeline.runtime.provenance import made_by
from pipeline.settings.fields import LARGEST, require

MOST_IMAGES = 64  # per job

Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How to sample. The pipeline checks the values that are not checked here."""

    cfg_scale: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    threshold: float | None = None  # nats; None uses that of the training data
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require(value is not None or name == "threshold", f"{name.replace('_', '-')} is empty; give a number")
        require(0 <= self.seed <= LARGEST, f"the seed is {self.seed}; it must be from 0 to {LARGEST}")


def generate(
    model: Model, labels: Sequence[int], per_class: int, choices: Choices, progress: Progress | None = None
) -> list[Picture]:
    """Sample ``per_class`` pictures of each class.

    Raises:
        StageError, ModelError: no class, too many pictures, or an invalid setting.
    """
    require(len(labels) > 0, "choose at least one class")
    _check_count(len(labels) * per_class)
    sampled = model.pipe(
        list(labels),
        images_per_class=per_class,
        **asdict(choices),
        entropies=model.pipe.entropy_model is not None,
        progress=progress,
    )
    return _pictures(model, sampled, choices)


def edit(
    model: Model,
    image: Image.Image | None,
    label: int | None,
    count: int,
    choices: Choices,
    *,
    mask: Image.Image | None = None,
    keep_rows: int | None = None,
    progress: Progress | None = None,
) -> list[Picture]:
    """Sample a part of an image ``count`` times and keep the rest; see :class:`DPARPipeline`.

    Raises:
        StageError, ModelError: no image or class, nothing to sample, or an invalid setting.
    """
    require(image is not None, "choose an image first, or upload one")
    require(label is not None, "choose a class for the sampled part")
    assert label is not None
    _check_count(count)
    sampled = model.pipe(
        label,
        images_per_class=count,
        **asdict(choices),
        entropies=model.pipe.entropy_model is not None,
        image=image,
        mask=mask,
        keep_rows=keep_rows,
        progress=progress,
    )
    assert sampled.kept is not None
    return _pictures(model, sampled, choices, {"keep_rows": keep_rows, "kept_tokens": int(sampled.kept.sum())})


def mean_patches(pictures: Sequence[Picture]) -> float:
    """Return the mean number of patches per image."""
    return float(np.mean([picture.starts.sum() for picture in pictures]))


def _check_count(count: int) -> None:
    require(1 <= count <= MOST_IMAGES, f"{count} pictures were requested; from 1 to {MOST_IMAGES} are possible")


def _pictures(
    model: Model, sampled: PipelineImages, choices: Choices, more: dict[str, Any] | None = None
) -> list[Picture]:
    rule = model.pipe.rule_at(choices.threshold)
    common = {"model": model.name, **asdict(choices)}
    common |= {} if rule is None else rule.to_dict()
    common |= {**(more or {}), "dpar": made_by().get("dpar", "")}
    pictures = []
    for index, (image, label, starts) in enumerate(zip(sampled.images, sampled.labels, sampled.starts, strict=True)):
        own = {
            "class": model.pipe.class_names[label],
            "label": int(label),
            "index": index,
            "patches": int(starts.sum()),
        }
        entropy = None if sampled.entropies is None else sampled.entropies[index]
        pictures.append(
            Picture(image=image, starts=starts, entropy=entropy, grid=model.pipe.grid, settings={**own, **common})
        )
    return pictures


@dataclass(frozen=True, kw_only=True)
class PlacedPatches:
    """The patches of an image by some rule."""

    picture: Image.Image  # the reconstruction with its patches drawn
    patches: int


def place_patches(
    model: Model, measured: PatchedImage, threshold: float, max_length: int, row_reset: bool
) -> PlacedPatches:
    """Place patches from measured entropies, without running the model; a ``max_length`` of 0 means no limit.

    Raises:
        ModelError: the rule does not take these values.
    """
    rule = model.pipe.rule_at(threshold, max_length, row_reset)
    assert rule is not None  # or rule_at would have raised
    starts = rule.starts(measured.entropies.reshape(-1), model.pipe.grid[1])
    pixels = np.asarray(measured.reconstruction)
    picture = draw_patches(pixels, starts, model.pipe.grid, scale_for(pixels.shape[1], LARGE))
    return PlacedPatches(picture=picture, patches=int(starts.sum()))


def measured_pictures(pipe: DPARPipeline, measured: PatchedImage) -> tuple[Image.Image, Image.Image]:
    """Return the reconstruction of an image, and its entropy map with a colour bar."""
    pixels = np.asarray(measured.reconstruction)
    values = measured.entropies.reshape(-1)
    times = scale_for(pixels.shape[1], LARGE)
    return enlarge(pixels, times), entropy_map(values, pipe.grid, entropy_scale(values), pixels.shape[0] * times)


def mask_of_layers(layers: Sequence[Image.Image | None], size: tuple[int, int]) -> Image.Image:
    """Return a mask that is white where something is painted on a layer (RGBA), black elsewhere."""
    painted = np.zeros((size[1], size[0]), bool)
    for layer in layers:
        if layer is not None:
            painted |= np.asarray(layer.convert("RGBA"))[..., 3] > 0
    return Image.fromarray(np.where(painted, np.uint8(255), np.uint8(0)))
