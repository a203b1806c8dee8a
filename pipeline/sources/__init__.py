"""Where images come from: one way to open a folder or the built-in photographs, and one interface to what is in them.

source = open_source("photos/", split="train", classes=["cat", "dog"], limit=1000)
image, label = source.load(0), source.label(0)
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pipeline.errors import StageError
from pipeline.sources.folder import Folder
from pipeline.sources.photos import Photos
from pipeline.sources.source import LeftOut, Source, UnusableImage

__all__ = ["Folder", "LeftOut", "Photos", "Source", "UnusableImage", "open_source"]

_BUILTIN = {"builtin:photos": Photos}
_ACCEPTED = "a folder of class folders (DATA/CLASS/picture.jpg), or " + " or ".join(_BUILTIN)


def open_source(
    data: str, *, split: str | None = None, classes: Sequence[str] = (), limit: int | None = None
) -> Source:
    """Opens what ``data`` names and lists its images; decodes none.

    Args:
        data: a folder, or ``builtin:photos``.
        split: the subfolder to read, such as ``train``; None for the folder itself. Of the photographs ``train`` (the
            same as None) or ``validation``.
        classes: names of the classes to keep; none for all. Labels are numbered from 0 in sorted order of the names.
        limit: most images in total, spread evenly over the classes.

    Raises:
        StageError: nothing there, of a kind that is not read, no images, or a split or class that is not there.
    """
    if data in _BUILTIN:
        return _BUILTIN[data]("train" if split is None else split, classes=classes, limit=limit)
    if data.startswith("builtin:"):
        raise StageError(f"{data}: no such built-in data; there is: {', '.join(_BUILTIN)}")
    path = os.path.expanduser(data)
    if os.path.isdir(path):
        return Folder(path, split=split, classes=classes, limit=limit)
    found = "is a file, not a folder" if os.path.exists(path) else "no such folder"
    raise StageError(f"{data or '(no path given)'}: {found}; accepted: {_ACCEPTED}")
