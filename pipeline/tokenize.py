"""``dpar tokenize DATA OUT --tokenizer W``: images to codes.

    manifest = tokenize("photos/", Path("codes"), TokenizeSettings(tokenizer="builtin:photos", image_size=128))

Images that cannot be used are left out, each with its reason in the manifest and in ``left_out.tsv``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpar.tokenizer import VQTokenizer, from_uint8
from pipeline.device import autocast, choose_device, precision_name, rank, world_size
from pipeline.errors import StageError
from pipeline.progress import Progress, Task, stops_with
from pipeline.settings import TokenizeSettings
from pipeline.sources import Source, UnusableImage, open_source
from pipeline.versions import made_by
from pipeline.views import n_views, views
from pipeline.weights import fingerprint_of, load_tokenizer
from shards.build import ArtifactBuild
from shards.manifest import LeftOut, Manifest, ShardInfo
from shards.rows import Rows

DECODED_AHEAD = 64  # images waiting for the encoder, at most


def tokenize(data: str, out: Path, settings: TokenizeSettings, progress: Progress | None = None) -> Manifest | None:
    """Encodes every image of ``data`` and writes a codes artifact to ``out``.

    Any number of processes may share the work (``torchrun``); running it again goes on where it stopped.

    Returns:
        The artifact's manifest; None where other processes have shards still to write.

    Raises:
        StageError, ModelError, ArtifactError: data, weights, output or settings cannot be used.
        Stopped: the user pressed Ctrl-C.
    """
    progress = progress or Progress()
    source = open_source(data, split=settings.split, classes=settings.classes, limit=settings.limit)
    tokenizer = load_tokenizer(settings.tokenizer)
    config = tokenizer.config
    if config.codebook_size > 2**16:
        raise StageError(f"the tokenizer has {config.codebook_size} codes; artifacts store up to {2**16}")
    if settings.image_size % config.downsampling:
        raise StageError(
            f"--image-size is {settings.image_size}; this tokenizer needs a multiple of {config.downsampling}"
        )
    side = settings.image_size // config.downsampling
    n_views_each = n_views(settings.views, settings.crop_range)
    device = choose_device(settings.device)
    decides: dict[str, Any] = {
        "data": data,
        "split": settings.split,
        "classes": list(settings.classes),
        "limit": settings.limit,
        "listing": source.describe()["listing_sha256"],
        "image_size": settings.image_size,
        "views": settings.views,
        "crop_range": list(settings.crop_range),
        "container": settings.container,
        "shard_size": settings.shard_size,
        "tokenizer": fingerprint_of(settings.tokenizer),
        "precision": precision_name(device, settings.precision),
    }
    n_shards = -(-len(source) // settings.shard_size)
    build = ArtifactBuild(
        out, settings=decides, n_shards=n_shards, container=settings.container, overwrite=settings.overwrite
    )
    encoder = CodeEncoder(tokenizer.to(device), settings, n_views_each)
    keeps = f"Stopped. Finished shards are kept in {out}; run the same command again to go on."
    with stops_with(keeps), progress.task("tokenize", len(source), "images") as task:
        for index in build.todo(rank(), world_size()):
            first = index * settings.shard_size
            rows, left_out = encoder.encode(source, range(first, min(first + settings.shard_size, len(source))), task)
            if index == 0:
                left_out = [LeftOut(key=item.key, reason=item.reason) for item in source.left_out] + left_out
            build.add(index, rows, left_out=left_out)

    def make_manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        left = [item for shard in shards for item in shard.left_out]
        n_rows = sum(shard.rows for shard in shards)
        if n_rows == 0:
            reasons = "; ".join(f"{item.key}: {item.reason}" for item in left[:3])
            raise StageError(f"none of the {len(source)} images of {data} can be used ({reasons} …)")
        return Manifest(
            kind="codes",
            container=settings.container,
            grid=(side, side),
            codebook_size=config.codebook_size,
            views=n_views_each,
            class_names=source.class_names,
            rows=n_rows,
            shards=shards,
            settings=decides,
            source=source.describe(),
            tokenizer={"path": settings.tokenizer, "fingerprint": decides["tokenizer"]},
            left_out=len(left),
            made_by=made_by(),
        )

    return build.finish(make_manifest)


class CodeEncoder:
    """Decodes, crops and encodes images, the first two in threads ahead of the third."""

    def __init__(self, tokenizer: VQTokenizer, settings: TokenizeSettings, n_views_each: int) -> None:
        self.tokenizer, self.settings, self.n_views = tokenizer, settings, n_views_each
        self.device = tokenizer.quantize.embedding.weight.device

    def encode(self, source: Source, images: range, task: Task) -> tuple[Rows, list[LeftOut]]:
        """Codes of these images, in order, and what could not be used."""
        kept: list[int] = []
        left_out: list[LeftOut] = []
        codes: list[NDArray[np.uint16]] = []
        waiting: list[NDArray[np.uint8]] = []

        def flush() -> None:
            if waiting:
                codes.append(self._codes(np.concatenate(waiting)))
                waiting.clear()

        for i, crops in self._crops(source, images):
            if isinstance(crops, UnusableImage):
                if self.settings.strict:
                    raise StageError(f"{source.key(i)}: {crops.reason}. Without --strict it would be left out")
                left_out.append(LeftOut(key=source.key(i), reason=crops.reason))
            else:
                kept.append(i)
                waiting.append(crops)
            if len(waiting) * self.n_views >= self.settings.batch:
                flush()
            task.advance(1, f"{len(left_out)} left out" if left_out else "")
        flush()
        n_tokens = (self.settings.image_size // self.tokenizer.config.downsampling) ** 2
        shape = (len(kept), self.n_views, n_tokens)
        rows = Rows(
            keys=[source.key(i) for i in kept],
            labels=np.array([source.label(i) for i in kept], np.int32),
            codes=(np.concatenate(codes) if codes else np.zeros(0, np.uint16)).reshape(shape),
        )
        return rows, left_out

    def _crops(self, source: Source, images: range) -> Iterator[tuple[int, NDArray[np.uint8] | UnusableImage]]:
        """Each image's views, (views, size, size, 3) uint8, or why it has none; in order."""
        s = self.settings

        def crop(i: int) -> NDArray[np.uint8] | UnusableImage:
            try:
                return views(source.load(i), s.image_size, s.views, s.crop_range)
            except UnusableImage as error:
                return error

        with ThreadPoolExecutor(s.workers) as pool:
            ahead: deque[tuple[int, Future[NDArray[np.uint8] | UnusableImage]]] = deque()
            try:
                for i in images:
                    ahead.append((i, pool.submit(crop, i)))
                    if len(ahead) >= DECODED_AHEAD:
                        first, future = ahead.popleft()
                        yield first, future.result()
                for first, future in ahead:
                    yield first, future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    @torch.no_grad()
    def _codes(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """Codes (n, N) of crops (n, size, size, 3)."""
        found = []
        for chunk in np.array_split(pixels, max(1, -(-len(pixels) // self.settings.batch))):
            with autocast(self.device, self.settings.precision):
                found.append(self.tokenizer.encode(from_uint8(torch.from_numpy(chunk).to(self.device))))
        return torch.cat(found).cpu().numpy().astype(np.uint16)
