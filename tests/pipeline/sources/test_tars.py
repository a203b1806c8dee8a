"""Images in local tars: class folders, ImageNet's tar of tars, WebDataset; and malformed tars."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.runtime.errors import StageError
from pipeline.sources import IndexedSource, LeftOut, UnusableImage, locations, open_indexed


def jpeg(colour: int = 0) -> bytes:
    pixels = np.random.default_rng(colour).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_of(files: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(files, format))
    return str(path)


def write_folder(root: Path, files: Mapping[str, bytes]) -> str:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def write_samples(path: Path, samples: list[dict[str, Any]]) -> str:
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


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


# WebDataset


def test_webdataset_keeps_numeric_labels_and_the_order_of_the_tars(tmp_path: Path) -> None:
    for tar, offset in (("b", 0), ("a", 2)):
        samples = [{"__key__": f"{i:04d}", "jpg": jpeg(offset + i), "cls": 7 - offset - i} for i in range(2)]
        write_samples(tmp_path / f"{tar}.tar", samples)
    source = open_indexed(str(tmp_path / "*.tar"))
    assert keys(source) == ["a/0000", "a/0001", "b/0000", "b/0001"]
    assert labels(source) == [5, 4, 7, 6]
    assert source.class_names == tuple("01234567")
    assert pixels(source) == [np.asarray(Image.open(io.BytesIO(jpeg(i)))).tobytes() for i in (2, 3, 0, 1)]
    assert source.describe()["kind"] == "webdataset"
    assert source.left_out == ()


def test_braces_name_the_tars_in_their_order(tmp_path: Path) -> None:
    for i in range(12):
        write_samples(tmp_path / f"t-{i:03d}.tar", [{"__key__": "x", "jpg": jpeg(i), "cls": i}])
    source = open_indexed(str(tmp_path / "t-{000..011}.tar"))
    assert labels(source) == list(range(12))
    assert labels(open_indexed(str(tmp_path / "t-00{3,1}.tar"))) == [3, 1]
    with pytest.raises(StageError, match=r"t-012\.tar: no such file \(of .*t-\{000\.\.012\}\.tar\)"):
        open_indexed(str(tmp_path / "t-{000..012}.tar"))


def test_chosen_numbers_are_renumbered_in_the_order_of_numbers(tmp_path: Path) -> None:
    samples = [{"__key__": f"{i}", "jpg": jpeg(i), "cls": i} for i in range(12)]
    source = open_indexed(write_samples(tmp_path / "x.tar", samples), classes=["10", "9"])
    assert source.class_names == ("9", "10")
    assert keys(source) == ["x/9", "x/10"]
    assert labels(source) == [0, 1]


@pytest.mark.parametrize(
    "fields",
    [
        lambda i, name: {"cls": name.encode()},
        lambda i, name: {"json": {"caption": "x", "class_name": name}},
        lambda i, name: {"txt": "a caption", "__key__": f"{name}/{i}"},
    ],
)
def test_text_labels_are_numbered_in_sorted_order(tmp_path: Path, fields: Any) -> None:
    samples = [{"__key__": f"{i}", "jpg": jpeg(i)} | fields(i, name) for i, name in enumerate(["dog", "cat", "dog"])]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for sample in samples:
            for suffix, value in sample.items():
                data = json.dumps(value).encode() if isinstance(value, dict) else value
                data = data.encode() if isinstance(data, str) else data
                header = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
                header.size = len(data)
                if suffix != "__key__":
                    tar.addfile(header, io.BytesIO(data))
    source = open_indexed(str(tmp_path / "x.tar"))
    assert source.class_names == ("cat", "dog")
    assert labels(source) == [1, 0, 1]


def test_a_number_in_json_is_the_label(tmp_path: Path) -> None:
    samples = [{"__key__": f"{i}", "jpg": jpeg(i), "json": {"label": 3 - i}} for i in range(2)]
    assert labels(open_indexed(write_samples(tmp_path / "x.tar", samples))) == [3, 2]


def test_samples_without_labels_anywhere_are_one_class(tmp_path: Path) -> None:
    source = open_indexed(write_samples(tmp_path / "x.tar", [{"__key__": "a", "jpg": jpeg(), "txt": "a caption"}]))
    assert source.class_names == ("images",)


def test_a_sample_without_image_or_label_is_left_out_with_the_reason(tmp_path: Path) -> None:
    good = {"__key__": "a", "jpg": jpeg(), "cls": 1}
    files = {"b.jpg": jpeg(), "c.jpg": jpeg(), "c.json": b"{", "d.jpg": jpeg(), "d.cls": b"\xff", "e.cls": b"1"}
    files |= {"f.jpg": jpeg(), "f.cls": b"-1", "g.jpg": jpeg(), "g.json": b"[" * 100_000}
    files |= {"a.jpg": jpeg(1), "a.cls": b"1", "noending": b""}
    inside = write_samples(tmp_path / "x.tar", [good])
    Path(inside).write_bytes(tar_of({"a.jpg": jpeg(), "a.cls": b"1"} | {f"z/{k}": v for k, v in files.items()}))
    source = open_indexed(inside)
    assert keys(source) == ["x/a", "x/z/a"]
    reasons = {x.key: x.reason for x in source.left_out}
    assert reasons == {
        "x/z/b": "no label",
        "x/z/c": "its json is not valid JSON",
        "x/z/d": "its cls is not UTF-8",
        "x/z/f": "no label",
        "x/z/g": "its json is not valid JSON",
    }


def test_labels_of_two_kinds_are_an_error(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(), "a.cls": b"1", "b.jpg": jpeg(), "b.cls": b"cat"})
    with pytest.raises(StageError, match=r"some labels are numbers \(1\) and some are text \('cat'\)"):
        open_indexed(tar)


def test_an_invalid_class_number_is_an_error(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(), "a.cls": b"99999999999"})
    with pytest.raises(StageError, match="a label is 99999999999; class numbers are below 1000000"):
        open_indexed(tar)


def test_the_second_image_of_a_key_is_left_out(tmp_path: Path) -> None:
    folders = tmp_path / "folders.tar"
    with tarfile.open(folders, "w") as tar:
        for i in (0, 1):
            header = tarfile.TarInfo("cat/1.jpg")
            header.size = len(jpeg(i))
            tar.addfile(header, io.BytesIO(jpeg(i)))
    samples = write_tar(tmp_path / "s.tar", {"a.jpg": jpeg(0), "a.cls": b"0", "b.jpg": jpeg(2), "b.cls": b"0"})
    Path(samples).write_bytes(Path(samples).read_bytes().replace(b"b.jpg", b"a.jpg").replace(b"b.cls", b"a.cls"))
    _mend_checksums(Path(samples))
    for path, key in ((folders, "cat/1.jpg"), (samples, "s/a")):
        source = open_indexed(str(path))
        assert keys(source) == [key]
        assert source.left_out == (LeftOut(key, "key occurs twice"),)
        assert pixels(source) == [np.asarray(Image.open(io.BytesIO(jpeg(0)))).tobytes()]


def test_dpars_shards_are_not_accepted_as_images(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "shard-00000.tar", {"a.codes.npy": b"x", "a.jpg": jpeg()})
    with pytest.raises(StageError, match=r"shard-00000\.tar: is a shard of codes written by dpar"):
        open_indexed(tar)


# Processes and threads


def test_a_source_of_tars_can_be_pickled_and_read_in_threads(tmp_path: Path) -> None:
    source = open_indexed(write_tar(tmp_path / "x.tar", {f"c/{i:03d}.jpg": jpeg(i) for i in range(50)}))
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        assert [image.tobytes() for image in pool.map(copy.load, range(50))] == pixels(source)


# Malformed tars


def _mend_checksums(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 512):
        block = data[at : at + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    path.write_bytes(data)


def _add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    for field, value in fields.items():
        setattr(header, field, value)
    tar.addfile(header, io.BytesIO(data))


def test_members_outside_the_tar_or_not_files_are_left_out_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "data" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        _add(tar, "cat/1.jpg", jpeg())
        _add(tar, "/etc/passwd.jpg", jpeg())
        _add(tar, "../up.jpg", jpeg())
        _add(tar, "cat/../../up.jpg", jpeg())
        _add(tar, "cat/link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        _add(tar, "cat/hard.jpg", type=tarfile.LNKTYPE, linkname="cat/1.jpg")
        _add(tar, "cat/null.jpg", type=tarfile.CHRTYPE)
        _add(tar, "cat/pipe.jpg", type=tarfile.FIFOTYPE)
        _add(tar, "cat/sparse.jpg", jpeg(), type=tarfile.GNUTYPE_SPARSE)
    source = open_indexed(str(path))
    assert keys(source) == ["cat/1.jpg"]
    assert {x.key: x.reason for x in source.left_out} == {
        "/etc/passwd.jpg": "absolute name in a tar",
        "../up.jpg": "name with '..' in a tar",
        "cat/../../up.jpg": "name with '..' in a tar",
        "cat/link.jpg": "link in a tar: not followed",
        "cat/hard.jpg": "link in a tar: not followed",
        "cat/null.jpg": "not a regular file",
        "cat/pipe.jpg": "not a regular file",
        "cat/sparse.jpg": "sparse file in a tar",
    }
    source.load(0)
    assert [p.name for p in tmp_path.rglob("*")] == ["data", "x.tar"]


@pytest.mark.parametrize("samples", [True, False])
def test_a_truncated_tar_is_always_noticed(tmp_path: Path, samples: bool) -> None:
    files = {"cat/1.jpg": jpeg(), "cat/1.cls": b"1"} if samples else {"cat/1.jpg": jpeg(), "dog/2.jpg": jpeg(1)}
    whole = tar_of(files)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / "x.tar"
    path.write_bytes(whole[: end + 512])
    open_indexed(str(path))
    for size in [0, 1, 100, 511, 512, 513, 700, 1024, 1025, end - 512, end - 1, end, end + 1, end + 511]:
        path.write_bytes(whole[:size])
        with pytest.raises(StageError, match=rf"x\.tar: (not a tar|ends at byte {size}[ ,])"):
            open_indexed(str(path))


def test_a_damaged_header_in_the_middle_is_named_by_its_byte(tmp_path: Path) -> None:
    data = bytearray(tar_of({"cat/1.jpg": jpeg(), "cat/2.jpg": jpeg()}))
    second = data.index(b"cat/2.jpg")
    data[second + 20] ^= 1
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(StageError, match=rf"x\.tar: damaged at byte {second}"):
        open_indexed(str(tmp_path / "x.tar"))


def test_random_damage_gives_a_listing_or_one_message(tmp_path: Path) -> None:
    whole = tar_of({f"cat/{'long ' * 30}{i}.jpg": jpeg(i) for i in range(3)})
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole[: random.integers(1, len(whole) + 1)])
        for _ in range(random.integers(0, 6)):
            damaged[random.integers(len(damaged))] = random.integers(256)
        (tmp_path / "x.tar").write_bytes(damaged)
        # Only these two may be raised.
        with suppress(StageError):
            source = open_indexed(str(tmp_path / "x.tar"))
            for i in range(len(source)):
                with suppress(UnusableImage):
                    source.load(i)


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_refused_by_name(tmp_path: Path, packed: str) -> None:
    packers = {"gz": gzip, "bz2": bz2, "xz": lzma}
    (tmp_path / "x.tar").write_bytes(packers[packed].compress(tar_of({"cat/1.jpg": jpeg()})))
    with pytest.raises(StageError, match=r"x\.tar: compressed with \w+"):
        open_indexed(str(tmp_path / "x.tar"))


def test_a_file_called_tar_that_is_not_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"<html>" * 1000)
    with pytest.raises(StageError, match=r"x\.tar: not a tar"):
        open_indexed(str(tmp_path / "x.tar"))


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


def _bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 25_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def _claiming(kind: bytes, size: int, real: int) -> bytes:
    """Return a member that claims ``size`` bytes and has ``real`` zero bytes."""
    header = tarfile.TarInfo("cat/huge.jpg")
    header.type, header.size = kind, size
    return header.tobuf(tarfile.GNU_FORMAT) + b"\0" * real


def _endless_sparse() -> bytes:
    header = tarfile.TarInfo("cat/sparse.jpg")
    fields = {"major": "1", "minor": "0", "realsize": "5", "name": "cat/1.jpg"}
    header.pax_headers = {f"GNU.sparse.{name}": value for name, value in fields.items()}
    parts = b"99999999\n" + b"1\n" * 2**20
    header.size = len(parts)
    return header.tobuf(tarfile.PAX_FORMAT) + parts.ljust(-(-len(parts) // 512) * 512 + 1024, b"\0")


HOSTILE = {
    "a file claims 4 GB": (_claiming(tarfile.REGTYPE, 4 << 30, 2000), "claims to end at byte"),
    "a long name claims 4 GB": (
        _claiming(tarfile.GNUTYPE_LONGNAME, 4 << 30, 2000),
        "a header of more than 1048576 bytes",
    ),
    "a pax header claims 4 GB": (_claiming(tarfile.XHDTYPE, 4 << 30, 2000), "a header of more than 1048576 bytes"),
    "a negative size": (_claiming(tarfile.REGTYPE, -1024, 2000), "damaged at byte"),
    "a chain of pax headers": (
        _claiming(tarfile.XHDTYPE, 0, 0) * 5000 + b"\0" * 1024,
        "damaged|a header of more|not a tar",
    ),
    "a pixel bomb": (tar_of({"cat/bomb.png": _bomb()}), "too large: more than 178 million pixels"),
    "a sparse file of endless parts": (
        _endless_sparse(),
        "a header of more than 1048576",
    ),
}


def test_hostile_tars_are_refused_within_bounded_memory(tmp_path: Path) -> None:
    # In a separate process, with 300 MB more address space than after its imports.
    for i, (data, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{i}.tar").write_bytes(data)
    code = (
        "import resource, sys\n"
        "from pipeline.sources import open_indexed, UnusableImage\n"
        "from pipeline.runtime.errors import StageError\n"
        "import pipeline.sources.tar_images, webdataset.tariterators, PIL.PngImagePlugin\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        source = open_indexed(path)\n"
        "        source.load(0)\n"
        "    except (StageError, UnusableImage) as error: print(error)\n"
        "    else: print('believed')\n"
    )
    paths = [str(tmp_path / f"{i}.tar") for i in range(len(HOSTILE))]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, (name, (_, message)) in zip(done.stdout.splitlines(), HOSTILE.items(), strict=True):
        assert re.search(message, line), (name, line)


def test_a_member_larger_than_any_image_is_left_out(tmp_path: Path) -> None:
    huge = 600 << 20
    with open(tmp_path / "x.tar", "wb") as file:  # a hole: takes no space
        file.write(tar_of({"cat/1.jpg": jpeg()})[:2048].rstrip(b"\0").ljust(1536, b"\0"))
        header = tarfile.TarInfo("cat/huge.jpg")
        header.size = huge
        file.write(header.tobuf())
        file.truncate(file.tell() + huge + 1024)
    source = open_indexed(str(tmp_path / "x.tar"))
    assert keys(source) == ["cat/1.jpg"]
    assert source.left_out == (LeftOut("cat/huge.jpg", "too large: more than 512 MiB"),)


@pytest.mark.parametrize("name", ["x.tar", "*.tar"])
def test_a_file_named_twice_or_not_at_all_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(StageError, match="no such f"):
        open_indexed(str(tmp_path / name))
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_as_tar_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    for data in ("a.tar", "*.tar", ""):
        with pytest.raises(StageError, match=r"a\.tar: not a regular file"):
            open_indexed(str(tmp_path / data))


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
