"""The interface of sources: numbered images, each with a key and a label.

    source = open_source("photos/", limit=100)
    for i in range(len(source)):
        try:
            image = source.load(i)                           # PIL, RGB, upright
        except UnusableImage as error:
            skipped.append((source.key(i), error.reason))

Work is divided into parts: ``source.part(3, 1000)`` yields images 3000 to 3999 as `Item`s. For a stream (tars read
sequentially over the network) it yields the images of tar 3.

A new kind of source subclasses `IndexedSource`, lists its keys and labels when opened, passes them through `choose`
(so that ``classes`` and ``limit`` mean the same everywhere) and decodes with `pipeline.sources.decode`. A source
keeps no file open, so that it can be sent to worker processes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpar.class_names import find_class, nearest_class
from dpar.errors import ModelError
from pipeline.runtime.errors import StageError
from shards.manifest import LeftOut

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image


class UnusableImage(Exception):
    """One image cannot be used, for ``reason``; the other images are not affected."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Item:
    """One image of a part, not decoded yet.

    Attributes:
        key: its name in the source: valid Unicode.
        label: its class.
        load: decodes it, in any thread: mode RGB. Raises UnusableImage if this image cannot be used, StageError if the
            source is lost and the stage must stop.
    """

    key: str
    label: int
    load: Callable[[], Image.Image]


class Source(ABC):
    """Images in an order that depends only on the data, read in parts.

    Attributes:
        class_names: the name of each label; may be empty before a stream is read.
        left_out: listed entries that were left out.
    """

    class_names: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    @abstractmethod
    def n_items(self) -> int | None:
        """The number of images, usable or not; None if unknown before everything is read."""

    @abstractmethod
    def n_parts(self, part_size: int) -> int:
        """Return the number of parts of ``part_size`` images; for a stream, the number of its files."""

    @abstractmethod
    def part(self, index: int, part_size: int) -> Iterator[Item | LeftOut]:
        """Yield the images of one part in order; depends only on the listing.

        Raises:
            StageError: the source is lost.
        """

    @abstractmethod
    def find(self, keys: Collection[str]) -> dict[str, Callable[[], Image.Image]]:
        """Return functions that load the images of these keys; keys that the source lacks are missing."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Return the manifest's record of this source: JSON values, with ``listing_sha256`` and what reopens it.

        The hash changes if a file is replaced under its name, so that a run does not resume with other images.
        """

    def name_classes(self, n_labels: int) -> tuple[str, ...]:
        """Return the class names, given that ``n_labels`` is one more than the largest label read."""
        return self.class_names


class IndexedSource(Source):
    """Images ``0 .. len(source) - 1`` with random access; kind, location and split are for `describe`."""

    kind: str
    location: str
    split: str | None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images, usable or not."""

    @abstractmethod
    def key(self, i: int) -> str:
        """Return the name of image ``i`` in its source: valid Unicode."""

    @abstractmethod
    def label(self, i: int) -> int:
        """Return the class of image ``i``, an index into ``class_names``."""

    @abstractmethod
    def load(self, i: int) -> Image.Image:
        """Return image ``i``, decoded: mode RGB, upright, the first frame of an animation.

        Raises:
            UnusableImage: it is damaged, too large, not readable, or not an image.
            StageError: it is gone, or the disk or the network fails.
        """

    def describe(self) -> dict[str, object]:
        """See `Source.describe`."""
        return {
            "kind": self.kind,
            "location": self.location,
            "split": self.split,
            "images": len(self),
            "listing_sha256": self._listing_sha256,
        }

    @functools.cached_property
    def _listing_sha256(self) -> str:
        """Computed on demand: versions may need a system call per image."""
        return listing_sha256(self, self._versions())

    def _versions(self) -> Iterable[object]:
        """Return what identifies the contents of the files."""
        return ()

    @property
    def n_items(self) -> int:
        """The number of images, usable or not."""
        return len(self)

    def n_parts(self, part_size: int) -> int:
        """Return the number of parts of ``part_size`` images."""
        return -(-len(self) // part_size)

    def part(self, index: int, part_size: int) -> Iterator[Item | LeftOut]:
        """See `Source.part`."""
        for i in range(index * part_size, min((index + 1) * part_size, len(self))):
            yield Item(self.key(i), self.label(i), functools.partial(self.load, i))

    def find(self, keys: Collection[str]) -> dict[str, Callable[[], Image.Image]]:
        """See `Source.find`."""
        missing = set(keys)
        loaders: dict[str, Callable[[], Image.Image]] = {}
        for i in range(len(self)) if missing else ():
            if (key := self.key(i)) in missing:
                loaders[key] = functools.partial(self.load, i)
                missing.remove(key)
                if not missing:
                    break
        return loaders


def require_indexed(source: Source) -> IndexedSource:
    """Return ``source`` if it has random access.

    Raises:
        StageError: it is a stream.
    """
    if not isinstance(source, IndexedSource):
        raise StageError(
            f"{source.describe()['location']}: is read sequentially over the network, but this command needs random "
            "access; download the tars first and give their paths"
        )
    return source


def source_lost(where: str, error: OSError) -> StageError:
    """Return the error for something that was listed and can no longer be read.

    The stage stops: leaving the image out would make the result depend on when the disk failed.
    """
    return StageError(
        f"{where}: {error.strerror or error}; it existed when the images were listed. Finished shards are kept: put "
        "it back (or mount it again) and run the same command again"
    )


def valid_text(path: str) -> str:
    """Return a path as valid Unicode: bytes that are not UTF-8 are escaped."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def normal(path: str) -> str:
    """Return a path in the form in which names are compared: valid Unicode in normal form C."""
    return unicodedata.normalize("NFC", valid_text(path))


