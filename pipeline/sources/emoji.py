"""``builtin:emoji``: Microsoft's 3D Fluent emoji, 3,391 images of 128 px in 51 classes, shipped in the wheel.

    source = open_emoji(split="validation", classes=["animal mammal", "flag"], limit=100)

The images are in one tar, ``TAR``, with members ``SPLIT/CLASS/CODE-POINTS.webp``, read like any tar of class folders.
Plain ``webdataset.WebDataset`` also opens it. ``pipeline.sources.build_emoji`` builds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.sources.tar_images import TarImages

TAR = Path(__file__).with_name("fluent_emoji") / "emoji.tar"
"""The tar; its licence and attribution are in the same folder."""


def open_emoji(split: str = "train", *, classes: Sequence[str] = (), limit: int | None = None) -> TarImages:
    """Return the emoji of one split.

    Raises:
        StageError: a split other than ``train`` and ``validation``, an unknown class or a limit below 1.
    """
    return TarImages([str(TAR)], location="builtin:emoji", split=split, classes=classes, limit=limit)
