"""A folder of class folders: ``root/CLASS/**/picture.jpg``.

    source = Folder("photos/")                               # keys such as "cat/indoors/1.jpg"
    source.left_out                                          # entries left out, and why

Names are compared and sorted in Unicode's normal form C, so that the listing is the same on all systems, whichever form
the file system stores.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dpar.class_names import nearest
from pipeline.runtime.errors import StageError
from pipeline.sources.decode import EXTENSIONS, read_image
from pipeline.sources.imagenet import readable
from pipeline.sources.source import (
    IndexedSource,
    choose,
    file_version,
    listing_order,
    normal,
    valid_text,
)
from shards.manifest import LeftOut

if TYPE_CHECKING:
    from numpy.typing import NDArray

SPLITS = ("train", "val", "validation", "test")
"""Subfolders that are splits, not classes, if they contain class folders."""


class Folder(IndexedSource):
    """The images below a folder: each direct subfolder is a class, with everything nested in it.

    A root without images in subfolders is one class, named after it; ImageNet's class ids get readable names. Hidden
    files and folders are ignored. Links are followed at the root and the class folders only, each target once.

    Attributes:
        ignored: number of files whose names are not those of images.
    """

    def __init__(
        self, root: str, *, split: str | None = None, classes: Sequence[str] = (), limit: int | None = None
    ) -> None:
        self.split = split
        self.root = os.path.abspath(root if split is None else _split_folder(root, split))
        self.kind, self.location = "folder", valid_text(self.root)
        listing = _Listing(self.root)
        if split is None:
            listing.check_no_splits()
        names, labels = listing.by_class()
        choice = choose(readable(names), labels, classes=classes, limit=limit, empty=listing.empty)
        self.class_names = choice.class_names
        self.left_out = tuple(sorted(listing.left_out, key=lambda x: (x.key, x.reason)))
        self.ignored = listing.ignored
        self._labels = choice.labels
        self._files = [listing.files[i] for i in choice.indices.tolist()]

    def __len__(self) -> int:
        return len(self._files)

    def key(self, i: int) -> str:
        """Return the path of image ``i`` below the root, with slashes."""
        return valid_text(self._files[i])

    def label(self, i: int) -> int:
        """Return the class of image ``i``."""
        return int(self._labels[i])

    def load(self, i: int) -> Image.Image:
        """Return image ``i``, mode RGB; see `IndexedSource.load`."""
        return read_image(os.path.join(self.root, self._files[i]))

    def _versions(self) -> Iterator[tuple[int, int]]:
        return (file_version(os.path.join(self.root, file)) for file in self._files)


class _Listing:
    """Everything below a root. Paths are relative to it, undecoded, with slashes."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.files: list[str] = []
        self.left_out: list[LeftOut] = []
        self.empty: list[str] = []
        self.ignored = 0
        self._unlisted: list[str] = []
        self._linked: list[str] = []
        self._folders = self._scan("")
        self._folders += self._links_to_follow()
        stack = list(self._folders)
        while stack:
            stack += self._scan(stack.pop())
        self.files.sort(key=listing_order)

    def check_no_splits(self) -> None:
        """Raise StageError if the subfolders are splits: their class folders would merge into one class each."""
        check_no_splits(self.files, valid_text(self.root), f"{valid_text(self.root)}/")

    def by_class(self) -> tuple[list[str], NDArray[np.int32]]:
        """Return the sorted class names and the label of each file; drop images outside the class folders."""
        inside = [path for path in self.files if "/" in path]
        names = sorted({class_name(path) for path in inside})
        self.empty = sorted({normal(folder) for folder in self._folders} - set(names))
        unlisted = {normal(path) for path in self._unlisted}
        self.empty = [name for name in self.empty if name not in unlisted]
        self.left_out += [LeftOut(name, "empty class folder: no images in it") for name in self.empty]
        if not self.files:
            raise StageError(self._nothing())
        if not inside:
            return [normal(os.path.basename(self.root)) or "images"], np.zeros(len(self.files), dtype=np.int32)
        stray = "image outside the class folders: it has no class"
        self.left_out += [LeftOut(valid_text(path), stray) for path in self.files if "/" not in path]
        self.files = inside
        label = {name: i for i, name in enumerate(names)}
        return names, np.array([label[class_name(path)] for path in inside], dtype=np.int32)

    def _nothing(self) -> str:
        endings = " ".join(sorted(extension[1:] for extension in EXTENSIONS))
        message = f"{valid_text(self.root)}: no images in it; looked for CLASS/picture with the endings {endings}"
        if self.ignored:
            message += f"; {self.ignored} other files ignored"
        reasons = [x for x in self.left_out if x.key not in self.empty]
        if reasons:
            message += f"; left out {len(reasons)}, the first {reasons[0].key}: {reasons[0].reason}"
        return message

    def _scan(self, folder: str) -> list[str]:
        """Add the files of one folder; return its subfolders."""
        subfolders = []
        try:
            with os.scandir(os.path.join(self.root, folder)) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        subfolders.append(path)
                    else:
                        self._add(path, entry)
        except OSError as error:
            reason = f"cannot be listed: {error.strerror or error}"
            # Other errors may be temporary, and the listing must not depend on the time.
            if not folder or not isinstance(error, PermissionError):
                raise StageError(f"{valid_text(os.path.join(self.root, folder))}: {reason}") from error
            self._unlisted.append(folder)
            self.left_out.append(LeftOut(valid_text(folder), reason))
        return subfolders

    def _links_to_follow(self) -> list[str]:
        """Return the links among the class folders whose targets are not listed yet."""
        root = os.path.realpath(self.root)
        seen = {os.path.join(root, folder) for folder in self._folders}
        follow = []
        for path in sorted(self._linked, key=listing_order):
            target = os.path.realpath(os.path.join(self.root, path))
            around = [*map(str, Path(target).parents), target]
            if seen.intersection(around) or os.path.commonpath([root, target]) == target:
                self.left_out.append(LeftOut(valid_text(path), "link to a folder already listed: not followed"))
            else:
                seen.add(target)
                follow.append(path)
        return follow

    def _add(self, path: str, entry: os.DirEntry[str]) -> None:
        reason = None
        try:
            if entry.is_dir():
                if "/" not in path:
                    self._linked.append(path)
                    return
                reason = "link to a folder: not followed"
            elif os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
                self.ignored += 1
            elif entry.is_file():
                self.files.append(path)
            else:
                reason = (
                    "broken link" if entry.is_symlink() and not os.path.exists(entry.path) else "not a regular file"
                )
        except OSError as error:  # a link to itself, or into a folder without permission
            reason = f"cannot be followed: {error.strerror or error}"
        if reason is not None:
            self.left_out.append(LeftOut(valid_text(path), reason))


