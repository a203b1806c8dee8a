"""Where images come from: one way to open whatever holds them, and one interface to what is in it.

source = open_source("photos/", split="train", classes=["cat", "dog"], limit=1000)
image, label = source.load(0), source.label(0)
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.runtime.errors import StageError
from pipeline.sources.folder import Folder
from pipeline.sources.locations import expand, is_url, local_files
from pipeline.sources.photos import Photos
from pipeline.sources.source import IndexedSource, Item, Source, UnusableImage, require_indexed
from shards.files import require_regular
from shards.manifest import LeftOut

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
  photographs, emoji that ship here     builtin:photos, builtin:emoji"""
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
    """Opens what ``data`` names and lists its images; decodes none.

    Args:
        data: a path, a glob, braces, a URL, a name on the Hub, ``builtin:photos`` or ``builtin:emoji``; what is there
            decides its kind.
        split: the subfolder, the folder in a tar or the split of a dataset to read, such as ``train``; None for all
            there is, or for ``train`` of a dataset. Of built-in data ``train`` (the same as None) or ``validation``.
        classes: names of the classes to keep; none for all. Labels are numbered from 0 in the order of all class names.
        limit: most images in total, spread evenly over the classes, or over the tars where they are at URLs.
        image_column: of a table, the column of the images; None to look for it.
        label_column: of a table, the column of the labels; None to look for it.
        local_only: refuse what would have to be fetched over a network.

    Raises:
        StageError: nothing there, of a kind that is not read, no images, or a split or class that is not there.
    """
    found = _look(data, split)
    if local_only and found.kind in ("stream", "hub") and not found.location.startswith("file://"):
        raise StageError(f"{found.location}: is not on this machine, and is fetched only with --fetch-originals")
    for file in found.files if found.kind in ("tars", "table") else ():
        try:
            require_regular(file)
        except OSError as error:
            raise StageError(f"{file}: {error.strerror or error}") from error
    for option, column in (("--image-column", image_column), ("--label-column", label_column)):
        if column is not None and found.kind not in ("table", "saved", "hub"):
            raise StageError(f"{data}: has no columns; {option} is for Parquet, Arrow and datasets")
    if found.kind == "photos":
        return Photos("train" if split is None else split, classes=classes, limit=limit)
    if found.kind == "emoji":
        from pipeline.sources.emoji import open_emoji

        return open_emoji("train" if split is None else split, classes=classes, limit=limit)
    if found.kind == "folder":
        return Folder(found.location, split=found.split, classes=classes, limit=limit)
    if found.kind == "tars":
        from pipeline.sources.tar_images import TarImages

        return TarImages(found.files, location=found.location, split=found.split, classes=classes, limit=limit)
    if found.kind == "stream":
        from pipeline.sources.tar_stream import TarStream

        return TarStream(found.files, location=found.location, classes=classes, limit=limit)
    from pipeline.sources import tables

    files: Sequence[str] = found.files
    if found.kind == "table":
        table = tables.read_files(files, found.location)
        folders = sorted({os.path.dirname(file) for file in files})
    elif found.kind == "saved":
        table = tables.read_saved(found.location)
        files, folders = tables.saved_files(found.location), [found.location]
    else:
        name = found.location.removeprefix(HUB)
        table, folders = tables.read_hub(name), tables.hub_folders(name)
    return tables.Table(
        table,
        location=found.location,
        split=found.split,
        classes=classes,
        limit=limit,
        image_column=image_column,
        label_column=label_column,
        files=files,
        folders=folders,
    )


def open_indexed(
    data: str,
    *,
    split: str | None = None,
    classes: Sequence[str] = (),
    limit: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> IndexedSource:
    """:func:`open_source` for images that are read in any order; raises StageError for a stream."""
    return require_indexed(
        open_source(
            data,
            split=split,
            classes=classes,
            limit=limit,
            image_column=image_column,
            label_column=label_column,
        )
    )


@dataclass(frozen=True)
class _Found:
    """What ``data`` is. ``location`` names it from any working directory; ``split`` is what of it is still to apply."""

    kind: Literal["photos", "emoji", "folder", "tars", "stream", "table", "saved", "hub"]
    location: str
    split: str | None
    files: tuple[str, ...] = ()


def _look(data: str, split: str | None) -> _Found:
    """Decides by what is there, reading no image.

    Raises:
        StageError: nothing of a kind that is read.
    """
    if data.startswith("builtin:"):
        if data not in _BUILTIN:
            raise StageError(f"{data}: no such built-in data; there is: {', '.join(_BUILTIN)}")
        return _Found("photos" if data == "builtin:photos" else "emoji", data, split)
    if re.fullmatch(re.escape(HUB) + _HUB_NAME, data):
        return _Found("hub", data, split)
    if data.startswith("pipe:") or is_url(data):
        return _look_at_url(data, split)
    path = os.path.expanduser(data)
    if os.path.isdir(path):
        return _look_in_folder(path, split)
    if os.path.exists(path) or any(mark in path for mark in "*?[{"):
        files = tuple(local_files(path))
        ending = os.path.splitext(files[0])[1].lower()
        if ending in (".tar", *_TABLES):
            return _Found("tars" if ending == ".tar" else "table", os.path.abspath(path), split, files)
        raise StageError(
            f"{data}: is a file, not a folder, and its ending is not .tar, .parquet or .arrow; {_ACCEPTED}"
        )
    # A name alone, or below a folder that is here, is a slip in a path rather than a dataset to ask the Hub for.
    if re.fullmatch(_HUB_NAME, data) and "/" in data and not os.path.isdir(os.path.dirname(path)):
        return _Found("hub", HUB + data, split)
    raise StageError(f"{data or '(no path given)'}: no such folder or file; {_ACCEPTED}")


def _look_at_url(data: str, split: str | None) -> _Found:
    urls = tuple(expand(data))
    if any(url.startswith("pipe:") or "::pipe:" in url for url in urls):
        raise StageError(f"{data}: pipe: would run a command; download the tars, or give URLs that fsspec reads")
    if not all(url.endswith(".tar") for url in urls):
        raise StageError(f"{data}: over the network only tars are read, and this does not end in .tar; {_ACCEPTED}")
    if split is not None:
        raise StageError(f"{data}: tars have no splits; name the tars of {split!r} alone")
    return _Found("stream", data, None, urls)


def _look_in_folder(path: str, split: str | None) -> _Found:
    if os.path.isfile(os.path.join(path, "dataset_dict.json")) or os.path.isfile(os.path.join(path, "state.json")):
        return _Found("saved", os.path.abspath(path), split)
    # Compared with the names there, never joined blindly: a split is a subfolder, not a path.
    inside = os.path.join(path, split) if split is not None and split in _names(path) else path
    left = None if inside != path else split
    names = _names(inside)
    if "manifest.json" in names and any(re.match(r"\d{5,}\.(arrow|tar)", name) for name in names):
        raise StageError(f"{path}: holds codes that dpar made, not images; give the images it was made from")
    # Folders inside, or no files that hold many images: class folders.
    if names and not any(os.path.isdir(os.path.join(inside, name)) for name in names):
        for endings in ((".tar",), _TABLES):
            files = tuple(os.path.abspath(os.path.join(inside, name)) for name in names if name.endswith(endings))
            if files:
                return _Found("tars" if endings == (".tar",) else "table", os.path.abspath(inside), left, files)
    return _Found("folder", path, split)


def _names(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []  # the message is the folder source's
