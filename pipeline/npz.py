"""Images in ``.npz`` files as ADM's evaluation suite reads and writes them: ``arr_0``, uint8, (n, H, W, 3).

    with write_images(Path("samples.npz"), (50_000, 256, 256, 3), labels) as append:
        append(pixels)                                       # some images at a time
    images = NpzImages(Path("VIRTUAL_imagenet256_labeled.npz"))
    images.read(0, 500)

Neither direction holds all images in memory, and nothing in a file is unpickled.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StageError
from pipeline.share import replacing

IMAGES, LABELS = "arr_0", "arr_1"


@contextlib.contextmanager
def write_images(
    path: Path, shape: tuple[int, int, int, int], labels: NDArray[np.integer]
) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """A file of images written bit by bit, whole or not at all; its bytes are a function of images and labels.

    Args:
        path: the file.
        shape: (n, H, W, 3), of all images together.
        labels: (n,), written as ``arr_1``, as ADM's sampling scripts write them.

    Raises:
        ValueError: another number of images was appended.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    written = 0
    with replacing(path) as part:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo(f"{IMAGES}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)

                def append(pixels: NDArray[np.uint8]) -> None:
                    nonlocal written
                    if pixels.shape[1:] != shape[1:] or pixels.dtype != np.uint8:
                        raise ValueError(f"images are {pixels.shape} {pixels.dtype}; the file is for {shape} uint8")
                    file.write(np.ascontiguousarray(pixels).data)
                    written += len(pixels)

                yield append
            with archive.open(zipfile.ZipInfo(f"{LABELS}.npy"), "w") as file:
                np.lib.format.write_array(file, np.asarray(labels, np.int64), allow_pickle=False)
        if written != shape[0]:
            raise ValueError(f"{written} images were appended to a file for {shape[0]}")


class NpzImages:
    """The images of an ``.npz`` file, read some at a time."""

    def __init__(self, path: Path) -> None:
        """Reads the header of ``arr_0``.

        Raises:
            StageError: there is no such array, or it does not hold colour images in uint8.
        """
        self.path = path
        with self._open() as (_, shape):
            self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, first: int, end: int) -> NDArray[np.uint8]:
        """Images ``first`` to ``end - 1``: (end - first, H, W, 3)."""
        each = int(np.prod(self.shape[1:]))
        with self._open() as (file, _):
            file.seek(file.tell() + first * each)
            held = file.read((end - first) * each)
        if len(held) != (end - first) * each:
            raise StageError(f"{self.path} is cut short: images {first} to {end - 1} are not all there")
        return np.frombuffer(bytearray(held), np.uint8).reshape(
            end - first, *self.shape[1:]
        )  # writable, as torch wants

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[BinaryIO, tuple[int, ...]]]:
        """The member, at its first byte of pixels, and its shape."""
        with open_npz(self.path) as archive:
            try:
                with archive.open(f"{IMAGES}.npy") as file:
                    shape, in_columns, kind = _header(file)
                    if len(shape) != 4 or shape[3] != 3 or kind != np.uint8 or in_columns:
                        raise StageError(
                            f"{self.path}: {IMAGES} is {shape} {kind}; colour images, (n, H, W, 3) uint8, are needed"
                        )
                    yield file, shape  # type: ignore[misc]  # a zip member reads and seeks as a file does
            except (KeyError, ValueError, zipfile.BadZipFile) as error:
                raise StageError(f"{self.path}: its {IMAGES} cannot be read: {error}") from error


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive that an ``.npz`` file is.

    Raises:
        StageError: it is not there, or no such archive.
    """
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise StageError(f"there is no file {path}") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise StageError(f"{path} is no .npz file: {error}") from error
    with archive:
        yield archive


def array_names(path: Path) -> set[str]:
    """Names of the arrays in an ``.npz`` file."""
    with open_npz(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, in_columns, kind = read(file)
    return shape, in_columns, kind
