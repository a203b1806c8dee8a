"""Images in local tars: class folders, ImageNet's tar of tars, and tars that change."""

import json
import os
import pickle
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.runtime.errors import StageError
from pipeline.sources import open_indexed
from tests.pipeline.sources.listed import assert_same, keys, pixels
from tests.pipeline.sources.tars import jpeg, tar_of, write_tar


def write_folder(root: Path, files: Mapping[str, bytes]) -> str:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


IMAGES = {
    "dog/2.jpg": jpeg(1),
    "cat b/1.jpg": jpeg(2),
    "cat/10.jpg": jpeg(3),
    "cat/9.png": jpeg(4),
    "cat/deep/er/1.jpg": jpeg(5),
    "élan/é.jpg": jpeg(6),
    "dog/" + "long name " * 20 + ".jpg": jpeg(7),
}


# Class folders in a tar


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_of_class_folders_is_listed_and_decoded_as_the_folder_itself(tmp_path: Path, format: int) -> None:
    tar = open_indexed(write_tar(tmp_path / "x.tar", IMAGES, format))
    folder = open_indexed(write_folder(tmp_path / "x", IMAGES))
    assert_same(tar, folder)


def test_several_tars_of_class_folders_are_one_folder(tmp_path: Path) -> None:
    names = list(IMAGES)
    write_tar(tmp_path / "tars" / "a.tar", {name: IMAGES[name] for name in names[::2]})
    write_tar(tmp_path / "tars" / "b.tar", {f"./{name}": IMAGES[name] for name in names[1::2]})
    assert_same(
        open_indexed(str(tmp_path / "tars" / "*.tar")),
        open_indexed(write_folder(tmp_path / "x", IMAGES)),
    )


def test_classes_and_limit_of_a_tar_equal_those_of_a_folder(tmp_path: Path) -> None:
    tar, folder = write_tar(tmp_path / "x.tar", IMAGES), write_folder(tmp_path / "x", IMAGES)
    assert_same(
        open_indexed(tar, classes=["dog", "cat"], limit=3), open_indexed(folder, classes=["dog", "cat"], limit=3)
    )


def test_a_split_is_a_folder_in_the_tar(tmp_path: Path) -> None:
    inside = {f"{split}/{name}": data for split in ("train", "val") for name, data in IMAGES.items()}
    tar = write_tar(tmp_path / "x.tar", inside)
    with pytest.raises(StageError, match="holds splits, not classes"):
        open_indexed(tar)
    assert_same(open_indexed(tar, split="val"), open_indexed(write_folder(tmp_path / "x", inside), split="val"))
    with pytest.raises(StageError, match="no folder for the split 'tst'"):
        open_indexed(tar, split="tst")


def test_images_in_the_root_of_a_tar_are_one_class_with_its_name(tmp_path: Path) -> None:
    source = open_indexed(write_tar(tmp_path / "cats.tar", {"b.jpg": jpeg(), "a.jpg": jpeg(), "notes": b"x"}))
    assert source.class_names == ("cats",)
    assert keys(source) == ["a.jpg", "b.jpg"]


def test_hidden_files_in_a_tar_are_not_images(tmp_path: Path) -> None:
    names = ["cat/1.jpg", "cat/._1.jpg", ".x/1.jpg", "__MACOSX/cat/1.jpg"]
    source = open_indexed(write_tar(tmp_path / "x.tar", dict.fromkeys(names, jpeg())))
    assert keys(source) == ["cat/1.jpg"]
    assert source.left_out == ()


@pytest.mark.parametrize("name", ["x.tar", "*.tar"])
def test_a_missing_file_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(StageError, match="no such f"):
        open_indexed(str(tmp_path / name))


def test_a_file_named_twice_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", IMAGES)
    with pytest.raises(StageError, match=r"names .*x\.tar twice"):
        open_indexed(str(tmp_path / "{x,*}.tar"))


