"""Classes by name: ``golden retriever`` matches ``n02099601 golden retriever``; misspelt names get suggestions.

label = find_class("golden retriever", class_names)
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence

from dpar.errors import ModelError

_SYNSET = re.compile(r"(n\d{8}) (.+)")


def find_class(name: str, known: Sequence[str]) -> int | None:
    """Return the index in ``known`` of the class called ``name``, or None.

    The name is the full one, or either half of ``n02099601 golden retriever``.

    Raises:
        ModelError: several classes have that name.
    """
    asked = unicodedata.normalize("NFC", name)
    if asked in known:
        return list(known).index(asked)
    labels = [label for label, match in enumerate(map(_SYNSET.fullmatch, known)) if match and asked in match.groups()]
    if len(labels) > 1:
        names = ", ".join(known[label] for label in labels)
        raise ModelError(f"class {name!r} is the name of {len(labels)} classes; choose from: {names}")
    return labels[0] if labels else None


def nearest_class(name: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown class: the nearest names, with and without synset numbers."""
    words = [match.group(2) for match in map(_SYNSET.fullmatch, known) if match]
    return nearest(name, [*known, *words])


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the closest known names, else the first few."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    first = ", ".join(known[:20]) + (f", … ({len(known)} in all)" if len(known) > 20 else "")
    return f"available: {first}" if known else "none is available"
