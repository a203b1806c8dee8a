"""Images in folders: classes, names, links, splits, and the checksum of the listing."""

import json
import os
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image

from pipeline.runtime.errors import StageError
from pipeline.sources import Folder, LeftOut, open_indexed
from tests.pipeline.sources.listed import keys, labels, save


def test_subfolders_are_classes_and_nested_folders_belong_to_them(tmp_path: Path) -> None:
    for path in ["dog/1.png", "cat/b/2.JPG", "cat/b/c/3.webp", "cat/1.jpeg", "cat b/1.png"]:
        save(tmp_path / path)
    source = open_indexed(str(tmp_path))
    assert source.class_names == ("cat", "cat b", "dog")
    assert keys(source) == ["cat/1.jpeg", "cat/b/2.JPG", "cat/b/c/3.webp", "cat b/1.png", "dog/1.png"]
    assert labels(source) == [0, 0, 0, 1, 2]
    assert source.load(0).size == (8, 6)
    assert source.left_out == ()


def test_names_with_spaces_and_accents_are_kept_and_composed(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "été à la mer")
    save(tmp_path / decomposed / "fête 1.png")
    save(tmp_path / "zèbre" / "1.png")
    source = open_indexed(str(tmp_path))
    assert source.class_names == ("zèbre", "été à la mer")
    assert source.key(1) == f"{decomposed}/fête 1.png"
    assert source.load(1).size == (8, 6)
    assert open_indexed(str(tmp_path), classes=[decomposed]).class_names == ("été à la mer",)


def test_names_that_are_equal_when_composed_both_work(tmp_path: Path) -> None:
    forms: list[Literal["NFC", "NFD"]] = ["NFC", "NFD"]
    for x, form in enumerate(forms):
        save(tmp_path / "cat" / f"{unicodedata.normalize(form, 'é')}.png", Image.new("L", (1, 1), x))
    source = open_indexed(str(tmp_path))
    assert len(set(keys(source))) == 2
    assert {source.load(i).getpixel((0, 0)) for i in range(2)} == {(0, 0, 0), (1, 1, 1)}