def test_a_description_is_json_and_reopens_the_source_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "a.tar", IMAGES)
    monkeypatch.chdir(tmp_path)
    source = open_indexed("*.tar")
    described = json.loads(json.dumps(source.describe()))
    monkeypatch.chdir(os.path.dirname(tmp_path))
    assert_same(open_indexed(described["location"], split=described["split"]), source)


@pytest.mark.parametrize("change", ["removed", "shorter", "longer"])
def test_a_replaced_tar_stops_and_says_how_to_continue(tmp_path: Path, change: str) -> None:
    path = Path(write_tar(tmp_path / "x.tar", {"cat/1.jpg": jpeg(), "cat/2.jpg": jpeg()}))
    source = open_indexed(str(path))
    if change == "removed":
        path.rename(tmp_path / "y.tar")
    else:
        with path.open("r+b") as file:
            file.truncate(600 if change == "shorter" else path.stat().st_size + 512)
    with pytest.raises(StageError, match=r"x\.tar: .*inished shards are kept.* run the same command again"):
        source.load(0)


def test_a_replaced_tar_has_another_listing(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    found = []
    for files in ({"cat/1.png": jpeg(1), "dog/2.png": jpeg(2)}, {"dog/2.png": jpeg(2), "cat/1.png": jpeg(1)}):
        path.write_bytes(tar_of(files))
        os.utime(path, ns=(10**18, 10**18))
        found.append(open_indexed(str(path)))
    os.utime(path, ns=(10**18, 10**18 + 1))
    found.append(open_indexed(str(path)))
    assert keys(found[0]) == keys(found[1]) == keys(found[2])
    assert len({str(source.describe()["listing_sha256"]) for source in found}) == 3
    with pytest.raises(StageError, match=r"a\.tar: has changed since its images were listed.*--overwrite"):
        found[1].load(0)


# ImageNet


@pytest.fixture
def imagenet(tmp_path: Path) -> dict[str, dict[str, bytes]]:
    synsets = ["n02099601", "n01440764", "n03126707"]
    return {s: {f"{s}_{i}.JPEG": jpeg(j * 10 + i) for i in (10, 9, 1)} for j, s in enumerate(synsets)}


def test_imagenets_tar_of_tars_is_its_folder(tmp_path: Path, imagenet: dict[str, dict[str, bytes]]) -> None:
    nested = write_tar(tmp_path / "train.tar", {f"{s}.tar": tar_of(files) for s, files in imagenet.items()})
    folder = write_folder(tmp_path / "x", {f"{s}/{n}": d for s, files in imagenet.items() for n, d in files.items()})
    source = open_indexed(nested)
    assert source.class_names == ("n01440764 tench", "n02099601 golden retriever", "n03126707 crane")
    assert_same(source, open_indexed(folder))


def test_imagenets_inner_tars_are_its_folder_too(tmp_path: Path, imagenet: dict[str, dict[str, bytes]]) -> None:
    nested = write_tar(tmp_path / "train.tar", {f"{s}.tar": tar_of(files) for s, files in imagenet.items()})
    for synset, files in imagenet.items():
        write_tar(tmp_path / "x" / f"{synset}.tar", files)
    assert_same(open_indexed(nested), open_indexed(str(tmp_path / "x")))


def test_a_tar_in_a_tar_that_is_cut_short_is_named(tmp_path: Path, imagenet: dict[str, dict[str, bytes]]) -> None:
    inner = tar_of(imagenet["n01440764"])[:1500]
    nested = write_tar(tmp_path / "train.tar", {"n01440764.tar": inner, "n02099601.tar": tar_of({})})
    with pytest.raises(StageError, match=r"train\.tar: n01440764\.tar: ends at byte 1500"):
        open_indexed(nested)


# Processes and threads


def test_a_source_of_tars_can_be_pickled_and_read_in_threads(tmp_path: Path) -> None:
    source = open_indexed(write_tar(tmp_path / "x.tar", {f"c/{i:03d}.jpg": jpeg(i) for i in range(50)}))
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        assert [image.tobytes() for image in pool.map(copy.load, range(50))] == pixels(source)
