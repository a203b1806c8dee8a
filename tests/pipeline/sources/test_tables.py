"""Images in tables: Parquet, Arrow, saved datasets, and the message if the Hub cannot be reached."""

import io
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.runtime.errors import StageError
from pipeline.sources import IndexedSource, LeftOut, UnusableImage, open_indexed
from pipeline.sources.tables import Table
from tests.pipeline.sources.listed import keys, labels, pixels


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def png(colour: int) -> bytes:
    pixels = np.random.default_rng(colour).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def decoded(colour: int) -> bytes:
    return np.asarray(Image.open(io.BytesIO(png(colour)))).tobytes()


def write_parquet(path: Path, columns: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


LABELS = [2, 0, 2, 1]
PNGS = [png(i) for i in range(4)]


def saved_table() -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "ant", "cat"])})
    rows = {"image": [{"bytes": data, "path": None} for data in PNGS], "label": LABELS}
    return datasets.Dataset.from_dict(rows, features=features)


def make(kind: str, folder: Path) -> str:
    if kind == "parquet of plain bytes":
        return write_parquet(folder / "a.parquet", {"image": PNGS, "label": LABELS})
    if kind == "parquet of structs":
        structs = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(PNGS)]
        return write_parquet(folder / "a.parquet", {"picture": structs, "label": LABELS, "x": [1.0] * 4})
    table = saved_table()
    folder.mkdir()
    if kind == "parquet of datasets":
        table.to_parquet(folder / "a.parquet")
        return str(folder)
    if kind == "arrow":
        with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.data.schema) as writer:
            writer.write_table(table.data.table)
        return str(folder / "*.arrow")
    if kind == "saved":
        table.save_to_disk(folder / "saved")
    else:
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(folder / "saved")
    return str(folder / "saved")


@pytest.mark.parametrize(
    "kind", ["parquet of plain bytes", "parquet of structs", "parquet of datasets", "arrow", "saved", "saved splits"]
)
def test_every_kind_of_table_gives_the_same_images(tmp_path: Path, kind: str) -> None:
    source = open_indexed(make(kind, tmp_path / "data"))
    before = sorted((tmp_path / "data").rglob("*"))
    assert keys(source) == [f"train/{i:09d}" for i in range(4)]
    assert labels(source) == LABELS
    assert pixels(source) == [decoded(i) for i in range(4)]
    named = "plain" not in kind and "structs" not in kind
    assert source.class_names == (("dog", "ant", "cat") if named else ("0", "1", "2"))
    assert source.left_out == ()
    assert sorted((tmp_path / "data").rglob("*")) == before


def test_a_table_is_read_in_threads_and_in_worker_processes(tmp_path: Path) -> None:
    data = [png(i) for i in range(40)]
    source = open_indexed(write_parquet(tmp_path / "a.parquet", {"image": data, "label": [0] * 40}))
    with ThreadPoolExecutor(8) as pool:
        copy = pickle.loads(pickle.dumps(source))
        assert [image.tobytes() for image in pool.map(copy.load, range(40))] == [decoded(i) for i in range(40)]


def test_splits_are_recognised_by_the_names_of_the_files(tmp_path: Path) -> None:
    for name, n in (("train-00000-of-00002", 2), ("train-00001-of-00002", 1), ("test-00000-of-00001", 1)):
        write_parquet(tmp_path / "data" / f"{name}.parquet", {"image": PNGS[:n], "label": [n] * n})
    assert labels(open_indexed(str(tmp_path / "data"))) == [2, 2, 1]
    assert keys(open_indexed(str(tmp_path / "data"), split="test")) == ["test/000000000"]
    with pytest.raises(StageError, match="no split 'val'; available: test, train"):
        open_indexed(str(tmp_path / "data"), split="val")


def test_several_splits_without_train_ask_for_one(tmp_path: Path) -> None:
    datasets.DatasetDict({"a": saved_table(), "b": saved_table()}).save_to_disk(tmp_path / "x")
    with pytest.raises(StageError, match="has the splits a, b; choose one with --split"):
        open_indexed(str(tmp_path / "x"))
    assert keys(open_indexed(str(tmp_path / "x"), split="b", limit=1)) == ["b/000000001"]


def test_text_labels_are_numbered_in_sorted_order_and_chosen_by_name(tmp_path: Path) -> None:
    names = ["dog", "cat", None, "dog"]
    path = write_parquet(tmp_path / "a.parquet", {"image": PNGS, "label": pa.array(names, pa.string())})
    source = open_indexed(path)
    assert source.class_names == ("cat", "dog")
    assert labels(source) == [1, 0, 1]
    assert source.left_out == (LeftOut("train/000000002", "no label"),)
    chosen = open_indexed(path, classes=["dog"], limit=1)
    assert (keys(chosen), labels(chosen)) == (["train/000000000"], [0])
    assert pixels(open_indexed(path, classes=["dog"])) == [decoded(0), decoded(3)]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    columns = {"thumb": [png(9)] * 4, "photo": PNGS, "kind": [3, 2, 1, 0]}
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(StageError, match=r"several columns can hold images \(thumb, photo\); .*--image-column"):
        open_indexed(path)
    source = open_indexed(path, image_column="photo", label_column="kind")
    assert labels(source) == [3, 2, 1, 0]
    assert pixels(source) == [decoded(i) for i in range(4)]
    described = json.loads(json.dumps(source.describe()))
    assert (described["image_column"], described["label_column"]) == ("photo", "kind")
    assert open_indexed(path, image_column="photo").class_names == ("images",)
    with pytest.raises(StageError, match="no column 'fotos'; did you mean 'photo'"):
        open_indexed(path, image_column="fotos")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a.png"], "label": [1]}, "no column holds images; .* its columns: image, label"),
        ({"image": [b"x"], "label": [0.5]}, "column 'label' holds .*, which cannot be labels"),
        ({"image": [b"x"], "label": [[1]]}, "column 'label' holds .*, which cannot be labels"),
        ({"image": [b"x"], "label": [-1]}, "none of its images has a label"),
    ],
)
def test_a_table_without_usable_columns_says_so(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError, match=message):
        open_indexed(write_parquet(tmp_path / "a.parquet", columns))


