"""The square crops of an image that are tokenized: LlamaGen's views, on ADM's resize.

    views(image, 256, "ten-crop", (1.1, 1.05))               # (20, 256, 256, 3), the paper's views
    views(image, 256, "center", (1.0,))                      # (1, 256, 256, 3), ADM's centre crop

Bit for bit what LlamaGen's ``extract_codes_c2i.py`` feeds its tokenizer, without torchvision: ranges in the order
given, and for each its crops in the order of torchvision's ``ten_crop``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from pipeline.runtime.errors import StageError
from pipeline.sources.decode import MAX_PIXELS, to_rgb
from pipeline.sources.source import UnusableImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

ViewKind = Literal["center", "flip", "ten-crop"]

_VIEWS_A_RANGE: dict[str, int] = {"center": 1, "flip": 2, "ten-crop": 10}


def n_views(kind: ViewKind, crop_ranges: Sequence[float]) -> int:
    """The number of views of an image.

    Raises:
        StageError: an unknown kind, no crop range, or one below 1.
    """
    if kind not in _VIEWS_A_RANGE:
        raise StageError(f"no views of kind {kind!r}; there is: {', '.join(get_args(ViewKind))}")
    if len(crop_ranges) == 0:
        raise StageError("no crop range; give at least one, 1.0 for the plain crop")
    for crop_range in crop_ranges:
        if not (math.isfinite(crop_range) and crop_range >= 1):
            raise StageError(f"crop range {crop_range} is not a number from 1 up: a crop cannot exceed its image")
    return _VIEWS_A_RANGE[kind] * len(crop_ranges)


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """ADM's ``center_crop_arr``: halve with BOX while large, BICUBIC to the short side, cut out the centre.

    Args:
        image: any mode; what is not RGB is converted as sources convert it.
        size: side of the crop in pixels.

    Returns:
        (size, size, 3) uint8.

    Raises:
        StageError: ``size`` below 1.
        UnusableImage: so long and thin that it would have more than `MAX_PIXELS` at this size.
    """
    _check_size(size)
    return _center_crop([image if image.mode == "RGB" else to_rgb(image)], size)


def views(
    image: Image.Image, size: int, kind: ViewKind = "ten-crop", crop_ranges: Sequence[float] = (1.1, 1.05)
) -> NDArray[np.uint8]:
    """The views of an image, for each crop range R cut from its ``center_crop`` to ``int(size * R)``.

    Args:
        image: any mode; what is not RGB is converted as sources convert it.
        size: side of a view in pixels.
        kind: ``center``: the centre. ``flip``: that and its mirror image. ``ten-crop``: top left, top right,
            bottom left, bottom right and centre, then the same five places of the mirrored image.
        crop_ranges: each at least 1.

    Returns:
        (V, size, size, 3) uint8, V as in `n_views`; the views of a range follow one another.

    Raises:
        StageError: ``size`` below 1, an unknown kind, no crop range, or one below 1.
        UnusableImage: so long and thin that it would have more than `MAX_PIXELS` at this size.
    """
    _check_size(size)
    out = np.empty((n_views(kind, crop_ranges), size, size, 3), dtype=np.uint8)
    halvings = [image if image.mode == "RGB" else to_rgb(image)]
    crops: list[NDArray[np.uint8]] = []
    for crop_range in crop_ranges:
        whole = _center_crop(halvings, int(size * crop_range))
        if kind == "ten-crop":
            crops += _five_crops(whole, size) + _five_crops(whole[:, ::-1], size)
        else:
            center = _five_crops(whole, size)[-1]
            crops += [center, center[:, ::-1]] if kind == "flip" else [center]
    return np.stack(crops, out=out)


def _check_size(size: int) -> None:
    if size < 1:
        raise StageError(f"image size is {size}; it must be at least 1 pixel")


def _center_crop(halvings: list[Image.Image], size: int) -> NDArray[np.uint8]:
    """``halvings`` holds the image and its halvings so far, and is added to: crop ranges share them."""
    step = 0
    while min(halvings[step].size) >= 2 * size:
        if step + 1 == len(halvings):
            width, height = halvings[step].size
            halvings.append(halvings[step].resize((width // 2, height // 2), resample=Image.Resampling.BOX))
        step += 1
    image = halvings[step]
    scale = size / min(image.size)
    width, height = (round(x * scale) for x in image.size)
    if width * height > max(MAX_PIXELS, size * size):
        raise UnusableImage(f"too long and thin: {image.width}×{image.height} would become {width}×{height}")
    pixels = np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def _five_crops(whole: NDArray[Any], size: int) -> list[NDArray[np.uint8]]:
    far = whole.shape[0] - size
    middle = round(far / 2.0)
    places = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
    return [whole[top : top + size, left : left + size] for top, left in places]
