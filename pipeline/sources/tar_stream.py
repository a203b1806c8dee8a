"""WebDataset tars read sequentially over the network, without storing them or listing them in advance.

    source = TarStream(["https://example.org/train-000.tar", …], location="https://example.org/train-{000..146}.tar")
    for item in source.part(3, part_size=1): ...             # the images of the fourth tar

A part is a tar, so tars of 1,000 to 10,000 images give good shards.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from pipeline.runtime.errors import StageError
from pipeline.sources.decode import decode_image
from pipeline.sources.labels import MAX_CLASSES, NO_LABEL, decimal_names
from pipeline.sources.locations import check_named_once, stems
from pipeline.sources.remote import RemoteFile, look_up
from pipeline.sources.samples import Sample, key_text, samples
from pipeline.sources.source import Item, Source
from pipeline.sources.tar_images import TWICE
from shards.manifest import LeftOut
from shards.storage import WAITS

if TYPE_CHECKING:
    from PIL import Image


class TarStream(Source):
    """The images of WebDataset tars at URLs. Labels must be numbers: text cannot be numbered before all tars are read.

    Args:
        urls: URLs of the tars, each once.
        location: the name of all of them, for the manifest.
        classes: numbers of the classes to keep, renumbered from 0 in their order; empty for all.
        limit: maximum number of images: the first of each tar, divided evenly.
        waits: seconds to wait before each retry of a failed read.

    Raises:
        StageError: a tar does not exist, or a class or the limit is invalid.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        location: str,
        classes: Sequence[str] = (),
        limit: int | None = None,
        waits: Sequence[float] = WAITS,
    ) -> None:
        self.location, self.limit = location, limit
        if limit is not None and limit < 1:
            raise StageError(f"the limit on images is {limit}; it must be at least 1 (omit it for all images)")
        for name in classes:
            if not (name.isascii() and name.isdecimal()):
                raise StageError(
                    f"no class {name!r} in {location}: the classes of tars read over the network are numbers"
                )
        self._classes = sorted({int(name) for name in classes})
        self.class_names = tuple(map(str, self._classes))
        check_named_once(urls, location)
        self._stems = stems(urls)
        self._waits = tuple(waits)
        with ThreadPoolExecutor(16) as pool:
            self._remotes = list(pool.map(functools.partial(look_up, waits=self._waits), urls))

    @property
    def n_items(self) -> None:
        """None: unknown before all tars are read."""
        return None

    def n_parts(self, part_size: int) -> int:
        """Return the number of tars, for any ``part_size``."""
        return len(self._remotes)

    def part(self, index: int, part_size: int) -> Iterator[Item | LeftOut]:
        """Yield the images of tar ``index`` in order; also raise StageError for a label that is text."""
        n_tars = len(self._remotes)
        limit = None if self.limit is None else self.limit // n_tars + (index < self.limit % n_tars)
        count = 0
        if limit == 0:
            return
        for item in self._items(index):
            yield item
            count += isinstance(item, Item)
            if count == limit:
                return

    def name_classes(self, n_labels: int) -> tuple[str, ...]:
        """Return the numbers of the classes."""
        return self.class_names or decimal_names(n_labels)

    def find(self, keys: Collection[str]) -> dict[str, Callable[[], Image.Image]]:
        """See `Source.find`; reads only the tars that the keys name, and keeps the images' bytes."""
        loaders: dict[str, Callable[[], Image.Image]] = {}
        for index, stem in enumerate(self._stems):
            missing = {key for key in keys if key.startswith(f"{stem}/")}
            for item in self._items(index) if missing else ():
                if isinstance(item, Item) and item.key in missing:
                    loaders[item.key] = item.load
                    missing.remove(item.key)
                if not missing:
                    break
        return loaders

    def describe(self) -> dict[str, object]:
        """See `Source.describe`; the listing consists of the tars and their versions."""
        listing = "".join(f"{remote.url}\0{remote.size}\0{remote.version}\0" for remote in self._remotes)
        return {
            "kind": "webdataset-stream",
            "location": self.location,
            "split": None,
            "images": None,
            "listing_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        }

    def _items(self, index: int) -> Iterator[Item | LeftOut]:
        remote = self._remotes[index]
        file = RemoteFile(remote, self._waits)
        seen: set[str] = set()
        for sample in samples(file, remote.url, keep_images=True):
            key = key_text(self._stems[index], sample.key)
            if isinstance(sample, LeftOut):
                yield LeftOut(key, sample.reason)
            elif key in seen:
                yield LeftOut(key, TWICE)
            else:
                seen.add(key)
                item = self._item(key, sample, remote.url)
                if item is not None:
                    yield item
        file.check_unchanged()

    def _item(self, key: str, sample: Sample, url: str) -> Item | LeftOut | None:
        """Return a sample as an image with a label; None if its class is not selected."""
        label = sample.label
        if sample.problem is not None:
            return LeftOut(key, sample.problem)
        if isinstance(label, str):
            raise StageError(
                f"{url}: the label of {sample.key!r} is text ({label!r}), which can only be numbered when all tars "
                "have been read; download the tars and give their paths, or write class numbers into cls"
            )
        if label is None or label < 0:
            return LeftOut(key, NO_LABEL)
        if label >= MAX_CLASSES:
            raise StageError(f"{url}: the label of {sample.key!r} is {label}; class numbers are below {MAX_CLASSES}")
        if self._classes:
            if label not in self._classes:
                return None
            label = self._classes.index(label)
        return Item(key, label, functools.partial(_decode, sample.data))


def _decode(data: bytes) -> Image.Image:
    return decode_image(io.BytesIO(data))
