"""Decode an image file to RGB pixels, or raise an error with the reason in plain words.

    image = read_image("photos/cat/1.jpg")                   # PIL, mode RGB, upright
    image = decode_image(io.BytesIO(member_of_a_tar))

All sources decode here, so that a file gives the same pixels wherever it is stored. Pillow's global settings are not
changed. Any number of threads may decode at once; `budget` limits their memory.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import warnings
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from dpar import images
from dpar.errors import ModelError
from dpar.images import MAX_PIXELS
from pipeline.sources.pixel_budget import PixelBudget
from pipeline.sources.source import UnusableImage, source_lost
from shards.files import open_regular

MAX_BYTES = 512 * 2**20  # maximum bytes of an image file; larger files are not read
TOO_MANY_BYTES = f"too large: more than {MAX_BYTES // 2**20} MiB"
"""The reason for leaving out a file of more than `MAX_BYTES`."""

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
)
"""Suffixes of image files, in lower case."""

# Only these, whatever the suffix: Pillow's EPS reader starts Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_TOO_LARGE = f"too large: more than {MAX_PIXELS // 1_000_000} million pixels"

budget = PixelBudget(MAX_PIXELS)
"""Limits the pixels that all threads of this process decode at once to those of one image of the largest size."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Return the image in a file; see `decode_image`.

    Raises:
        UnusableImage: also if the file is not readable or has more than `MAX_BYTES`.
        StageError: the file is gone or its disk fails.
    """
    try:
        with open_regular(path) as stream:
            if os.fstat(stream.fileno()).st_size > MAX_BYTES:
                raise UnusableImage(TOO_MANY_BYTES)
            # Read first: to Pillow a failing disk looks like a damaged image.
            data = stream.read()
    except PermissionError:
        raise UnusableImage("no permission to read") from None
    except OSError as error:
        raise source_lost(os.fspath(path), error) from error
    return decode_image(io.BytesIO(data))


def decode_image(stream: BinaryIO) -> Image.Image:
    """Return the image in a seekable stream: mode RGB, upright by its EXIF, the first frame of an animation.

    Transparency is composed on white; 16-bit grey is scaled to 8 bit; colour profiles are ignored, as in ADM.

    Raises:
        UnusableImage: empty, truncated, damaged, not an image, or more than `MAX_PIXELS` by its header.
    """
    head = stream.read(16)
    if not head:
        raise UnusableImage("empty file")
    stream.seek(0)
    try:
        with _quiet, Image.open(stream, formats=_FORMATS) as image:
            _check_size(image)
            with budget.take(image.width * image.height):
                image.load()
                turn = _UPRIGHT.get(_orientation(image))
                rgb = to_rgb(image)
                return rgb if turn is None else rgb.transpose(turn)
    except UnusableImage:
        raise
    except Exception as error:  # Pillow's readers raise all kinds of errors on damaged bytes
        raise UnusableImage(_reason(error, head)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a copy in mode RGB; see :func:`dpar.images.to_rgb`.

    Raises:
        UnusableImage: a colour mode without a defined range or conversion (floats, LAB, 32-bit integers).
    """
    try:
        return images.to_rgb(image)
    except ModelError as error:
        raise UnusableImage(str(error)) from error


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise UnusableImage(f"no pixels: {width}×{height}")
    if width * height > MAX_PIXELS:
        raise UnusableImage(f"{_TOO_LARGE} ({width}×{height})")


def _orientation(image: Image.Image) -> int:
    # Damaged EXIF does not affect the pixels.
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises all kinds of errors
        return 1


def _reason(error: Exception, head: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        if head.startswith(_SIGNATURES):
            return "truncated or damaged: its header cannot be read"
        return "not an image of a supported format (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM)"
    if isinstance(error, Image.DecompressionBombError):
        return _TOO_LARGE
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    text = " ".join(str(error).split())[:120]
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return f"truncated ({text})" if text else "truncated"
    return f"damaged ({text or type(error).__name__})"


class _Quiet:
    """Suppresses Pillow's warnings and log lines while at least one thread is inside.

    Plain ``catch_warnings`` in several threads restores filters out of order and leaves some behind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        # This handler prevents the fallback to stderr; an application's handlers still get the lines.
        self._handler = logging.NullHandler()
        self._saved: warnings.catch_warnings[None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
                logging.getLogger("PIL").addHandler(self._handler)
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._saved is not None:
                self._saved.__exit__(None, None, None)
                logging.getLogger("PIL").removeHandler(self._handler)
                self._saved = None


_quiet = _Quiet()
