"""Readable names of ImageNet-1k's classes, whose files are named by WordNet ids.

    readable(["n01440764", "n02099601"])                     # ["n01440764 tench", "n02099601 golden retriever"]

``imagenet_synsets.tsv`` lists the 1000 ids of ILSVRC2012 with the first word of each WordNet 3.0 synset, sorted by id.
Names keep the id as a prefix: two classes are called "crane".
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence


def readable(names: Sequence[str]) -> list[str]:
    """Return the names with their words if all of them are class ids; otherwise unchanged."""
    words = synsets() if names and names[0].startswith("n") else {}
    if not all(name in words for name in names):
        return list(names)
    return [f"{name} {words[name]}" for name in names]


@functools.cache
def synsets() -> dict[str, str]:
    """Return the words of each of the 1000 classes by its id."""
    lines = importlib.resources.files("pipeline.sources").joinpath("imagenet_synsets.tsv").read_text(encoding="utf-8")
    return dict(line.split("\t") for line in lines.splitlines())
