"""Picture preprocessing for the tokenizer: RGB conversion and ADM's centre crop.

pixels = center_crop([to_rgb(image)], 256)               # (256, 256, 3) uint8
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dpar.errors import ModelError

_BITS_PER_SAMPLE = 0x0102
MAX_PIXELS = 178_000_000  # of a stored or resized picture; Pillow refuses more


def center_crop(halvings: list[Image.Image], size: int) -> NDArray[np.uint8]:
    """Return ADM's ``center_crop_arr``: halve with BOX while large, resize with BICUBIC, crop the centre.

    Args:
        halvings: a picture of mode RGB; its halvings are appended, for crops of other sizes.
        size: side of the crop in pixels.

    Returns:
        (size, size, 3) uint8.

    Raises:
        ModelError: the picture is so long and thin that resizing it would exceed `MAX_PIXELS`.
    """
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
        raise ModelError(f"too long and thin: {image.width}×{image.height} would become {width}×{height}")
    pixels = np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def kept_tokens(mask: NDArray[np.uint8], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which tokens a mask keeps, (N,) bool: those without a white pixel.

    Args:
        mask: (H, W, 3), cropped as its image; white where a channel is at least 128.
        grid: rows and columns of tokens.
    """
    rows, columns = grid
    white = mask.max(axis=2) >= 128
    cells = white.reshape(rows, mask.shape[0] // rows, columns, mask.shape[1] // columns)
    return ~cells.any(axis=(1, 3)).reshape(-1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a copy in mode RGB: transparency composed on white, 16-bit grey scaled to 8 bit, not clipped.

    Raises:
        ModelError: a colour mode without a defined range or conversion (floats, LAB, 32-bit integers).
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey16_to_rgb(image)
    if image.mode == "F":
        raise ModelError("floating-point pixels, whose range is unknown")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ModelError(f"colour mode {image.mode} cannot be converted to RGB") from error


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    # Pillow loads 12-bit TIFF unscaled in a 16-bit mode.
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    peak = 4095 if bits == 12 else 65535
    if values.min() < 0 or values.max() > peak:
        raise ModelError(f"grey values outside 0..{peak}, whose range is unknown")
    scaled = (np.arange(peak + 1) * 255 + peak // 2) // peak
    grey = scaled.astype(np.uint8)[values]
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
