"""Split a source into a training part and a held-out part.

    training, held_out = split_holdout(source, fraction=0.05, seed=0, group_regex=r"[^/]+/(\\w+)-\\d+")

An image's part depends only on its key and the seed, not on the rest of the listing: images added later do not move
others.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import numpy as np

from pipeline.runtime.errors import StageError
from pipeline.sources.source import IndexedSource, Source, listing_sha256
from shards.manifest import LeftOut

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image


class Part(IndexedSource):
    """Some images of another source, in its order and with all of its classes."""

    def __init__(
        self,
        source: IndexedSource,
        indices: NDArray[np.int64],
        left_out: tuple[LeftOut, ...],
        holdout: dict[str, object],
    ) -> None:
        """Images ``indices`` (n,) of ``source``; ``holdout`` records how they were selected."""
        self.source, self.indices, self.holdout = source, indices, holdout
        self.class_names, self.left_out = source.class_names, left_out

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, i: int) -> str:
        """See `IndexedSource.key`."""
        return self.source.key(int(self.indices[i]))

    def label(self, i: int) -> int:
        """See `IndexedSource.label`."""
        return self.source.label(int(self.indices[i]))

    def load(self, i: int) -> Image.Image:
        """See `IndexedSource.load`."""
        return self.source.load(int(self.indices[i]))

    def name_classes(self, n_labels: int) -> tuple[str, ...]:
        """See `Source.name_classes`."""
        return self.source.name_classes(n_labels)

    def describe(self) -> dict[str, object]:
        """See `Source.describe`; with the record of this part."""
        own = {"images": len(self), "listing_sha256": listing_sha256(self), "holdout": self.holdout}
        return {**self.source.describe(), **own}


def split_holdout(source: Source, fraction: float, seed: int = 0, group_regex: str | None = None) -> tuple[Part, Part]:
    """Return the part to train on and the held-out part.

    Args:
        source: must have random access.
        fraction: share of the groups to hold out, above 0 and below 1; a larger share includes a smaller one.
        seed: of the selection.
        group_regex: searched for in each key; its first group, or the complete match, names the image's group. Groups
            are not divided. None makes each image its own group.

    Raises:
        StageError: the source is a stream, the regex does not match a key, or one of the parts is empty.
    """
    if not isinstance(source, IndexedSource):
        raise StageError(
            "--holdout needs a listing of all images, and tars over the network are read sequentially; hold "
            "out some of the tars instead, and tokenize them with a separate command"
        )
    keys = [source.key(i) for i in range(len(source))]
    groups = keys if group_regex is None else _groups(keys, group_regex)
    limit = int(fraction * 2**64)
    held_out = np.array([_hash(seed, group) < limit for group in groups], bool)
    record: dict[str, object] = {"fraction": fraction, "seed": seed, "group_regex": group_regex}
    parts = (
        Part(source, np.flatnonzero(~held_out), source.left_out, record | {"part": "training"}),
        Part(source, np.flatnonzero(held_out), (), record | {"part": "held out"}),
    )
    for part in parts:
        if len(part) == 0:
            what = f"{len(set(groups))} groups" if group_regex is not None else f"{len(keys)} images"
            raise StageError(
                f"--holdout {fraction:g} of {what} leaves none {'to train on' if part is parts[0] else 'held out'}; "
                "choose another fraction or another --seed"
            )
    return parts


def _groups(keys: list[str], group_regex: str) -> list[str]:
    """Return the group of each key."""
    pattern = re.compile(group_regex)
    group = 1 if pattern.groups else 0
    matches = [match[group] if (match := pattern.search(key)) else None for key in keys]
    groups = [match for match in matches if match is not None]
    if len(groups) < len(keys):
        first = keys[matches.index(None)]
        raise StageError(
            f"--group-regex {group_regex!r} does not match {len(keys) - len(groups)} of {len(keys)} keys, such as "
            f"{first!r}; every image needs a group"
        )
    return groups


def _hash(seed: int, group: str) -> int:
    """Return a hash of 64 bits, the same on every machine."""
    digest = hashlib.sha256(f"{seed}\0{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
