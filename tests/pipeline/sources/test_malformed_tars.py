"""Tars that are truncated, damaged, compressed or hostile."""

import bz2
import gzip
import io
import lzma
import os
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.runtime.errors import StageError
from pipeline.sources import LeftOut, UnusableImage, open_indexed
from tests.pipeline.sources.listed import keys
from tests.pipeline.sources.tars import jpeg, tar_of


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_as_tar_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    for data in ("a.tar", "*.tar", ""):
        with pytest.raises(StageError, match=r"a\.tar: not a regular file"):
            open_indexed(str(tmp_path / data))
