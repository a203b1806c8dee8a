"""Sources of images: one function opens all kinds, which share one interface.

source = open_source("photos/", split="train", classes=["cat", "dog"], limit=1000)
image, label = source.load(0), source.label(0)
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.runtime.errors import StageError
from pipeline.sources.folder import Folder
from pipeline.sources.locations import expand, local_files
from pipeline.sources.photos import Photos
from pipeline.sources.source import IndexedSource, Item, Source, UnusableImage, require_indexed
from shards.files import require_regular
from shards.manifest import LeftOut
from shards.storage import is_url

__all__ = [
    "HUB",
    "Folder",
    "IndexedSource",
    "Item",
    "LeftOut",
    "Photos",
    "Source",
    "UnusableImage",
    "open_indexed",
    "open_source",
    "require_indexed",
]

_TABLES = (".parquet", ".arrow")
HUB = "hf://datasets/"
_HUB_NAME = r"[\w][\w.-]*(/[\w][\w.-]*)?"
_ACCEPTED = """accepted:
  a folder of class folders             DATA/CLASS/picture.jpg
  a tar of them, or ImageNet's own      photos.tar, ILSVRC2012_img_train.tar
  WebDataset tars: a glob, braces, a    'tars/*.tar', 'train-{000..146}.tar', tars/,
    folder of them, URLs                  'https://example.org/train-{000..146}.tar', s3://…
  Parquet or Arrow files                'data/*.parquet', data/
  a dataset saved with save_to_disk     saved/
  a dataset of the Hugging Face Hub     owner/name, hf://datasets/name
  built-in photographs and emoji        builtin:photos, builtin:emoji"""
_BUILTIN = ("builtin:photos", "builtin:emoji")


def open_source(
    data: str,
    *,
    split: str | None = None,
    classes: Sequence[str] = (),
    limit: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    local_only: bool = False,
) -> Source:
    """Open the source that ``data`` names and list its images, without decoding any.

    Args:
        data: a path, a glob, braces, a URL, a name on the Hub, ``builtin:photos`` or ``builtin:emoji``.
        split: the subfolder, the folder in a tar or the split of a dataset, such as ``train``; None for everything,
            or for ``train`` of a dataset. For built-in data ``train`` (the same as None) or ``validation``.
        classes: names of the classes to keep; empty for all. Labels count from 0 in the order of all class names.
        limit: maximum number of images, spread evenly over the classes, or over tars at URLs.
        image_column: the image column of a table; None to detect it.
        label_column: the label column of a table; None to detect it.
        local_only: refuse sources on a network.

    Raises:
        StageError: the source does not exist, is of an unsupported kind, has no images, or lacks the split or class.
    """
    located = _locate(data, split)
    if local_only and located.kind in ("stream", "hub") and not located.location.startswith("file://"):
        raise StageError(f"{located.location}: is not on this machine, and is fetched only with --fetch-originals")
    for file in located.files if located.kind in ("tars", "table") else ():
        try:
            require_regular(file)
        except OSError as error:
            raise StageError(f"{file}: {error.strerror or error}") from error
    for option, column in (("--image-column", image_column), ("--label-column", label_column)):
        if column is not None and located.kind not in ("table", "saved", "hub"):
            raise StageError(f"{data}: has no columns; {option} is for Parquet, Arrow and datasets")
    if located.kind == "photos":
        return Photos("train" if split is None else split, classes=classes, limit=limit)
    if located.kind == "emoji":
        from pipeline.sources.emoji import open_emoji

        return open_emoji("train" if split is None else split, classes=classes, limit=limit)
    if located.kind == "folder":
        return Folder(located.location, split=located.split, classes=classes, limit=limit)
    if located.kind == "tars":
        from pipeline.sources.tar_images import TarImages

        return TarImages(located.files, location=located.location, split=located.split, classes=classes, limit=limit)
    if located.kind == "stream":
        from pipeline.sources.tar_stream import TarStream

        return TarStream(located.files, location=located.location, classes=classes, limit=limit)
    from pipeline.sources import tables

    files: Sequence[str] = located.files
    if located.kind == "table":
        table = tables.read_files(files, located.location)
        folders = sorted({os.path.dirname(file) for file in files})
    elif located.kind == "saved":
        table = tables.read_saved(located.location)
        files, folders = tables.saved_files(located.location), [located.location]
    else:
        name = located.location.removeprefix(HUB)
        table, folders = tables.read_hub(name), tables.hub_folders(name)
    return tables.Table(
        table,
        location=located.location,
        split=located.split,
        classes=classes,
        limit=limit,
        image_column=image_column,
        label_column=label_column,
        files=files,
        folders=folders,
    )


def open_indexed(data: str, **options: Any) -> IndexedSource:
    """Call :func:`open_source` and return a source with random access; raise StageError for a stream."""
    return require_indexed(open_source(data, **options))


@dataclass(frozen=True)
class _Located:
    """A source. ``location`` names it from any working directory; ``split`` is the split within it."""

    kind: Literal["photos", "emoji", "folder", "tars", "stream", "table", "saved", "hub"]
    location: str
    split: str | None
    files: tuple[str, ...] = ()


def _locate(data: str, split: str | None) -> _Located:
    """Detect the kind of ``data`` without reading an image.

    Raises:
        StageError: the kind is unsupported.
    """
    if data.startswith("builtin:"):
        if data not in _BUILTIN:
            raise StageError(f"{data}: no such built-in data; choose from {', '.join(_BUILTIN)}")
        return _Located("photos" if data == "builtin:photos" else "emoji", data, split)
    if re.fullmatch(re.escape(HUB) + _HUB_NAME, data):
        return _Located("hub", data, split)
    if data.startswith("pipe:") or is_url(data):
        return _locate_url(data, split)
    path = os.path.expanduser(data)
    if os.path.isdir(path):
        return _locate_in_folder(path, split)
    if os.path.exists(path) or any(mark in path for mark in "*?[{"):
        files = tuple(local_files(path))
        ending = os.path.splitext(files[0])[1].lower()
        if ending in (".tar", *_TABLES):
            return _Located("tars" if ending == ".tar" else "table", os.path.abspath(path), split, files)
        raise StageError(
            f"{data}: is a file, not a folder, and its ending is not .tar, .parquet or .arrow; {_ACCEPTED}"
        )
    # A single name, or one below an existing folder, is a mistyped path rather than a dataset of the Hub.
    if re.fullmatch(_HUB_NAME, data) and "/" in data and not os.path.isdir(os.path.dirname(path)):
        return _Located("hub", HUB + data, split)
    raise StageError(f"{data or '(no path given)'}: no such folder or file; {_ACCEPTED}")


def _locate_url(data: str, split: str | None) -> _Located:
    urls = tuple(expand(data))
    if any(url.startswith("pipe:") or "::pipe:" in url for url in urls):
        raise StageError(f"{data}: pipe: would run a command; download the tars, or give URLs that fsspec reads")
    if not all(url.endswith(".tar") for url in urls):
        raise StageError(f"{data}: over the network only tars are read, and this does not end in .tar; {_ACCEPTED}")
    if split is not None:
        raise StageError(f"{data}: tars have no splits; give only the tars of {split!r}")
    return _Located("stream", data, None, urls)


def _locate_in_folder(path: str, split: str | None) -> _Located:
    if os.path.isfile(os.path.join(path, "dataset_dict.json")) or os.path.isfile(os.path.join(path, "state.json")):
        return _Located("saved", os.path.abspath(path), split)
    # Compared with existing names, never joined: a split is a subfolder, not a path.
    inside = os.path.join(path, split) if split is not None and split in _names(path) else path
    rest = None if inside != path else split
    names = _names(inside)
    if "manifest.json" in names and any(re.match(r"\d{5,}\.(arrow|tar)", name) for name in names):
        raise StageError(f"{path}: holds codes written by dpar, not images; give the images they were made from")
    # With subfolders, or without tars and tables, these are class folders.
    if names and not any(os.path.isdir(os.path.join(inside, name)) for name in names):
        for endings in ((".tar",), _TABLES):
            files = tuple(os.path.abspath(os.path.join(inside, name)) for name in names if name.endswith(endings))
            if files:
                return _Located("tars" if endings == (".tar",) else "table", os.path.abspath(inside), rest, files)
    return _Located("folder", path, split)


def _names(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []  # the folder source reports it
