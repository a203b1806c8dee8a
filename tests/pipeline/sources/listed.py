"""Shared by the tests of sources: images to save in a folder, and what a source lists and loads."""

from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.sources import IndexedSource


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (8, 6), (200, 100, 50))).save(path, **options)
    return path


def keys(source: IndexedSource) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def labels(source: IndexedSource) -> list[int]:
    return [source.label(i) for i in range(len(source))]


def pixels(source: IndexedSource) -> list[bytes]:
    return [source.load(i).tobytes() for i in range(len(source))]


def assert_same(a: IndexedSource, b: IndexedSource) -> None:
    assert a.class_names == b.class_names
    assert keys(a) == keys(b)
    assert labels(a) == labels(b)
    assert pixels(a) == pixels(b)
