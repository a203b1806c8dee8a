import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.generation.npz import NpzImages, write_images
from pipeline.runtime.errors import StageError


def pixels(n: int, side: int = 4) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


def test_images_written_in_parts_are_read_by_numpy(tmp_path: Path) -> None:
    images = pixels(7)
    with write_images(tmp_path / "a.npz", (7, 4, 4, 3), np.arange(7)) as append:
        for part in (images[:3], images[3:3], images[3:]):
            append(part)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["arr_1"], np.arange(7))


def test_the_bytes_are_a_function_of_images_and_labels(tmp_path: Path) -> None:
    images = pixels(5)
    for name, steps in (("a", (5,)), ("b", (1, 4))):
        with write_images(tmp_path / name, (5, 4, 4, 3), np.arange(5)) as append:
            for part in np.split(images, np.cumsum(steps)[:-1]):
                append(part)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("given", [2, 4])
def test_a_wrong_number_of_images_leaves_no_file(tmp_path: Path, given: int) -> None:
    says = f"{given} images were appended to a file for 3"
    with (
        pytest.raises(ValueError, match=says),
        write_images(tmp_path / "a.npz", (3, 4, 4, 3), np.arange(3)) as append,
    ):
        append(pixels(given))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_range_is_read_from_packed_and_unpacked_files(tmp_path: Path, save: object) -> None:
    images = pixels(9)
    save(tmp_path / "a.npz", images)  # type: ignore[operator]
    found = NpzImages(tmp_path / "a.npz")
    assert len(found) == 9
    for first, end in ((0, 9), (4, 6), (8, 9), (0, 1), (3, 3)):
        np.testing.assert_array_equal(found.read(first, end), images[first:end])


def test_a_file_cut_short_is_one_message(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pixels(9))
    held = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(held[: len(held) // 2])
    with pytest.raises(StageError, match=r"cut\.npz is not an \.npz file"):
        NpzImages(tmp_path / "cut.npz")


@pytest.mark.parametrize("fault", ["zlib", "crc", "encrypted", "method", "header", "shape", "many", "bomb"])
def test_a_damaged_or_unreadable_file_is_one_message(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "a.npz"
    save = np.savez_compressed if fault == "zlib" else np.savez
    save(path, pixels(9))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")  # in the archive's directory
    name = content.index(b"\x93NUMPY") if fault != "zlib" else 0
    if fault == "zlib":
        content[60:80] = b"\xff" * 20
    elif fault == "crc":
        content[name + 200] ^= 1
    elif fault == "encrypted":
        content[entry + 8] |= 1
        content[6] |= 1
    elif fault == "method":
        content[entry + 10] = content[8] = 97
    elif fault == "header":
        content[name + 10 : name + 20] = b"{" * 10
    path.write_bytes(content)
    if fault in ("shape", "many", "bomb"):
        shape = {"shape": (0, 4, 4, 3), "many": (10**9, 4, 4, 3), "bomb": (2, 2**20, 2**20, 3)}[fault]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.write(bytes(10**6))
    with pytest.raises(StageError, match=r"a\.npz"):
        NpzImages(path).read(0, 9)


def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(StageError, match=r"a\.npz is not a regular file"):
        NpzImages(tmp_path / "a.npz")


def test_writing_many_images_needs_little_memory(tmp_path: Path) -> None:
    script = (
        "import resource, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from pipeline.generation.npz import NpzImages, write_images\n"
        "chunk = np.zeros((100, 64, 64, 3), np.uint8)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with write_images(Path(sys.argv[1]), (20_000, 64, 64, 3), np.arange(20_000)) as append:\n"
        "    for _ in range(200): append(chunk)\n"
        "assert NpzImages(Path(sys.argv[1])).read(19_900, 20_000).shape == chunk.shape\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.npz"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 50_000  # KiB; the images are 245 MB
