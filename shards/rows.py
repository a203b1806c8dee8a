"""The columns of an artifact as arrays, and their two file formats.

| column  | in memory                 | Arrow                       | WebDataset            |
| key     | str                       | string                      | ``json``, field key   |
| label   | int32 (R,)                | int32                       | ``json``, field label |
| codes   | uint16 (R, views, N)      | fixed-size list of uint16   | ``codes.npy``         |
| entropy | float16 (R, views, N)     | fixed-size list of float16  | ``entropy.npy``       |
| starts  | bool (R, views, N)        | fixed-size list of uint8    | ``starts.npy``        |

``starts`` is stored as bits, ``views · N`` per row, packed big-endian (``numpy.packbits``). The files also open without
this package: ``datasets.load_dataset("arrow", …)``, ``webdataset.WebDataset(…)``.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.files import atomic_path, file_sha256
from shards.manifest import Container

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXTENSION: dict[Container, str] = {"arrow": ".arrow", "webdataset": ".tar"}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Images of one shard; only patches have the last two columns."""

    keys: list[str]
    labels: NDArray[np.int32]  # (R,)
    codes: NDArray[np.uint16]  # (R, views, N)
    entropy: NDArray[np.float16] | None = None  # (R, views, N), nats
    starts: NDArray[np.bool_] | None = None  # (R, views, N)

    def __len__(self) -> int:
        return len(self.keys)


def write_shard(path: Path, rows: Rows, container: Container) -> str:
    """Write a shard atomically and return the SHA-256 of its bytes, which depend only on ``rows``."""
    with atomic_path(path, unlocked=True) as part:
        with open(part, "wb") as file:
            (_write_arrow if container == "arrow" else _write_tar)(file, rows)
        return file_sha256(part)


def pack_starts(starts: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return boundaries (R, views, N) bool as (R, ceil(views · N / 8)) uint8, big-endian bits."""
    rows, views, n_tokens = starts.shape
    return np.packbits(starts.reshape(rows, views * n_tokens), axis=1, bitorder="big")


def unpack_starts(packed: NDArray[np.uint8], views: int, n_tokens: int) -> NDArray[np.bool_]:
    """Return packed boundaries as (R, views, N) bool; the inverse of :func:`pack_starts`."""
    bits = np.unpackbits(packed, axis=1, count=views * n_tokens, bitorder="big")
    return bits.view(np.bool_).reshape(len(packed), views, n_tokens)


def _write_arrow(file: Any, rows: Rows) -> None:
    import pyarrow as pa

    def fixed(array: NDArray[Any]) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), int(np.prod(array.shape[1:])))

    columns = {
        "key": pa.array(rows.keys, pa.string()),
        "label": pa.array(rows.labels, pa.int32()),
        "codes": fixed(rows.codes),
    }
    if rows.entropy is not None and rows.starts is not None:
        columns |= {"entropy": fixed(rows.entropy), "starts": fixed(pack_starts(rows.starts))}
    batch = pa.record_batch(columns)
    with pa.ipc.new_file(file, batch.schema) as writer:  # one record batch, so that it maps without copies
        writer.write_batch(batch)


def _write_tar(file: Any, rows: Rows) -> None:
    from webdataset import TarWriter

    packed = None if rows.starts is None else pack_starts(rows.starts)
    with TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:  # a float mtime doubles the headers
        for i, key in enumerate(rows.keys):
            sample = {
                "__key__": f"{i:08d}",  # the image's key may hold dots and slashes, which a tar interprets
                "json": json.dumps({"key": key, "label": int(rows.labels[i])}, ensure_ascii=False).encode(),
                "codes.npy": _npy(rows.codes[i]),
            }
            if rows.entropy is not None and packed is not None:
                sample |= {"entropy.npy": _npy(rows.entropy[i]), "starts.npy": _npy(packed[i])}
            writer.write(sample)


def _npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()