def _split_folder(root: str, split: str) -> str:
    # Compared with existing names, never joined: a split is a subfolder, not a path.
    try:
        names = sorted(x.name for x in os.scandir(root) if x.is_dir() and not x.name.startswith("."))
    except OSError as error:
        raise StageError(f"{valid_text(root)}: cannot be listed: {error.strerror or error}") from error
    for name in names:
        if normal(name) == unicodedata.normalize("NFC", split):
            return os.path.join(root, name)
    subfolders = [normal(name) for name in names]
    raise StageError(f"{valid_text(root)}: no subfolder for the split {split!r}; {nearest(split, subfolders)}")


def class_name(path: str) -> str:
    """Return the class of an image by its path below the root: the first folder."""
    return normal(path.partition("/")[0])


def check_no_splits(paths: Iterable[str], where: str, inside: str) -> None:
    """Raise StageError if the first folders of the paths are splits with class folders in them."""
    parents = {path.partition("/")[0] for path in paths if path.count("/") >= 2}
    splits = [name for name in SPLITS if name in parents]
    if splits:
        raise StageError(
            f"{where}: holds splits, not classes ({', '.join(splits)}); choose one with --split {splits[0]}"
            + (f", or give the folder itself: {inside}{splits[0]}" if inside else "")
        )
