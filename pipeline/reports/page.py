"""Pages that people read: sections of text, pictures and tables in one HTML file that needs no other.

    section = Section("Codebook", "How much of it is used.", tables=[Table("Codes", ["used", "of"], [["31", "32"]])])
    render("report.html", Path("out/index.html"), title="codes/", subtitle="12 images", sections=[section], made_by={})

Everything in a page is escaped. Pages hold no scripts and load nothing: pictures are ``data:`` addresses.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


@dataclass(frozen=True)
class Picture:
    """A picture with its caption; ``alt`` says what is seen on it. A wide one has a line of its own."""

    caption: str
    data_uri: str
    alt: str
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """A table of strings; each row is as long as the header. The first column names its row."""

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
        out: the page; its directory is made if missing.
        values: what the template takes.

    Raises:
        jinja2.UndefinedError: a value that the template takes is missing.
        jinja2.TemplateNotFound: there is no such template.
    """
    page = _environment().get_template(template).render(**values)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        part.write_text(page, encoding="utf-8", errors="backslashreplace")  # a key may hold what UTF-8 cannot
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


@lru_cache
def _environment() -> Environment:
    return Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _read(name: str) -> str | None:
    file = importlib.resources.files("pipeline.reports") / "templates" / name
    return file.read_text(encoding="utf-8") if file.is_file() else None
