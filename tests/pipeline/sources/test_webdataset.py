"""WebDataset samples in local tars: keys, labels and classes."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.runtime.errors import StageError
from pipeline.sources import LeftOut, open_indexed
from tests.pipeline.sources.listed import keys, labels, pixels
from tests.pipeline.sources.tars import jpeg, tar_of, write_tar


def write_samples(path: Path, samples: list[dict[str, Any]]) -> str:
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


def _mend_checksums(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 512):
        block = data[at : at + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    path.write_bytes(data)


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