def listing_order(path: str) -> tuple[str, str]:
    """Return the sort key of a path: a slash sorts first, so that folders stay together and labels ascend."""
    return normal(path).replace("/", "\0"), path


@dataclass(frozen=True)
class Choice:
    """The selected part of a listing.

    Attributes:
        class_names: names of the selected classes, in the order of the listing.
        indices: (n,) int64, ascending positions in the listing.
        labels: (n,) int32, indices into ``class_names``.
    """

    class_names: tuple[str, ...]
    indices: NDArray[np.int64]
    labels: NDArray[np.int32]


def choose(
    class_names: Sequence[str],
    labels: NDArray[np.integer[Any]],
    *,
    classes: Sequence[str] = (),
    limit: int | None = None,
    empty: Collection[str] = (),
) -> Choice:
    """Select some classes and at most ``limit`` images, spread evenly over them.

    Args:
        class_names: all class names of the listing.
        labels: (n,) integers, indices into ``class_names``.
        classes: names to keep; empty for all. The id or the words of a class called ``n02099601 golden retriever``
            also name it, if they are unambiguous. Kept classes count from 0 in the order of ``class_names``.
        limit: maximum number of images: the first of each class, then the second of each, and so on.
        empty: names of classes known to be empty, for a better message.

    Raises:
        StageError: an unknown class, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise StageError(f"the limit on images is {limit}; it must be at least 1 (omit it for all images)")
    names = list(class_names)
    if classes:
        selected = {known_class(name, class_names, empty) for name in classes}
        names = [name for name in class_names if name in selected]
    new_label = np.full(len(class_names), -1, dtype=np.int32)
    position = {name: label for label, name in enumerate(class_names)}
    new_label[[position[name] for name in names]] = np.arange(len(names), dtype=np.int32)
    relabelled = new_label[labels]
    indices = np.flatnonzero(relabelled >= 0)
    if limit is not None and len(indices) > limit:
        indices = indices[_round_robin(relabelled[indices], limit)]
    return Choice(tuple(names), indices, relabelled[indices])


def listing_sha256(source: IndexedSource, versions: Iterable[object] = ()) -> str:
    """Return the SHA-256 of a listing: every image's label and key in order, and the versions of the files.

    Args:
        source: the listing.
        versions: what identifies the contents of the files: sizes, times of change, offsets.
    """
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(f"{source.label(i)}\0{source.key(i)}\0".encode())
    for version in versions:
        digest.update(f"{version}\0".encode())
    return digest.hexdigest()


def file_version(path: str) -> tuple[int, int]:
    """Return a file's size in bytes and the time of its last change in nanoseconds.

    Raises:
        StageError: the file is gone or its disk fails.
    """
    try:
        status = os.stat(path)
    except PermissionError:  # the file is left out anyway
        return -1, -1
    except OSError as error:
        raise source_lost(path, error) from error
    return status.st_size, status.st_mtime_ns


def known_class(name: str, known: Sequence[str], empty: Collection[str] = ()) -> str:
    """Return the class called ``name``: an exact match, or the id or words of ``n02099601 golden retriever``.

    Raises:
        StageError: none matches, several match, or the class is in ``empty``.
    """
    try:
        label = find_class(name, known)
    except ModelError as error:
        raise StageError(str(error)) from error
    if label is not None:
        return known[label]
    if unicodedata.normalize("NFC", name) in empty:
        raise StageError(f"class {name!r} has no images")
    raise StageError(f"no class {name!r} in this data; {nearest_class(name, known)}")


def _round_robin(labels: NDArray[np.int32], limit: int) -> NDArray[np.int64]:
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - first
    return np.sort(np.lexsort((labels, rank))[:limit])
