"""Zero-shot editing: sample a part of an image and keep the rest (``dpar sample --image``).

    edit = Edit.of(generator, SampleSettings(image=Path("cat.jpg"), mask=Path("mask.png"), classes=("cat",)))
    edit.known                                               # the tokens to keep, for Generator.sample

The image is cropped and encoded as for training. A token with any masked pixel is sampled; the others keep their codes,
so they decode to the tokenizer's reconstruction of the original, except for a few pixels next to new tokens. Sampling
is in raster order: a new token sees the tokens above it and left of it in its row, kept or new, but no later ones. So
extending images downwards works well, but the lower and right edges of a hole may be visible.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dpar.images import kept_tokens
from dpar.tokenizer import from_uint8
from pipeline.generation.generator import Generator, KeptTokens
from pipeline.reports.pictures import enlarge, sheet
from pipeline.runtime.errors import StageError
from pipeline.settings.sampling import SampleSettings
from pipeline.sources import UnusableImage
from pipeline.sources.crops import views
from pipeline.sources.decode import read_image

VEIL = 0.75  # opacity of the grey over masked pixels on the sheet


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An image, and which of its tokens are kept."""

    original: NDArray[np.uint8]  # (H, W, 3), as it was encoded
    known: KeptTokens

    @classmethod
    def of(cls, generator: Generator, settings: SampleSettings) -> Edit:
        """Return the edit that ``image`` and ``mask`` or ``keep_rows`` describe, for this generator's grid.

        Raises:
            StageError: a file cannot be read, the mask has another size than the image, or there is nothing to sample.
        """
        assert settings.image is not None
        rows, columns = generator.grid
        if rows != columns:
            raise StageError(f"the model is for {rows}×{columns} tokens; editing needs a square grid")
        image = _read(settings.image)
        original = _crop(image, generator.image_size[0])
        if settings.mask is not None:
            mask = _read(settings.mask)
            if mask.size != image.size:
                raise StageError(
                    f"the mask {settings.mask} is {mask.width}×{mask.height} pixels, the image {settings.image} "
                    f"{image.width}×{image.height}; both must have the same size"
                )
            kept = kept_tokens(_crop(mask, generator.image_size[0]), generator.grid)
            nothing = (
                f"{settings.mask} has no white pixel in the part of the image that is used, a square at its centre"
            )
        else:
            assert settings.keep_rows is not None
            kept = np.repeat(np.arange(rows) < settings.keep_rows, columns)
            nothing = f"--keep-rows {settings.keep_rows} keeps all {rows} rows of tokens"
        if kept.all():
            raise StageError(f"there is nothing to sample: {nothing}")
        return cls(original=original, known=KeptTokens(codes=_codes(generator, original), kept=kept))

    def record(self) -> dict[str, Any]:
        """Return what determines the samples, for the artifact's settings."""
        codes = np.where(self.known.kept, self.known.codes, -1).astype("<i8")
        return {"kept": int(self.known.kept.sum()), "tokens": hashlib.sha256(codes.tobytes()).hexdigest()[:16]}


def edit_sheet(generator: Generator, edit: Edit, results: list[Image.Image]) -> Image.Image:
    """Return a sheet of the original, the original with its masked part grey, its reconstruction, and the results."""
    times = results[0].width // edit.original.shape[1]
    f = generator.tokenizer.config.downsampling
    masked = np.kron(~edit.known.kept.reshape(generator.grid), np.ones((f, f), bool))[..., None]
    veiled = np.where(masked, edit.original * (1 - VEIL) + 128 * VEIL, edit.original).astype(np.uint8)
    decoded = generator.decode(edit.known.codes[None])[0]
    first = [enlarge(part, times) for part in (edit.original, veiled, decoded)]
    heads = ["original", "grey: sampled", "reconstruction", *(f"result {i}" for i in range(len(results)))]
    return sheet([[*first, *results]], column_titles=heads)


def _read(path: Path) -> Image.Image:
    if not path.is_file():
        raise StageError(f"there is no image {path}")
    try:
        return read_image(path)
    except UnusableImage as error:
        raise StageError(f"{path} cannot be used: {error.reason}") from error


def _crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    try:
        return views(image, size, "center", (1.0,))[0]
    except UnusableImage as error:
        raise StageError(f"the image cannot be used: {error.reason}") from error


@torch.no_grad()
def _codes(generator: Generator, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    images = from_uint8(torch.from_numpy(pixels[None])).to(generator.device)
    return generator.tokenizer.encode(images)[0].cpu().numpy()
