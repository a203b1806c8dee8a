"""Images in a column of a table: Parquet and Arrow files, saved datasets, datasets of the Hugging Face Hub.

    source = Table(read_files(["train-00000.parquet"], "train-*.parquet"), location="train-*.parquet")
    source.key(0)                                            # "train/000000000"

They are read with `datasets`. Its conversions and downloads are cached under ``HF_HOME``, never next to the user's
data; the cache of Parquet files is as large as the files.
"""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpar.class_names import nearest
from pipeline.runtime.errors import StageError
from pipeline.sources.decode import MAX_BYTES, TOO_MANY_BYTES, decode_image, read_image
from pipeline.sources.labels import NO_LABEL, Label, number_labels, parse_label
from pipeline.sources.source import (
    IndexedSource,
    UnusableImage,
    choose,
    file_version,
)
from shards.errors import one_line
from shards.manifest import LeftOut

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from numpy.typing import NDArray
    from PIL import Image

LABEL_COLUMNS = ("label", "labels", "cls", "class", "class_id", "class_name", "fine_label", "category", "target")
"""Names of label columns, in order of preference, if no column is a `datasets.ClassLabel`."""


def read_files(files: Sequence[str], data: str) -> DatasetDict:
    """Return the tables in Parquet or Arrow files by split: that of the file name (``test-….parquet``), else ``train``.

    Raises:
        StageError: the files are of two kinds, or one cannot be read.
    """
    import datasets

    kinds = {os.path.splitext(file)[1][1:].lower() for file in files}
    if len(kinds) > 1:
        raise StageError(f"{data}: names files of several kinds ({', '.join(sorted(kinds))}); give one kind")
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(_split_of(os.path.basename(file)), []).append(file)
    return _read(data, lambda: datasets.load_dataset(kinds.pop(), data_files=by_split))


def read_saved(folder: str) -> DatasetDict | Dataset:
    """Return a dataset that ``save_to_disk`` wrote; raise StageError if it cannot be read."""
    import datasets

    return _read(folder, lambda: datasets.load_from_disk(folder))


def read_hub(name: str) -> DatasetDict:
    """Return a dataset of the Hub, from the cache or downloaded; raise StageError if it is unavailable."""
    import datasets

    try:
        return datasets.load_dataset(name)
    except Exception as error:  # from the Hub, the network or datasets
        raise StageError(
            f"{name}: no such file or folder here, and not available as a dataset on the Hugging Face Hub "
            f"({one_line(error)}); check the name and the connection: offline, only the cache (HF_HOME) can be read"
        ) from error


def saved_files(folder: str) -> list[str]:
    """Return the paths of the Arrow files that ``save_to_disk`` wrote, sorted."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "**", "data-*.arrow"), recursive=True))


def hub_folders(name: str) -> list[str]:
    """Return the cache folders of a Hub dataset's files."""
    import datasets
    import huggingface_hub

    repository = "--".join(["datasets", *name.split("/")])
    cache = huggingface_hub.constants.HF_HUB_CACHE
    return [os.path.join(cache, repository), str(datasets.config.EXTRACTED_DATASETS_PATH)]


class Table(IndexedSource):
    """The images in one split of a dataset.

    Args:
        data: a dataset, or one per split.
        location: its name, for the manifest.
        split: the split; None for ``train``, or for the only one.
        image_column: the image column; None to detect it.
        label_column: the label column; None to detect it. Without one, all images have the class ``images``.
        files: the local files, for the listing; empty if there are none.
        folders: folders that may contain images stored as paths; other paths are refused.

    Raises:
        StageError: the split or column does not exist, or is ambiguous.
    """

    def __init__(
        self,
        data: DatasetDict | Dataset,
        *,
        location: str,
        split: str | None = None,
        classes: Sequence[str] = (),
        limit: int | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        files: Sequence[str] = (),
        folders: Sequence[str] = (),
    ) -> None:
        import datasets

        self.location = location
        self._folders = [os.path.realpath(folder) for folder in folders]
        self.split, table = _choose_split(data, split, location)
        self.image_column = _image_column(table, image_column, location)
        self.label_column = _label_column(table, label_column, location)
        # Not decoded by datasets: all sources share one decoder.
        self._images = table.select_columns([self.image_column]).cast_column(
            self.image_column, datasets.Image(decode=False)
        )
        self._file_versions = [file_version(file) for file in files]
        names, labels = _labels(table, self.label_column, location)
        labelled = np.flatnonzero(labels >= 0)
        self.left_out = tuple(LeftOut(self._key(i), NO_LABEL) for i in np.flatnonzero(labels < 0).tolist())
        if not len(labelled):
            raise StageError(f"{location}: " + ("none of its images has a label" if len(labels) else "has no rows"))
        choice = choose(names, labels[labelled], classes=classes, limit=limit)
        self.class_names = choice.class_names
        self._labels = choice.labels
        self._rows = labelled[choice.indices]

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        """Return the split and the row of image ``i``, such as ``train/000000123``."""
        return self._key(int(self._rows[i]))

    def label(self, i: int) -> int:
        """Return the class of image ``i``."""
        return int(self._labels[i])

    def load(self, i: int) -> Image.Image:
        """Return image ``i``, mode RGB; see `IndexedSource.load`."""
        try:
            value = self._images[int(self._rows[i])][self.image_column]
        except Exception as error:  # from pyarrow, fsspec or the system
            raise StageError(
                f"{self.location}: row {self._rows[i]} can no longer be read ({one_line(error)}). Finished shards "
                "are kept: put the data back and run the same command again"
            ) from error
        data, path = (value or {}).get("bytes"), (value or {}).get("path")
        if data is None and path is None:
            raise UnusableImage("no image in its row")
        if data is None:
            return read_image(self._inside(str(path)))
        if len(data) > MAX_BYTES:
            raise UnusableImage(TOO_MANY_BYTES)
        return decode_image(io.BytesIO(data))

    def describe(self) -> dict[str, object]:
        """See `Source.describe`."""
        return {
            "kind": "table",
            "location": self.location,
            "split": self.split,
            "image_column": self.image_column,
            "label_column": self.label_column,
            "images": len(self),
            "listing_sha256": self._listing_sha256,
        }

    def _versions(self) -> list[tuple[int, int]]:
        return self._file_versions

    def _inside(self, path: str) -> str:
        """Return the resolved path of an image stored as a path.

        Raises:
            UnusableImage: it is outside the dataset's folders: a row could name any file of this machine.
        """
        for folder in self._folders:
            resolved = os.path.realpath(os.path.join(folder, path.replace("\0", "")))
            if os.path.commonpath([folder, resolved]) == folder:
                if os.path.exists(resolved) and not os.path.isfile(resolved):
                    raise UnusableImage("not a regular file")
                return resolved
        raise UnusableImage("stored as a path outside the dataset's folder")

    def _key(self, row: int) -> str:
        return f"{self.split}/{row:09d}"


