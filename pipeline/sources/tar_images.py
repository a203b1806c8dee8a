"""Images in local tars, with random access and without unpacking.

    source = TarImages(["ILSVRC2012_img_train.tar"], location="ILSVRC2012_img_train.tar")
    source.load(1_000_000)                                   # one read of the tar

The contents of the tars determine the layout:

- class folders: ``CLASS/picture.jpg`` in one tar or several. Keys and order are those of the unpacked folder;
- ImageNet: a tar with one tar per class (``n01440764.tar``), or the tars of the classes. Keys and order are those of
  the folder of class folders;
- WebDataset: images with a ``cls`` or ``json`` member, in the order of the tars. Keys start with the tar's name.
  Without labels, the first folder of the key is the class.

The listing reads every header, which takes about a minute for ImageNet, and needs about 150 bytes per image.
"""

from __future__ import annotations

import io
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from dpar.class_names import nearest
from pipeline.runtime.errors import StageError
from pipeline.sources.decode import EXTENSIONS, decode_image
from pipeline.sources.folder import check_no_splits, class_name
from pipeline.sources.imagenet import readable, synsets
from pipeline.sources.labels import NO_LABEL, Label, number_labels
from pipeline.sources.locations import stems
from pipeline.sources.samples import holds_samples, key_text, samples
from pipeline.sources.source import (
    IndexedSource,
    choose,
    listing_order,
    normal,
    valid_text,
)
from pipeline.sources.tar import Extent, Member, members, read_member
from shards.files import open_regular
from shards.manifest import LeftOut

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

TWICE = "key occurs twice"  # reason for leaving out the second image with the same key


class TarImages(IndexedSource):
    """The images in local tars.

    Args:
        tars: paths, each once.
        location: the name of all of them, for the manifest.
        split: the folder that contains the class folders in the tars; not for WebDataset tars.

    Raises:
        StageError: a tar cannot be read completely, or there are no images.
    """

    def __init__(
        self,
        tars: Sequence[str],
        *,
        location: str,
        split: str | None = None,
        classes: Sequence[str] = (),
        limit: int | None = None,
    ) -> None:
        self.location, self.split = location, split
        with _opened(tars[0]) as file:
            is_webdataset = holds_samples(file, tars[0])
        self.kind = "webdataset" if is_webdataset else "tar"
        listing = _Listing(tars, location)
        if is_webdataset:
            if split is not None:
                raise StageError(f"{location}: WebDataset tars have no splits; give only the tars of {split!r}")
            names, labels = listing.samples()
        else:
            names, labels = listing.class_folders(split)
        choice = choose(names, labels, classes=classes, limit=limit)
        self.class_names = choice.class_names
        self.left_out = tuple(sorted(listing.left_out, key=lambda x: (x.key, x.reason)))
        self._labels = choice.labels
        self._tars, self._tar_versions = list(tars), listing.versions
        self._keys = [listing.keys[i] for i in choice.indices.tolist()]
        self._tar, self._offset, self._size = (
            np.asarray(column)[choice.indices] for column in (listing.tar, listing.offset, listing.size)
        )

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        """Return the name of image ``i``: its path in the tars, or the tar's name and the sample's key."""
        return self._keys[i]

    def label(self, i: int) -> int:
        """Return the class of image ``i``."""
        return int(self._labels[i])

    def load(self, i: int) -> Image.Image:
        """Return image ``i``, mode RGB; see `IndexedSource.load`."""
        tar = int(self._tar[i])
        data = read_member(self._tars[tar], self._tar_versions[tar], int(self._offset[i]), int(self._size[i]))
        return decode_image(io.BytesIO(data))

    def _versions(self) -> list[tuple[int, ...]]:
        # a built-in tar has another modification time in every installation
        tars = [] if self.location.startswith("builtin:") else self._tar_versions
        return [*tars, *zip(self._tar.tolist(), self._offset.tolist(), self._size.tolist(), strict=True)]


