"""Braces in the names of tars."""

from pathlib import Path

import pytest

from pipeline.runtime.errors import StageError
from pipeline.sources import locations, open_indexed


@pytest.mark.parametrize(
    "braces",
    [
        "{0..99999999999}",
        "{0..99999}{0..99999}",
        "{x{0..9999}{0..9999},y}",
        "{" + "{,}" * 40 + ",z}",
        "{a,b}" * 40,
    ],
)
def test_braces_with_too_many_names_are_refused_before_expansion(tmp_path: Path, braces: str) -> None:
    for data in (f"{tmp_path}/{braces}.tar", f"https://example.org/{braces}.tar"):
        with pytest.raises(StageError, match="its braces expand to more than 1,000,000 names"):
            open_indexed(data)


@pytest.mark.parametrize(
    "pattern", ["{0..9}", "{a,b}{1,2,3}", "{a{0..3},b{5..1..2}}x{,}", "{x}", "{{1..2}}", r"\{1,2\}"]
)
def test_the_counted_names_of_braces_equal_their_expansion(pattern: str) -> None:
    assert locations._count_names(pattern) == len(locations.expand(pattern))
