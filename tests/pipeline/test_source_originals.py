"""The images an artifact was made from are found again in every kind of source, by its manifest alone."""

import io
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import StageError
from pipeline.originals import load_originals
from pipeline.sources import Item, open_source
from shards.manifest import Manifest


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (colour, 7, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def manifest(data: str, **options: Any) -> tuple[Manifest, list[str]]:
    source = open_source(data, **options)
    parts = [item for part in range(source.n_parts(2)) for item in source.part(part, 2)]
    settings: dict[str, Any] = {
        "data": data,
        "split": options.get("split"),
        "classes": [],
        "image_size": 16,
        "views": "center",
    }
    made = Manifest(
        kind="codes",
        container="arrow",
        grid=(1, 1),
        codebook_size=2,
        views=1,
        class_names=source.class_names,
        rows=len(parts),
        shards=(),
        settings=settings | {"crop_range": [1.0]},
        source=source.describe(),
        tokenizer={},
    )
    return made, [item.key for item in parts if isinstance(item, Item)]


FILES = {f"{name}/{i}.png": png(10 * i + len(name)) for name in ("cat", "horse") for i in range(3)}


def make(kind: str, folder: Path) -> tuple[str, dict[str, Any]]:
    if kind in ("folder", "folder with a split"):
        for name, data in FILES.items():
            path = folder / ("train" if kind == "folder with a split" else ".") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return ".", {"split": "train"} if kind == "folder with a split" else {}
    samples = {f"{i}.{suffix}": png(i) if suffix == "png" else b"1" for i in range(6) for suffix in ("png", "cls")}
    if kind == "tar":
        (folder / "a.tar").write_bytes(tar_of(FILES))
    elif kind == "webdataset":
        (folder / "a.tar").write_bytes(tar_of(samples))
    elif kind == "stream":
        with fsspec.open("memory://dpar-originals/a.tar", "wb") as file:
            file.write(tar_of(samples))
        return "memory://dpar-originals/a.tar", {}
    else:
        table = pa.table({"photo": [png(i) for i in range(6)], "other": [b"x"] * 6, "kind": [1] * 6})
        pq.write_table(table, folder / "a.parquet")
        return "a.parquet", {"image_column": "photo", "label_column": "kind"}
    return "*.tar", {}


@pytest.mark.parametrize("kind", ["folder", "folder with a split", "tar", "webdataset", "stream", "table"])
def test_originals_are_found_by_key_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    data, options = make(kind, tmp_path / "data")
    made, keys = manifest(data, **options)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(keys) == 6
    found = load_originals(made, [keys[4], keys[1], keys[4]], [0, 0, 0])
    expected = [FILES[keys[i]] if keys[i] in FILES else png(i) for i in (4, 1, 4)]
    np.testing.assert_array_equal(found, [np.asarray(Image.open(io.BytesIO(data))) for data in expected])
    with pytest.raises(StageError, match="1 of 2 images are not in their source any more, the first 'a/nothing'"):
        load_originals(made, [keys[0], "a/nothing"], [0, 0])
