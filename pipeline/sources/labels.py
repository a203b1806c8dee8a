"""Convert the labels of sources, numbers or text, to class names and indices into them.

    names, labels = number_labels(["dog", None, "cat"])      # ("cat", "dog"), [1, -1, 0]
    names, labels = number_labels([2, 0])                    # ("0", "1", "2"), [2, 0]

The result is the same on every machine: numbers stay unchanged, text is numbered in sorted order.
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
MAX_CLASSES = 1_000_000  # maximum number of classes; larger numbers are not class labels
NO_LABEL = "no label"  # reason for leaving out an image without a label if other images have one


def parse_label(text: str) -> Label | None:
    """Parse a label: a number if possible, otherwise text; None if it is empty."""
    text = text.strip()
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text or None


def decimal_names(n: int) -> tuple[str, ...]:
    """Return names for classes without names: their numbers."""
    return tuple(map(str, range(n)))


def number_labels(raw: Sequence[Label | None], where: str) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Return class names, and an index into them for each label.

    Args:
        raw: one label per image; None or a negative number if it has none.
        where: the name of the source, for messages.

    Returns:
        The names (ImageNet's ids with their words), and (n,) int32 with -1 for no label.

    Raises:
        StageError: numbers and text are mixed, or a number is too large.
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
    largest = max(numbers, default=-1)
    if largest >= MAX_CLASSES:
        raise StageError(f"{where}: a label is {largest}; class numbers are below {MAX_CLASSES}")
    labels = np.array([-1 if x is None else max(int(x), -1) for x in raw], np.int32)
    return decimal_names(largest + 1), labels
