"""Sampled pictures with their patches, entropies and settings: drawn for the page, and as PNG files.

drawn(picture, patches=True, size=THUMBNAIL), entropy_picture(picture, scale)
write_png(picture, folder)                               # a PNG whose text chunk "parameters" has the settings
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.reports.charts import entropy_scale
from pipeline.reports.pictures import draw_patches, enlarge, entropy_map, scale_for

THUMBNAIL, LARGE = 256, 512  # approximate pixels per side
TEXT = "parameters"  # the text chunk that other image generators use


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A sampled picture and the settings that reproduce it."""

    image: Image.Image
    starts: NDArray[np.bool_]  # (N,)
    entropy: NDArray[np.float16] | None  # (N,) nats; None without an entropy model
    grid: tuple[int, int]
    settings: dict[str, Any]  # JSON values

    @property
    def caption(self) -> str:
        """The class and the number of patches."""
        return f"{self.settings['class']}, {int(self.starts.sum())} patches"

    @property
    def file_name(self) -> str:
        """A file name that is valid on every file system."""
        name = re.sub(r"[^\w-]+", "-", str(self.settings["class"])).strip("-")[:60]
        return f"{name}-seed{self.settings['seed']}-{self.settings['index']}.png"


def drawn(picture: Picture, patches: bool, size: int) -> Image.Image:
    """Return the picture about ``size`` px wide, optionally with its patches drawn."""
    pixels = np.asarray(picture.image)
    scale = scale_for(pixels.shape[1], size)
    return draw_patches(pixels, picture.starts, picture.grid, scale) if patches else enlarge(pixels, scale)


def shared_scale(pictures: Sequence[Picture]) -> tuple[float, float]:
    """Return one colour scale in nats for the entropies of all pictures."""
    values = [picture.entropy for picture in pictures if picture.entropy is not None]
    return entropy_scale(np.stack(values)) if values else (0.0, 1.0)


def entropy_picture(picture: Picture, scale: tuple[float, float]) -> Image.Image | None:
    """Return the entropy map with its colour bar; None without entropies."""
    return None if picture.entropy is None else entropy_map(picture.entropy, picture.grid, scale, LARGE)


def write_png(picture: Picture, folder: Path) -> Path:
    """Write the sampled picture with its settings as JSON in a text chunk; ``folder`` is for this picture only."""
    info = PngInfo()
    info.add_itxt(TEXT, json.dumps(picture.settings, ensure_ascii=False))
    path = folder / picture.file_name
    picture.image.save(path, "PNG", pnginfo=info)
    return path
