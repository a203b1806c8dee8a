"""WebDataset tars read over the network, each once and in order: nothing is stored, nothing is listed beforehand.

    source = TarStream(["https://example.org/train-000.tar", …], location="https://example.org/train-{000..146}.tar")
    for item in source.part(3, part_size=1): ...             # the images of the fourth tar

A part is a tar, so tars of 1,000 to 10,000 images make good shards.
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
from pipeline.sources.labels import MOST_CLASSES, NO_LABEL, decimal_names
from pipeline.sources.locations import check_named_once, stems
from pipeline.sources.remote import WAITS, RemoteFile, look_up
from pipeline.sources.samples import Sample, key_text, samples
from pipeline.sources.source import Item, Source
from pipeline.sources.tar_images import TWICE
from shards.manifest import LeftOut

if TYPE_CHECKING:
    from PIL import Image


class TarStream(Source):
    """The images of WebDataset tars at URLs. Labels are numbers, as the tars have them: text cannot be numbered unread.

    Args:
        urls: of the tars, each once.
        location: what names them all, for the manifest.
        classes: numbers of the classes to keep, renumbered from 0 in their order; none for all.
        limit: most images in total, shared evenly by the tars: the first of each.
        waits: seconds to wait before each new try of a read that broke off.

    Raises:
        StageError: a tar that is not there, or a class or limit that can be none.
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
            raise StageError(f"the limit on images is {limit}; it must be at least 1 (leave it out for all images)")
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
        """Not known before all is read."""
        return None

    def n_parts(self, part_size: int) -> int:
        """The number of tars, whatever ``part_size`` is."""
        return len(self._remotes)

    def part(self, index: int, part_size: int) -> Iterator[Item | LeftOut]:
        """The images of tar ``index``, in order. Raises StageError also for labels that are text."""
        given = len(self._remotes)
        most = None if self.limit is None else self.limit // given + (index < self.limit % given)
        yielded = 0
        if most == 0:
            return
        for item in self._items(index):
            yield item
            yielded += isinstance(item, Item)
            if yielded == most:
                return

    def name_classes(self, n_labels: int) -> tuple[str, ...]:
        """The numbers of the classes."""
        return self.class_names or decimal_names(n_labels)

    def find(self, keys: Collection[str]) -> dict[str, Callable[[], Image.Image]]:
        """See `Source.find`; reads only the tars that the keys name, and keeps the images' bytes."""
        wanted = set(keys)
        found: dict[str, Callable[[], Image.Image]] = {}
        for index, stem in enumerate(self._stems):
            missing = {key for key in wanted if key.startswith(f"{stem}/")}
            for item in self._items(index) if missing else ():
                if isinstance(item, Item) and item.key in missing:
                    found[item.key] = item.load
                    missing.remove(item.key)
                if not missing:
                    break
        return found

    def describe(self) -> dict[str, object]:
        """What a manifest says of this source. The listing is the tars and their versions: no image was read for it."""
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
        """The sample as an image with a label; None where its class is not among those chosen."""
        label = sample.label
        if sample.problem is not None:
            return LeftOut(key, sample.problem)
        if isinstance(label, str):
            raise StageError(
                f"{url}: the label of {sample.key!r} is text ({label!r}), which gets its number only when all tars are "
                "read; download the tars and give their paths, or write class numbers into cls"
            )
        if label is None or label < 0:
            return LeftOut(key, NO_LABEL)
        if label >= MOST_CLASSES:
            raise StageError(f"{url}: the label of {sample.key!r} is {label}; class numbers are below {MOST_CLASSES}")
        if self._classes:
            if label not in self._classes:
                return None
            label = self._classes.index(label)
        return Item(key, label, functools.partial(_decode, sample.data))


def _decode(data: bytes) -> Image.Image:
    return decode_image(io.BytesIO(data))
