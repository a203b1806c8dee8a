"""What a source of images is, whatever it is read from: numbered images with a key and a label each.

    source = open_source("photos/", limit=100)
    for i in range(len(source)):
        try:
            image = source.load(i)                           # PIL, RGB, upright
        except UnusableImage as error:
            skipped.append((source.key(i), error.reason))

A new kind of source subclasses `Source`, lists its keys and labels when it is opened, passes them through `choose`
(so that ``classes`` and ``limit`` mean the same everywhere) and decodes with `pipeline.sources.decode`. A source
holds no open file, so that it can be sent to worker processes.
"""

from __future__ import annotations

import difflib
import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import StageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image


class UnusableImage(Exception):
    """One image cannot be used; ``reason`` says why in a few plain words. The others are not affected."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class LeftOut:
    """Something the listing itself rejects: where it is, and why it is not among the images."""

    key: str
    reason: str


class Source(ABC):
    """Images ``0 .. len(source) - 1`` in an order that depends on the data alone.

    Attributes:
        class_names: the name of each label, sorted.
        left_out: what was found but is not among the images.
    """

    class_names: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """The number of images, usable or not."""

    @abstractmethod
    def key(self, i: int) -> str:
        """The name of image ``i`` in its source: valid Unicode."""

    @abstractmethod
    def label(self, i: int) -> int:
        """The class of image ``i``, an index into ``class_names``."""

    @abstractmethod
    def load(self, i: int) -> Image.Image:
        """Image ``i``, decoded: mode RGB, upright, the first frame of an animation.

        Raises:
            UnusableImage: it is damaged, too large, gone, or not an image.
        """

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """What a manifest says of this source: JSON values, among them ``listing_sha256``."""


@dataclass(frozen=True)
class Choice:
    """The part of a listing that was asked for.

    Attributes:
        class_names: of the chosen classes, sorted.
        indices: (n,) int64, ascending positions in the whole listing.
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
    """Keeps the classes asked for and at most ``limit`` images, spread evenly over them.

    Args:
        class_names: of the whole listing, sorted.
        labels: (n,) integers, indices into ``class_names``.
        classes: names to keep; none for all. Kept classes are renumbered from 0 in sorted order.
        limit: most images in total: the first of each class, then the second of each, and so on.
        empty: names of classes known to be empty, for a better message.

    Raises:
        StageError: a class that is not there, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise StageError(f"the limit on images is {limit}; it must be at least 1 (leave it out for all images)")
    names = sorted({_known_class(name, class_names, empty) for name in classes or class_names})
    new_label = np.full(len(class_names), -1, dtype=np.int32)
    position = {name: label for label, name in enumerate(class_names)}
    new_label[[position[name] for name in names]] = np.arange(len(names), dtype=np.int32)
    relabelled = new_label[labels]
    indices = np.flatnonzero(relabelled >= 0)
    if limit is not None and len(indices) > limit:
        indices = indices[_round_robin(relabelled[indices], limit)]
    return Choice(tuple(names), indices, relabelled[indices])


def listing_sha256(source: Source) -> str:
    """SHA-256, in hexadecimal, of every image's label and key in order: two listings that agree on it are the same."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(f"{source.label(i)}\0{source.key(i)}\0".encode())
    return digest.hexdigest()


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error message about an unknown name: the closest known ones, or the first few of them."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(known[:20]) + (f", … ({len(known)} in all)" if len(known) > 20 else "")
    return f"there is: {shown}" if known else "there is none"


def _known_class(name: str, known: Sequence[str], empty: Collection[str]) -> str:
    normal = unicodedata.normalize("NFC", name)
    if normal in known:
        return normal
    if normal in empty:
        raise StageError(f"class {name!r} has no images")
    raise StageError(f"no class {name!r} in this data; {nearest(normal, known)}")


def _round_robin(labels: NDArray[np.int32], limit: int) -> NDArray[np.int64]:
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - first
    return np.sort(np.lexsort((labels, rank))[:limit])
