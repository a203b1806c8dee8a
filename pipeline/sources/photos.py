"""``builtin:photos``: real images without a download, for demos, tests and experiments.

    source = open_source("builtin:photos", split="train")    # 15 classes × 128 images
    source = open_source("builtin:photos", split="validation", classes=["cat", "coffee"], limit=8)

Each class is one photograph of the scikit-image wheel, each image a square crop of it. The first two thirds of the
longer side give the training crops, the last third the validation crops, so the splits share no pixel.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipeline.runtime.errors import StageError
from pipeline.sources.decode import read_image
from pipeline.sources.source import IndexedSource, UnusableImage, choose

if TYPE_CHECKING:
    from numpy.typing import NDArray

CROPS = {"train": 128, "validation": 16}  # crops per photograph, by split
SIDES = (128, 256)  # smallest and largest side of a crop in pixels of the photograph, if it is large enough
_SEED = 0
# Sorted by class name: the position is the seed of the random boxes.
_FILES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "immunohistochemistry": "ihc.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
_NAMES = tuple(_FILES)


class Photos(IndexedSource):
    """Square crops of the photographs in scikit-image. A crop depends only on (photograph, split, number)."""

    def __init__(self, split: str = "train", *, classes: Sequence[str] = (), limit: int | None = None) -> None:
        if split not in CROPS:
            raise StageError(f"builtin:photos has no split {split!r}; it has: {', '.join(CROPS)}")
        self.kind, self.location, self.split = "photos", "builtin:photos", split
        labels = np.repeat(np.arange(len(_NAMES)), CROPS[split])
        choice = choose(_NAMES, labels, classes=classes, limit=limit)
        self.class_names = choice.class_names
        self._labels = choice.labels
        self._numbers = choice.indices % CROPS[split]
        self._photos: dict[str, Image.Image] = {}
        self._boxes: dict[str, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._labels)

    def key(self, i: int) -> str:
        """Return the name of image ``i``, such as ``cat/train-0007``."""
        return f"{self._name(i)}/{self.split}-{int(self._numbers[i]):04d}"

    def label(self, i: int) -> int:
        """Return the class of image ``i``: its photograph."""
        return int(self._labels[i])

    def load(self, i: int) -> Image.Image:
        """Return image ``i``: a crop of its photograph, mode RGB."""
        return self._photo(self._name(i)).crop(self.box(i))

    def box(self, i: int) -> tuple[int, int, int, int]:
        """Return the box of image ``i`` in its photograph: left, top, right, bottom, in pixels."""
        name = self._name(i)
        if name not in self._boxes:
            self._boxes[name] = _boxes(_NAMES.index(name), str(self.split), self._photo(name).size)
        left, top, right, bottom = (int(x) for x in self._boxes[name][self._numbers[i]])
        return left, top, right, bottom

    def _name(self, i: int) -> str:
        return self.class_names[self._labels[i]]

    def _photo(self, name: str) -> Image.Image:
        if name not in self._photos:
            self._photos[name] = _open_photo(_FILES[name])
        return self._photos[name]


def _open_photo(file: str) -> Image.Image:
    # Read by path: the functions of skimage.data may use the network.
    import skimage

    path = os.path.join(next(iter(skimage.__path__)), "data", file)
    try:
        return read_image(path)
    except UnusableImage as error:
        raise StageError(f"builtin:photos: {path}: {error.reason}; reinstall scikit-image from its wheel") from error


def _boxes(photo: int, split: str, size: tuple[int, int]) -> NDArray[np.int64]:
    """Return the boxes of a photograph's crops, (crops, 4) int64: left, top, right, bottom."""
    width, height = size
    across = width >= height
    cut = max(size) * 2 // 3
    validation = (width - cut, height) if across else (width, height - cut)
    if split == "validation":
        part, offset = validation, ((cut, 0) if across else (0, cut))
    else:
        part, offset = ((cut, height) if across else (width, cut)), (0, 0)

    # Both splits have the same scales: sides are limited by the smaller one.
    low = min(SIDES[0], *validation)
    high = max(low, min(SIDES[1], *validation))
    generator = np.random.Generator(np.random.Philox(key=[_SEED, photo * 2 + (split == "validation")]))
    side_at, left_at, top_at = generator.random((CROPS[split], 3)).T
    side = low + np.floor(side_at * (high - low + 1)).astype(np.int64)
    left = offset[0] + np.floor(left_at * (part[0] - side + 1)).astype(np.int64)
    top = offset[1] + np.floor(top_at * (part[1] - side + 1)).astype(np.int64)
    return np.stack([left, top, left + side, top + side], axis=1)
