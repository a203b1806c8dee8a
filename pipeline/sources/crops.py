"""The square crops of an image that are tokenized: LlamaGen's views on ADM's resize.

    views(image, 256, "ten-crop", (1.1, 1.05))               # (20, 256, 256, 3), the paper's views
    views(image, 256, "center", (1.0,))                      # (1, 256, 256, 3), ADM's centre crop

Bit-identical to the input of LlamaGen's ``extract_codes_c2i.py``, without torchvision: crop ranges in the given order,
and within each the crops in the order of torchvision's ``ten_crop``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from dpar import images
from dpar.errors import ModelError
from pipeline.runtime.errors import StageError
from pipeline.sources.decode import to_rgb
from pipeline.sources.source import UnusableImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

ViewKind = Literal["center", "flip", "ten-crop"]

_VIEWS_PER_RANGE: dict[str, int] = {"center": 1, "flip": 2, "ten-crop": 10}


def n_views(kind: ViewKind, crop_ranges: Sequence[float]) -> int:
    """Return the number of views per image.

    Raises:
        StageError: an unknown kind, no crop range, or one below 1.
    """
    if kind not in _VIEWS_PER_RANGE:
        raise StageError(f"no views of kind {kind!r}; choose from {', '.join(get_args(ViewKind))}")
    if len(crop_ranges) == 0:
        raise StageError("no crop range; give at least one, 1.0 for the plain crop")
    for crop_range in crop_ranges:
        if not (math.isfinite(crop_range) and crop_range >= 1):
            raise StageError(f"crop range {crop_range} is not a number of at least 1: a crop cannot exceed its image")
    return _VIEWS_PER_RANGE[kind] * len(crop_ranges)


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Return ADM's ``center_crop_arr``: halve with BOX while large, resize with BICUBIC, crop the centre.

    Args:
        image: any mode; converted to RGB as sources do.
        size: side of the crop in pixels.

    Returns:
        (size, size, 3) uint8.

    Raises:
        StageError: ``size`` below 1.
        UnusableImage: it is so elongated that it exceeds `MAX_PIXELS` at this size.
    """
    _check_size(size)
    return _center_crop([image if image.mode == "RGB" else to_rgb(image)], size)


def views(
    image: Image.Image, size: int, kind: ViewKind = "ten-crop", crop_ranges: Sequence[float] = (1.1, 1.05)
) -> NDArray[np.uint8]:
    """Return the views of an image: for each crop range R, crops of its ``center_crop`` to ``int(size * R)``.

    Args:
        image: any mode; converted to RGB as sources do.
        size: side of a view in pixels.
        kind: ``center``: the centre. ``flip``: the centre and its mirror image. ``ten-crop``: top left, top right,
            bottom left, bottom right and centre, then the same crops of the mirrored image.
        crop_ranges: each at least 1.

    Returns:
        (V, size, size, 3) uint8, V as in `n_views`, ordered by range.

    Raises:
        StageError: ``size`` below 1, an unknown kind, no crop range, or one below 1.
        UnusableImage: it is so elongated that it exceeds `MAX_PIXELS` at this size.
    """
    _check_size(size)
    out = np.empty((n_views(kind, crop_ranges), size, size, 3), dtype=np.uint8)
    halvings = [image if image.mode == "RGB" else to_rgb(image)]
    crops: list[NDArray[np.uint8]] = []
    for crop_range in crop_ranges:
        square = _center_crop(halvings, int(size * crop_range))
        if kind == "ten-crop":
            crops += _five_crops(square, size) + _five_crops(square[:, ::-1], size)
        else:
            center = _five_crops(square, size)[-1]
            crops += [center, center[:, ::-1]] if kind == "flip" else [center]
    return np.stack(crops, out=out)


def _check_size(size: int) -> None:
    if size < 1:
        raise StageError(f"image size is {size}; it must be at least 1 pixel")


def _center_crop(halvings: list[Image.Image], size: int) -> NDArray[np.uint8]:
    """Return the centre crop; see :func:`dpar.images.center_crop`."""
    try:
        return images.center_crop(halvings, size)
    except ModelError as error:
        raise UnusableImage(str(error)) from error


def _five_crops(square: NDArray[Any], size: int) -> list[NDArray[np.uint8]]:
    far = square.shape[0] - size
    middle = round(far / 2.0)
    places = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
    return [square[top : top + size, left : left + size] for top, left in places]
