"""The original images of an artifact are found in every kind of source, by its manifest only."""

import dataclasses
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

from pipeline.runtime.errors import StageError
from pipeline.sources import Item, open_indexed, open_source
from pipeline.sources.crops import views
from pipeline.sources.originals import load_originals
from shards.manifest import Manifest
from shards.reader import open_artifact
from tests.pipeline.inspections import build, save_inputs
from tests.pipeline.sources.test_streams import serving


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
        (folder / "a.tar").write_bytes(tar_of(samples))
        return f"file://{folder}/a.tar", {}
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
    with pytest.raises(StageError, match="1 of 2 images are no longer in their source, the first 'a/nothing'"):
        load_originals(made, [keys[0], "a/nothing"], [0, 0])


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("https://example.invalid/a.tar", "fetched only with --fetch-originals"),
        ("s3://bucket/a.tar", "fetched only with --fetch-originals"),
        ("hf://datasets/owner/name", "fetched only with --fetch-originals"),
        ("owner/name", "fetched only with --fetch-originals"),
        ("memory://a.tar", "a manifest may name files here and http, https, s3, gs URLs, no other kind"),
        ("ssh://host/a.tar", "a manifest may name files here"),
        ("github://owner:repo@main/a.tar", "a manifest may name files here"),
        ("simplecache::https://example.invalid/a.tar", "a manifest may name files here"),
        ("tar://x.tar::https://example.invalid/a.tar", "a manifest may name files here"),
        ("https://example.invalid/x::file:///etc/a.tar", "a manifest may name files here"),
        ("file:///etc/x.tar::memory://a.tar", "a manifest may name files here"),
    ],
)
@pytest.mark.parametrize("named", ["location", "data"])
def test_urls_in_a_manifest_are_not_fetched_by_default(tmp_path: Path, location: str, says: str, named: str) -> None:
    made, keys = manifest(make("tar", tmp_path)[0].replace("*", f"{tmp_path}/*"))
    source = {"location": location, "kind": "webdataset-stream"} if named == "location" else {}
    settings = made.settings | {"data": location}
    with pytest.raises(StageError, match=says):
        load_originals(dataclasses.replace(made, settings=settings, source=source), keys[:1], [0])


def test_known_kinds_of_urls_are_fetched_on_request_and_others_never(tmp_path: Path) -> None:
    samples = {"0.png": png(0), "0.cls": b"0"}
    with serving({"a.tar": tar_of(samples)}) as server:
        made, keys = manifest(f"{server.url}/a.tar")
        server.requests = 0
        with pytest.raises(StageError, match="fetched only with --fetch-originals"):
            load_originals(made, keys, [0])
        assert server.requests == 0
        found = load_originals(made, keys, [0], fetch=True)
    np.testing.assert_array_equal(found[0], np.asarray(Image.open(io.BytesIO(png(0)))))
    with fsspec.open("memory://dpar-originals/a.tar", "wb") as file:
        file.write(tar_of(samples))
    made, keys = manifest("memory://dpar-originals/a.tar")
    with pytest.raises(StageError, match="no other kind"):
        load_originals(made, keys, [0], fetch=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"image_size": "16"}, "field settings.image_size is '16', expected an integer of at least 1"),
        ({"image_size": 10**9}, "the manifest contradicts itself"),
        ({"views": "ten-crop"}, "the manifest contradicts itself"),
        ({"views": "sideways"}, "field settings.views is 'sideways', expected one of"),
        ({"crop_range": [None]}, r"field settings.crop_range\[0\] is null"),
        ({"data": None}, "field settings.data is null, expected text"),
        ({"classes": "cat"}, "field settings.classes is 'cat', expected a list"),
    ],
)
def test_settings_without_a_usable_source_are_one_message(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    made, keys = manifest(make("tar", tmp_path)[0].replace("*", f"{tmp_path}/*"))
    with pytest.raises(StageError, match=says):
        load_originals(dataclasses.replace(made, settings=made.settings | settings), keys[:1], [0])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("made"))


def test_originals_equal_the_tokenized_pixels(made: Path, tmp_path: Path) -> None:
    artifact, rows = build(made, tmp_path / "a")
    manifest = open_artifact(artifact).manifest
    source = open_indexed(str(made / "photos"))
    wanted = [7, 2, 7]
    found = load_originals(manifest, [rows.keys[i] for i in wanted], [0, 1, 1])
    for pixels, i, view in zip(found, wanted, [0, 1, 1], strict=True):
        np.testing.assert_array_equal(pixels, views(source.load(i), 16, "flip", [1.0])[view])


def test_an_image_that_has_left_the_source_is_named(made: Path, tmp_path: Path) -> None:
    manifest = open_artifact(build(made, tmp_path / "a", kind="codes")[0]).manifest
    with pytest.raises(StageError, match=r"1 of 2 images are no longer in their source, the first 'cat/99\.png'"):
        load_originals(manifest, ["cat/99.png", "cat/1.png"], [0, 0])
