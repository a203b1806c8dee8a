"""Labels as sources have them, numbers or text, turned into class names and indices into them.

    names, labels = number_labels(["dog", None, "cat"])      # ("cat", "dog"), [1, -1, 0]
    names, labels = number_labels([2, 0])                    # ("0", "1", "2"), [2, 0]

Labels are the same on every machine: numbers stay as they are, text is numbered in sorted order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.runtime.errors import StageError
from pipeline.sources.imagenet import readable
from pipeline.sources.source import normal

if TYPE_CHECKING:
    from numpy.typing import NDArray

Label = int | str
MOST_CLASSES = 1_000_000
"""Most classes that numbers may stand for; above, they are taken for something else than classes."""

NO_LABEL = "no label"
"""The reason for leaving an image out that has none where others have."""


def parse_label(text: str) -> Label | None:
    """A label written as text: a number where it is one; None where it is empty."""
    text = text.strip()
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text or None


def decimal_names(n: int) -> tuple[str, ...]:
    """The names of classes that have none: their numbers."""
    return tuple(map(str, range(n)))


def number_labels(raw: Sequence[Label | None], where: str) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Class names, and an index into them for each label.

    Args:
        raw: one label an image; None or a negative number where it has none.
        where: what they are labels of, for messages.

    Returns:
        The names (ImageNet's ids with their words), and (n,) int32 with -1 for no label.

    Raises:
        StageError: numbers and text mixed, or a number that can be no class.
    """
    numbers = [label for label in raw if isinstance(label, int)]
    texts = {label for label in raw if isinstance(label, str)}
    if numbers and texts:
        raise StageError(
            f"{where}: some labels are numbers ({numbers[0]}) and some are text ({min(texts)!r}); give one kind"
        )
    if texts:
        names = sorted({normal(text) for text in texts})
        position = {name: i for i, name in enumerate(names)}
        index = {text: position[normal(text)] for text in texts}
        return tuple(readable(names)), np.array([-1 if x is None else index[str(x)] for x in raw], np.int32)
    greatest = max(numbers, default=-1)
    if greatest >= MOST_CLASSES:
        raise StageError(f"{where}: a label is {greatest}; class numbers are below {MOST_CLASSES}")
    labels = np.array([-1 if x is None else max(int(x), -1) for x in raw], np.int32)
    return decimal_names(greatest + 1), labels
