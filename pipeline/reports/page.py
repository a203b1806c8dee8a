"""Reports as self-contained HTML pages: sections of text, pictures and tables.

    section = Section("Codebook", "How much of it is used.", tables=[Table("Codes", ["used", "of"], [["31", "32"]])])
    render("report.html", Path("out/index.html"), title="codes/", subtitle="12 images", sections=[section], made_by={})

Everything in a page is escaped. Pages have no scripts and load nothing: pictures are ``data:`` URIs.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from shards.files import write_text


@dataclass(frozen=True)
class Picture:
    """A picture with its caption and alternative text. A wide one has a line of its own."""

    caption: str
    data_uri: str
    alt: str
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """A table of strings; each row is as long as the header. The first column is the row's name."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, then a paragraph, a chart, tables and pictures."""

    title: str
    text: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    chart: Picture | None = None


def render(template: str, out: Path, **values: Any) -> None:
    """Fill a template and write the page to ``out``, atomically.

    Args:
        template: a file of ``pipeline/reports/templates``. ``report.html`` takes ``title``, ``subtitle``, ``sections``
            (of `Section`) and ``made_by`` (a dict).
        out: the page; its directory is created if missing.
        values: the template's variables.

    Raises:
        jinja2.UndefinedError: a variable of the template is missing.
        jinja2.TemplateNotFound: there is no such template.
    """
    page = _environment().get_template(template).render(**values)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page, errors="backslashreplace")  # a key may not be valid UTF-8


@lru_cache
def _environment() -> Environment:
    return Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _read(name: str) -> str | None:
    file = importlib.resources.files("pipeline.reports") / "templates" / name
    return file.read_text(encoding="utf-8") if file.is_file() else None
