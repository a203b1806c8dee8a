"""The crops of a source's images in the order of its parts, prefetched by threads that decode and crop.

with closing(crop_stream(iter([0, 3]), source, settings)) as stream:
    for index, image in stream: ...                      # Crops or LeftOut, then None at the end of each part
"""

from __future__ import annotations

import os
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.runtime.prefetch import prefetch
from pipeline.settings.artifacts import TokenizeSettings
from pipeline.sources.crops import n_views, views
from pipeline.sources.decode import budget
from pipeline.sources.source import Item, Source, UnusableImage
from shards.manifest import LeftOut

BYTES_AHEAD = 256 * 2**20  # most bytes of prefetched crops
IMAGES_AHEAD = 512  # most prefetched images: undecoded images of a stream also occupy memory
MAX_WORKERS = 16  # more threads would wait for the GIL


@dataclass(frozen=True)
class Crops:
    """An image and its views, (views, size, size, 3) uint8, or why it has none."""

    key: str
    label: int
    pixels: Future[NDArray[np.uint8] | UnusableImage]


def crop_stream(
    parts: Generator[int, None, None], source: Source, settings: TokenizeSettings
) -> Generator[tuple[int, Crops | LeftOut | None], None, None]:
    """Yield the images of each part with the part's index, and None at its end.

    Args:
        parts: indices of parts of ``settings.shard_size`` images; pulled one at a time, in another thread.
        source: of the images.
        settings: views, image size and number of threads.
    """
    bytes_per_image = n_views(settings.views, settings.crop_range) * settings.image_size**2 * 3
    workers = settings.workers or default_workers()

    def crop(item: Item) -> NDArray[np.uint8] | UnusableImage:
        try:
            with budget.in_use():
                return views(item.load(), settings.image_size, settings.views, settings.crop_range)
        except UnusableImage as error:
            return error

    def images() -> Generator[tuple[int, Crops | LeftOut | None], None, None]:
        with closing(parts), ThreadPoolExecutor(workers) as pool:
            try:
                for index in parts:
                    for item in source.part(index, settings.shard_size):
                        if isinstance(item, Item):
                            yield index, Crops(item.key, item.label, pool.submit(crop, item))
                        else:
                            yield index, item
                    yield index, None
            except GeneratorExit:  # the consumer stopped early
                pool.shutdown(cancel_futures=True)
                raise

    return prefetch(images(), limit=max(workers, min(IMAGES_AHEAD, BYTES_AHEAD // bytes_per_image)))


def default_workers() -> int:
    """Return this process's share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
