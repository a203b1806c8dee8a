"""The readable names of ImageNet-1k's classes, which its own files call by their WordNet ids.

    readable(["n01440764", "n02099601"])                     # ["n01440764 tench", "n02099601 golden retriever"]

``imagenet_synsets.tsv`` holds the 1000 ids of ILSVRC2012 with the first word of each WordNet 3.0 synset, in the order
of the ids. The id stays in front: two classes are called "crane".
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence


def readable(names: Sequence[str]) -> list[str]:
    """The names with their words, in the same order, where every one is the id of a class; unchanged otherwise."""
    words = synsets() if names and names[0].startswith("n") else {}
    if not all(name in words for name in names):
        return list(names)
    return [f"{name} {words[name]}" for name in names]


@functools.cache
def synsets() -> dict[str, str]:
    """The words of each of the 1000 classes by its id."""
    lines = importlib.resources.files("pipeline.sources").joinpath("imagenet_synsets.tsv").read_text(encoding="utf-8")
    return dict(line.split("\t") for line in lines.splitlines())