def _read(data: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # from pyarrow, fsspec, datasets or the system
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise StageError(f"{data}: cannot be read as images in a table ({one_line(cause)})") from error


def _split_of(file: str) -> str:
    match = re.match(r"(train|validation|valid|val|test)(?![A-Za-z])", file, re.IGNORECASE)
    return match.group(1).lower() if match else "train"


def _choose_split(data: DatasetDict | Dataset, split: str | None, location: str) -> tuple[str, Dataset]:
    import datasets

    if isinstance(data, datasets.Dataset):
        data = datasets.DatasetDict({str(data.split or "train"): data})
    elif not isinstance(data, datasets.DatasetDict):
        raise StageError(f"{location}: is a {type(data).__name__}, which does not have random access")
    names = sorted(map(str, data))
    chosen = split or (names[0] if len(names) == 1 else "train")
    if chosen not in names:
        if split is None:
            raise StageError(f"{location}: has the splits {', '.join(names)}; choose one with --split")
        raise StageError(f"{location}: no split {split!r}; {nearest(split, names)}")
    return chosen, data[chosen]


def _image_column(table: Dataset, asked: str | None, location: str) -> str:
    import datasets

    if asked is not None:
        return _known_column(table, asked, location)
    features = table.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images = images or [name for name, feature in features.items() if _holds_bytes(feature)]
    if len(images) == 1:
        return images[0]
    if "image" in images:
        return "image"
    which = f"several columns can hold images ({', '.join(images)})" if images else "no column holds images"
    raise StageError(f"{location}: {which}; name one with --image-column; its columns: {', '.join(features)}")


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and _holds_bytes(feature["bytes"])
    return getattr(feature, "dtype", None) in ("binary", "large_binary", "binary_view")


def _label_column(table: Dataset, asked: str | None, location: str) -> str | None:
    import datasets

    if asked is not None:
        return _known_column(table, asked, location)
    features = table.features
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    known = [name for name in LABEL_COLUMNS if name in (classes or features)]
    if classes and not known:
        raise StageError(
            f"{location}: several columns hold labels ({', '.join(classes)}); name one with --label-column"
        )
    return known[0] if known else None


def _known_column(table: Dataset, name: str, location: str) -> str:
    if name not in table.features:
        raise StageError(f"{location}: no column {name!r}; {nearest(name, list(table.features))}")
    return name


def _labels(table: Dataset, column: str | None, location: str) -> tuple[Sequence[str], NDArray[np.int32]]:
    """Return the class names and the label of each row, -1 for none; reads only that column."""
    import datasets

    if column is None:
        return ("images",), np.zeros(len(table), np.int32)
    feature = table.features[column]
    dtype = str(getattr(feature, "dtype", ""))
    if not re.fullmatch(r"u?int\d+|(large_)?string(_view)?", dtype):
        raise StageError(
            f"{location}: column {column!r} holds {dtype or 'nested values'}, which cannot be labels (numbers or text "
            f"can); name another with --label-column; its columns: {', '.join(table.features)}"
        )
    raw: list[Label | None] = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    if isinstance(feature, datasets.ClassLabel):
        labels = np.array([-1 if x is None else x for x in raw], np.int64)
        if labels.max(initial=-1) >= feature.num_classes:
            raise StageError(
                f"{location}: a label is {labels.max()}; column {column!r} names {feature.num_classes} classes"
            )
        return tuple(feature.names), np.maximum(labels, -1).astype(np.int32)
    if "int" in dtype:
        return number_labels(raw, location)
    return number_labels([None if x is None else parse_label(str(x)) for x in raw], location)
