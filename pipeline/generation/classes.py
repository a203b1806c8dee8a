"""Classes to sample, as a user names them.

choose_classes(generator.class_names, ("golden retriever", "7"))       # labels
"""

from __future__ import annotations

from pipeline.runtime.errors import StageError
from pipeline.sources.source import known_class


def choose_classes(names: tuple[str, ...], wanted: tuple[str, ...]) -> list[int]:
    """Return labels of classes given by number, name, or either half of ``n02099601 golden retriever``; default: all.

    Raises:
        StageError: there is no such class; the message suggests the nearest name.
    """
    chosen = []
    for item in wanted:
        if item.isdigit() and item not in names and int(item) < len(names):
            chosen.append(int(item))
            continue
        try:
            chosen.append(names.index(known_class(item, names)))
        except StageError as error:
            raise StageError(f"{error} Numbers go from 0 to {len(names) - 1}") from None
    return chosen or list(range(len(names)))
