"""Images in ``.npz`` files in the format of ADM's evaluation suite: ``arr_0``, uint8, (n, H, W, 3).

    with write_images(Path("samples.npz"), (50_000, 256, 256, 3), labels) as append:
        append(pixels)                                       # some images at a time
    images = NpzImages(Path("VIRTUAL_imagenet256_labeled.npz"))
    images.read(0, 500)

Images are read and written in parts, never all in memory, and nothing in a file is unpickled.
"""

from __future__ import annotations

import contextlib
import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dpar.tensors import shown
from pipeline.runtime.errors import StageError
from shards.files import atomic_path

IMAGES, LABELS = "arr_0", "arr_1"
LARGEST_IMAGE = 2**28  # pixels
# What zipfile, its decompressors and NumPy's header parser raise for files that are damaged, encrypted, or too new.
UNREADABLE = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, MemoryError, SyntaxError, struct.error),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)

Header = tuple[tuple[int, ...], bool, np.dtype[Any]]  # shape, whether in Fortran order, type


@contextlib.contextmanager
def write_images(
    path: Path, shape: tuple[int, int, int, int], labels: NDArray[np.integer]
) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """Write a file of images in parts, atomically; its bytes are a function of images and labels.

    Args:
        path: the file.
        shape: (n, H, W, 3), of all images.
        labels: (n,), written as ``arr_1``, as ADM's sampling scripts write them.

    Raises:
        ValueError: another number of images was appended.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    written = 0
    with atomic_path(path) as part:
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
        """Read the header of ``arr_0``.

        Raises:
            StageError: there is no such array, or it does not hold at least 2 colour images in uint8.
        """
        self.path = path
        with self._open() as (_, shape):
            self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, first: int, end: int) -> NDArray[np.uint8]:
        """Return images ``first`` to ``end - 1``: (end - first, H, W, 3) uint8."""
        each = int(np.prod(self.shape[1:]))
        with self._open() as (file, _):
            file.seek(file.tell() + first * each)
            data = file.read((end - first) * each)
        if len(data) != (end - first) * each:
            raise StageError(f"{self.path} is truncated: images {first} to {end - 1} are incomplete")
        return np.frombuffer(bytearray(data), np.uint8).reshape(
            end - first, *self.shape[1:]
        )  # writable, as torch wants

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[BinaryIO, tuple[int, ...]]]:
        """Yield the member, positioned at its first pixel, and its shape."""
        with open_npz(self.path) as archive, open_array(archive, IMAGES) as (file, header):
            shape, in_columns, kind = header
            if len(shape) != 4 or shape[3] != 3 or kind != np.uint8 or in_columns:
                raise StageError(
                    f"{self.path}: {IMAGES} is {shape} {kind}; colour images, (n, H, W, 3) uint8, are needed"
                )
            if shape[0] < 2:
                raise StageError(f"{self.path} holds {shape[0]} images; a reference needs at least 2")
            if not 0 < shape[1] * shape[2] <= LARGEST_IMAGE:
                raise StageError(f"{self.path}: its images are {shape[1]}×{shape[2]}; that size cannot be scored")
            if archive.getinfo(f"{IMAGES}.npy").file_size < math.prod(shape):
                raise StageError(f"{self.path} is truncated: it is too small for {shape[0]} images")
            yield file, shape


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an ``.npz`` file for the block.

    Raises:
        StageError: it is missing or damaged; or the block reads something damaged, encrypted or in an unknown format.
    """
    if not path.exists():
        raise StageError(f"there is no file {path}")
    if not path.is_file():
        raise StageError(f"{path} is not a regular file; an .npz file is needed")
    try:
        archive = zipfile.ZipFile(path)
    except UNREADABLE as error:
        raise StageError(f"{path} is not an .npz file: {_reason(error)}") from error
    with archive:
        try:
            yield archive
        except StageError:
            raise
        except UNREADABLE as error:
            raise StageError(f"{path} cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return an error's message in one short line, escaped because it may quote the file."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error  # a KeyError quotes its text
    return shown(str(text) or type(error).__name__, quote=False)


def array_names(path: Path) -> set[str]:
    """Return the names of the arrays in an ``.npz`` file."""
    with open_npz(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


@contextlib.contextmanager
def open_array(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[BinaryIO, Header]]:
    """Yield an array's member, positioned at its first value, and its header."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        yield file, read(file)  # type: ignore[misc]  # a zip member reads and seeks like a file


def read_floats(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return an array of this shape in float64; arrays of other shapes are refused before they are read.

    Raises:
        StageError: it has another shape, or values that are not finite floating-point numbers.
    """
    with open_array(archive, name) as (file, (stored, in_columns, kind)):
        if stored != shape:
            raise StageError(f"{archive.filename}: {name} is {stored}; {shape} is needed")
        if kind.kind != "f":
            raise StageError(f"{archive.filename}: {name} holds {kind}; floating-point numbers are needed")
        wanted = math.prod(shape) * kind.itemsize
        data = file.read(wanted)
    if len(data) != wanted:
        raise StageError(f"{archive.filename} is truncated: {name} is incomplete")
    values = np.frombuffer(data, kind).reshape(shape, order="F" if in_columns else "C").astype(np.float64)
    if not np.isfinite(values).all():
        raise StageError(f"{archive.filename}: {name} holds numbers that are not finite")
    return values