def test_a_table_without_rows_says_so(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="x: has no rows"):
        Table(saved_table().select([]), location="x")


def test_rows_without_a_usable_image_are_unusable_one_by_one(tmp_path: Path) -> None:
    images = pa.array([None, b"", b"<html>", png(0)], pa.binary())
    source = open_indexed(write_parquet(tmp_path / "a.parquet", {"image": images, "label": [0] * 4}))
    reasons = []
    for i in range(3):
        with pytest.raises(UnusableImage) as caught:
            source.load(i)
        reasons.append(caught.value.reason.split(":")[0].split(" of ")[0])
    assert reasons == ["no image in its row", "empty file", "not an image"]
    assert source.load(3).tobytes() == decoded(0)


KEPT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def kept_as_paths(folder: Path, *paths: object) -> IndexedSource:
    kept = pa.array([{"bytes": None, "path": str(path)} for path in paths], KEPT)
    datasets.Dataset(pa.table({"image": kept, "label": [0] * len(paths)})).save_to_disk(folder)
    return open_indexed(str(folder))


def test_images_stored_as_paths_are_read_from_the_data_sets_folder_and_a_missing_one_stops(tmp_path: Path) -> None:
    image = tmp_path / "x" / "images" / "1.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(png(1))
    source = kept_as_paths(tmp_path / "x", image, "images/1.png")
    assert pixels(source) == [decoded(1)] * 2
    image.unlink()
    with pytest.raises(StageError, match="put it back"):
        source.load(0)


def test_a_row_cannot_name_a_file_outside_the_data_sets_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "x" / "deep").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "x" / "pipe.png")
    paths = [
        "/dev/zero",
        tmp_path / "secret.png",
        "../secret.png",
        "link.png",
        "deep/secret.png",
        "pipe.png",
        "",
        ".",
        "../a\0b",
    ]
    kept = pa.array([{"bytes": None, "path": str(path)} for path in paths], KEPT)
    parquet = write_parquet(tmp_path / "x" / "a.parquet", {"image": kept, "label": [0] * len(paths)})
    for source in (open_indexed(parquet), kept_as_paths(tmp_path / "x", *paths)):
        for i in range(len(paths)):
            with pytest.raises(UnusableImage, match=r"outside the dataset's folder|not a regular file"):
                source.load(i)


def test_a_file_replaced_under_its_name_is_another_listing(tmp_path: Path) -> None:
    for folder in ("parquet", "saved"):
        found = set()
        for colours in ([1, 2], [3, 4]):
            (tmp_path / folder).mkdir(exist_ok=True)
            rows = {"image": [png(colour) for colour in colours], "label": [0, 0]}
            if folder == "parquet":
                data = write_parquet(tmp_path / folder / "a.parquet", rows)
            else:
                data = str(tmp_path / folder)
                datasets.Dataset(pa.table(rows)).save_to_disk(data)
            found.add(open_indexed(data).describe()["listing_sha256"])
        assert len(found) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_as_table_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(StageError, match=r"a\.parquet: not a regular file"):
        open_indexed(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_damaged_file_is_one_message_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1" + b"x" * 1000)
    with pytest.raises(StageError, match=rf"{name}: cannot be read as images in a table"):
        open_indexed(str(tmp_path / name))


def test_column_options_are_for_tables_only(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="has no columns; --label-column is for Parquet, Arrow and datasets"):
        open_indexed("builtin:photos", label_column="x")


@pytest.mark.parametrize("name", ["nobody/nothing", "hf://datasets/nobody/nothing"])
def test_an_unreachable_hub_is_one_message(name: str) -> None:
    code = (
        "import sys\nfrom pipeline.runtime.errors import StageError\nfrom pipeline.sources import open_indexed\n"
        "try: open_indexed(sys.argv[1])\nexcept StageError as error: print(error)\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.startswith(
        "nobody/nothing: no such file or folder here, and not available as a dataset on the Hugging Face Hub"
    )
    assert "HF_HOME" in done.stdout


@pytest.mark.parametrize("name", ["photoz", "photos/trian"])
def test_the_hub_is_not_asked_for_a_mistyped_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match=rf"{name}: no such folder or file; accepted:"):
        open_indexed(name)


def test_an_artifact_as_source_of_images_is_refused(tmp_path: Path) -> None:
    for name in ("manifest.json", "00000.arrow"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(StageError, match="holds codes written by dpar, not images"):
        open_indexed(str(tmp_path))