class _Listing:
    """The location of each image: ``keys[i]`` is at ``offset[i]`` of tar ``tar[i]``, ``size[i]`` bytes long."""

    def __init__(self, tars: Sequence[str], location: str) -> None:
        self.tars, self.location = tars, location
        self.versions: list[tuple[int, int]] = []
        self.keys: list[str] = []
        self.tar, self.offset, self.size = array("i"), array("q"), array("q")
        self.left_out: list[LeftOut] = []

    def class_folders(self, split: str | None) -> tuple[Sequence[str], NDArray[np.int32]]:
        """List paths like a folder; return the class names and the label of each image."""
        names = stems(self.tars)
        is_imagenet = all(name in synsets() for name in names)  # one tar per class
        for tar, path in enumerate(self.tars):
            with _opened(path) as file:
                self.versions.append(file.version)
                self._walk(tar, file, path, f"{names[tar]}/" if is_imagenet else "")
        self._check_any()
        if split is None:
            check_no_splits(self.keys, self.location, "")
        else:
            self._enter(split)
        self._keep(sorted(range(len(self.keys)), key=lambda i: listing_order(self.keys[i])))
        if any("/" in key for key in self.keys):
            stray = "image outside the class folders: it has no class"
            self.left_out += [LeftOut(valid_text(key), stray) for key in self.keys if "/" not in key]
            self._keep([i for i, key in enumerate(self.keys) if "/" in key])
            classes = sorted({class_name(key) for key in self.keys})
            index = {name: i for i, name in enumerate(classes)}
            labels = np.array([index[class_name(key)] for key in self.keys], np.int32)
        else:
            classes, labels = [normal(names[0]) if len(names) == 1 else "images"], np.zeros(len(self.keys), np.int32)
        self.keys = [key if key.isascii() else valid_text(key) for key in self.keys]
        return readable(classes), labels[self._drop_repeated()]

    def samples(self) -> tuple[Sequence[str], NDArray[np.int32]]:
        """List WebDataset samples; return the class names and the label of each image."""
        raw: list[Label | None] = []
        folders: list[str | None] = []
        for tar, (path, stem) in enumerate(zip(self.tars, stems(self.tars), strict=True)):
            with _opened(path) as file:
                self.versions.append(file.version)
                for sample in samples(file, path):
                    if isinstance(sample, LeftOut):
                        self.left_out.append(LeftOut(key_text(stem, sample.key), sample.reason))
                    elif sample.problem is not None:
                        self.left_out.append(LeftOut(key_text(stem, sample.key), sample.problem))
                    else:
                        self._add(tar, key_text(stem, sample.key), sample.image)
                        raw.append(sample.label)
                        folders.append(class_name(sample.key) if "/" in sample.key else None)
        self._check_any()
        if all(label is None for label in raw):
            raw = list(folders)
        if all(label is None for label in raw):
            names: Sequence[str] = ("images",)
            labels = np.zeros(len(raw), np.int32)
        else:
            names, labels = number_labels(raw, self.location)
        labels = labels[self._drop_repeated()]
        self.left_out += [LeftOut(self.keys[i], NO_LABEL) for i in np.flatnonzero(labels < 0).tolist()]
        labelled = np.flatnonzero(labels >= 0).tolist()
        if not labelled:
            raise StageError(f"{self.location}: none of its {len(labels)} images has a label")
        self._keep(labelled)
        return names, labels[labelled]

    def _walk(self, tar: int, file: Extent, path: str, prefix: str, start: int = 0) -> None:
        for member in members(file, path):
            if isinstance(member, LeftOut):
                self.left_out.append(LeftOut(prefix + member.key, member.reason))
                continue
            name = member.name
            if name.endswith(".tar") and not prefix and "/" not in name:
                inner = file.part(member.offset, member.size)
                self._walk(tar, inner, f"{path}: {valid_text(name)}", f"{name.removesuffix('.tar')}/", member.offset)
            elif os.path.splitext(name)[1].lower() in EXTENSIONS:
                self._add(tar, prefix + name, Member(name, start + member.offset, member.size))

    def _enter(self, split: str) -> None:
        """Keep the contents of one folder, with keys relative to it."""
        folders = {class_name(key) for key in self.keys if "/" in key}
        if normal(split) not in folders:
            raise StageError(
                f"{self.location}: no folder for the split {split!r} in it; {nearest(split, sorted(folders))}"
            )
        self._keep([i for i, key in enumerate(self.keys) if "/" in key and class_name(key) == normal(split)])
        self.keys = [key.partition("/")[2] for key in self.keys]

    def _add(self, tar: int, key: str, member: Member | None) -> None:
        assert member is not None
        self.keys.append(key)
        self.tar.append(tar)
        self.offset.append(member.offset)
        self.size.append(member.size)

    def _keep(self, indices: list[int]) -> None:
        self.keys = [self.keys[i] for i in indices]
        for name in ("tar", "offset", "size"):
            column: array[int] = getattr(self, name)
            setattr(self, name, array(column.typecode, np.asarray(column)[indices].tobytes()))

    def _drop_repeated(self) -> list[int]:
        """Keep the first image of each key; return the indices of those kept."""
        seen: set[str] = set()
        kept = []
        for i, key in enumerate(self.keys):
            if key in seen:
                self.left_out.append(LeftOut(key, TWICE))
            else:
                seen.add(key)
                kept.append(i)
        self._keep(kept)
        return kept

    def _check_any(self) -> None:
        if not self.keys:
            reasons = "".join(f"; left out {x.key}: {x.reason}" for x in self.left_out[:1])
            raise StageError(
                f"{self.location}: no images in {len(self.tars)} tars{reasons}; looked for CLASS/picture.jpg, "
                "CLASS.tar in a tar, and WebDataset samples"
            )


@contextmanager
def _opened(path: str) -> Iterator[Extent]:
    try:
        file = open_regular(path)
    except OSError as error:
        raise StageError(f"{path}: {error.strerror or error}") from error
    with file:
        status = os.fstat(file.fileno())
        yield Extent(file.fileno(), 0, status.st_size, status.st_mtime_ns)
