"""Resolve a user's DATA: the files of a path, a glob or braces.

expand("imagenet-{000..146}.tar")                        # 147 names
local_files("tars/*.tar")                                # existing files, sorted
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence

from pipeline.runtime.errors import StageError

MAX_NAMES = 1_000_000  # maximum number of names that braces may expand to


def expand(data: str) -> list[str]:
    """Expand braces such as ``{000..146}`` and ``{a,b}``, in order; without braces return one name.

    Raises:
        StageError: the braces do not close, or expand to more than `MAX_NAMES`.
    """
    import braceexpand

    try:
        n_names = _count_names(data)  # first: the expansion needs much memory
        if n_names <= MAX_NAMES:
            return list(braceexpand.braceexpand(data))
    except (ValueError, RecursionError) as error:
        raise StageError(f"{data}: its braces cannot be read: {error}") from error
    raise StageError(f"{data}: its braces expand to more than {MAX_NAMES:,} names; give fewer at a time")


def _count_names(pattern: str) -> int:
    """Return how many names braces expand to, without expanding them; letter ranges count as one."""
    product, added, opened = 1, 0, 0  # names of this alternative, of those before it, and its brace's position
    outer: list[tuple[int, int, int]] = []
    for mark in re.finditer(r"\\.|[{},]", pattern, re.DOTALL):
        if mark[0] == "{":
            outer.append((product, added, opened))
            product, added, opened = 1, 0, mark.end()
        elif mark[0] == "," and outer:
            product, added = 1, added + product
        elif mark[0] == "}" and outer:
            inside = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", pattern[opened : mark.start()])
            names = added + product
            if inside is not None:
                names = abs(int(inside[2]) - int(inside[1])) // (int(inside[3] or 1) or 1) + 1
            product, added, opened = outer.pop()
            product = min(product * names, MAX_NAMES + 1)
    return product


def local_files(data: str) -> list[str]:
    """Return the absolute paths that a path, a glob or braces name: in the order of the braces, sorted within a glob.

    Raises:
        StageError: a name matches no file, or a file is named twice.
    """
    files: list[str] = []
    for name in [data] if os.path.exists(data) else expand(data):
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise StageError(f"{name}: no such file" + ("" if name == data else f" (of {data})"))
        files += [os.path.abspath(file) for file in matches]
    check_named_once(files, data)
    return files


def check_named_once(files: Sequence[str], data: str) -> None:
    """Raise StageError if two of the files are the same."""
    if len(set(files)) < len(files):
        twice = next(file for file, count in Counter(files).items() if count > 1)
        raise StageError(f"{data}: names {twice} twice")


def stems(files: Sequence[str]) -> list[str]:
    """Return a short unique name for each file: its name without ``.tar``, prefixed with its folders if necessary."""
    short = [os.path.basename(file).removesuffix(".tar") for file in files]
    if len(set(short)) == len(short):
        return short
    folders = [os.path.dirname(file).split("/") for file in files]
    shared = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))))
    return ["/".join([*folder[shared:], name]) for folder, name in zip(folders, short, strict=True)]