def test_a_name_that_is_not_utf8_is_spelled_out(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system keeps UTF-8 names only")
    shutil.copy(save(tmp_path / "x" / "1.png"), os.fsdecode(folder + b"/\xff.png"))
    source = open_indexed(str(tmp_path))
    assert keys(source) == ["caf\\xe9/\\xff.png", "x/1.png"]
    assert source.class_names == ("caf\\xe9", "x")
    assert source.load(0).size == (8, 6)
    json.dumps(source.describe()).encode()


def test_hidden_files_and_other_files_are_not_images(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "1.png")
    for path in ["cat/._1.png", ".cache/1.png", "cat/.thumbs/1.png", "__MACOSX/cat/1.png", "cat/__MACOSX/1.png"]:
        save(tmp_path / path)
    (tmp_path / "README.md").touch()
    (tmp_path / "cat" / "notes.txt").touch()
    source = Folder(str(tmp_path))
    assert keys(source) == ["cat/1.png"]
    assert source.ignored == 2
    assert source.left_out == ()


def test_a_folder_of_images_alone_is_one_class(tmp_path: Path) -> None:
    save(tmp_path / "cats" / "b.png")
    save(tmp_path / "cats" / "a.png")
    source = open_indexed(str(tmp_path / "cats") + "/")
    assert source.class_names == ("cats",)
    assert keys(source) == ["a.png", "b.png"]


def test_images_beside_class_folders_are_left_out_with_a_reason(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "1.png")
    save(tmp_path / "stray.png")
    source = open_indexed(str(tmp_path))
    assert keys(source) == ["cat/1.png"]
    assert source.left_out == (LeftOut("stray.png", "image outside the class folders: it has no class"),)


def test_an_empty_class_folder_gets_no_label_but_is_reported(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "1.png")
    (tmp_path / "cat" / "deep").mkdir(parents=True)
    source = open_indexed(str(tmp_path))
    assert source.class_names == ("dog",)
    assert labels(source) == [0]
    assert source.left_out == (LeftOut("cat", "empty class folder: no images in it"),)
    with pytest.raises(StageError, match="class 'cat' has no images"):
        open_indexed(str(tmp_path), classes=["cat"])


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_class_folder_without_permission_is_left_out_and_not_called_empty(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "1.png")
    (tmp_path / "dog").mkdir(mode=0)
    assert open_indexed(str(tmp_path)).left_out == (LeftOut("dog", "cannot be listed: Permission denied"),)


def test_a_source_without_images_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.txt").touch()
    with pytest.raises(StageError, match=r"no images in it; looked for CLASS/picture .*jpg.* 1 other files ignored"):
        open_indexed(str(tmp_path))


@pytest.mark.parametrize("name", ["train", "val", "validation", "test"])
def test_a_folder_of_splits_asks_for_one(tmp_path: Path, name: str) -> None:
    save(tmp_path / name / "cat" / "1.png")
    with pytest.raises(StageError, match=f"--split {name}, or give the folder itself"):
        open_indexed(str(tmp_path))
    source = open_indexed(str(tmp_path), split=name)
    assert source.class_names == ("cat",)
    assert keys(source) == ["cat/1.png"]


@pytest.mark.parametrize("split", ["val", "..", "train/../train", ""])
def test_a_split_that_is_not_a_subfolder_is_an_error(tmp_path: Path, split: str) -> None:
    save(tmp_path / "train" / "cat" / "1.png")
    with pytest.raises(StageError, match=f"no subfolder for the split '{split}'; (available: train|did you mean)"):
        open_indexed(str(tmp_path), split=split)


def test_linked_class_folders_and_a_linked_root_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "store" / "a" / "deep" / "1.png")
    save(tmp_path / "data" / "cat" / "1.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "store" / "a", target_is_directory=True)
    (tmp_path / "root").symlink_to(tmp_path / "data", target_is_directory=True)
    for root in ("data", "root"):
        source = open_indexed(str(tmp_path / root))
        assert source.class_names == ("cat", "dog")
        assert keys(source) == ["cat/1.png", "dog/deep/1.png"]
        assert source.load(1).size == (8, 6)
        assert source.left_out == ()


def test_a_folder_is_read_once_and_deeper_links_are_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    save(root / "cat" / "1.png")
    save(tmp_path / "store" / "1.png")
    for link, target in {
        "cat/loop": root,
        "around": tmp_path,
        "root": root,
        "same": root / "cat",
        "stored": tmp_path / "store",
        "stored again": tmp_path / "store",
        "store/loop": root,
    }.items():
        ((root if "store/" not in link else tmp_path) / link).symlink_to(target, target_is_directory=True)
    source = open_indexed(str(root))
    assert keys(source) == ["cat/1.png", "stored/1.png"]
    again = "link to a folder already listed: not followed"
    deeper = "link to a folder: not followed"
    assert {x.key: x.reason for x in source.left_out} == {
        **dict.fromkeys(["around", "root", "same", "stored again"], again),
        **dict.fromkeys(["cat/loop", "stored/loop"], deeper),
    }


def test_links_to_files_are_images_and_broken_ones_are_left_out(tmp_path: Path) -> None:
    real = save(tmp_path / "real.png")
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "cat" / "1.png").symlink_to(real)
    (tmp_path / "data" / "cat" / "2.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "data" / "cat" / "3.png").symlink_to("3.png")
    source = open_indexed(str(tmp_path / "data"))
    assert keys(source) == ["cat/1.png"]
    assert source.load(0).size == (8, 6)
    assert [x.key for x in source.left_out] == ["cat/2.png", "cat/3.png"]
    assert source.left_out[0].reason == "broken link"
    assert source.left_out[1].reason.startswith("cannot be followed")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_is_left_out_without_waiting(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "1.png")
    os.mkfifo(tmp_path / "cat" / "2.png")
    assert open_indexed(str(tmp_path)).left_out == (LeftOut("cat/2.png", "not a regular file"),)


@pytest.mark.parametrize("gone", ["cat/1.png", "cat"])
def test_a_missing_file_stops_and_says_how_to_continue(tmp_path: Path, gone: str) -> None:
    save(tmp_path / "data" / "cat" / "1.png")
    source = open_indexed(str(tmp_path / "data"))
    (tmp_path / "data" / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(StageError, match=r"cat/1\.png: No such file .*shards are kept: put it back .*run the same"):
        source.load(0)
    (tmp_path / "elsewhere").rename(tmp_path / "data" / gone)
    assert source.load(0).size == (8, 6)


def test_a_listing_depends_only_on_names_sizes_and_modification_times(tmp_path: Path) -> None:
    names = [f"{c}/{i}.png" for c in ("b", "a", "ä", "a b") for i in (10, 9, 1)]
    for root, order in (("x", names), ("y", names[::-1])):
        for name in order:
            os.utime(save(tmp_path / root / name), ns=(10**18, 10**18))
    first, second = (open_indexed(str(tmp_path / root)) for root in "xy")
    assert keys(first) == keys(second)
    assert labels(first) == labels(second) == sorted(labels(first))
    assert first.describe()["listing_sha256"] == second.describe()["listing_sha256"]
    save(tmp_path / "y" / "a" / "11.png")
    assert open_indexed(str(tmp_path / "y")).describe()["listing_sha256"] != first.describe()["listing_sha256"]


def test_a_picture_replaced_under_its_name_is_another_listing(tmp_path: Path) -> None:
    path = tmp_path / "cat" / "1.png"
    found = set()
    for colour, changed in ((1, 0), (2, 1)):
        save(path, Image.new("RGB", (8, 6), (colour, 0, 0)))
        os.utime(path, ns=(changed, changed))
        found.add(open_indexed(str(tmp_path)).describe()["listing_sha256"])
    path.write_bytes(path.read_bytes() + b" ")
    os.utime(path, ns=(1, 1))
    source = open_indexed(str(tmp_path))
    found.add(source.describe()["listing_sha256"])
    assert len(found) == 3
    path.unlink()
    assert source.describe()["listing_sha256"] in found  # of when it was first asked for


def test_a_description_is_json_and_names_the_listing(tmp_path: Path) -> None:
    save(tmp_path / "train" / "cat" / "1.png")
    description = open_indexed(str(tmp_path), split="train").describe()
    assert json.loads(json.dumps(description)) == description
    assert description["kind"] == "folder"
    assert description["location"] == str(tmp_path / "train")
    assert description["split"] == "train"
    assert description["images"] == 1
    assert re.fullmatch("[0-9a-f]{64}", str(description["listing_sha256"]))
