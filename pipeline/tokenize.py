"""``dpar tokenize DATA OUT --tokenizer W``: images to codes.

    manifest = tokenize("photos/", Path("codes"), TokenizeSettings(tokenizer="builtin:photos", image_size=128))

Images that cannot be used are left out, each with its reason in the manifest and in ``left_out.tsv``.

Decoding, encoding and writing overlap across shard boundaries: threads read, decode and crop images; this thread
encodes them; one thread hashes and writes the shard before. A batch never holds images of two shards, so a shard's
bytes are a function of its images alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from dpar.tokenizer import VQTokenizer, from_uint8, psnr, to_uint8
from pipeline.runs.weights import fingerprint_of, load_tokenizer
from pipeline.runtime.device import autocast, choose_device, precision_name, rank, world_size
from pipeline.runtime.errors import StageError
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import Progress, Task, stops_with
from pipeline.runtime.provenance import made_by
from pipeline.scoring.reconstruction_sample import (
    SHARD_KEY,
    merge_reconstruction,
    reconstruction_lines,
    sampled_positions,
)
from pipeline.settings import TokenizeSettings, identity
from pipeline.sources import Source, UnusableImage, open_source
from pipeline.sources.crops import n_views, views
from pipeline.sources.decode import budget
from pipeline.sources.holdout import split_holdout
from pipeline.sources.source import Item
from shards.manifest import MANIFEST, LeftOut, Manifest, ShardInfo
from shards.rows import Rows
from shards.writer import LEFT_OUT, ArtifactBuild

CROPS_AHEAD = 256 * 2**20  # bytes of crops that wait for the encoder, at most
IMAGES_AHEAD = 512  # also at most: undecoded images of a stream hold bytes too
MOST_WORKERS = 16  # threads past these wait for each other in Python


def tokenize(data: str, out: Path, settings: TokenizeSettings, progress: Progress | None = None) -> Manifest | None:
    """Encodes every image of ``data`` and writes a codes artifact to ``out``.

    With ``settings.holdout`` the held-out images go to a second artifact, :func:`holdout_folder` of ``out``.

    Any number of processes may share the work (``torchrun``, or the same command several times); running it again
    goes on where it stopped.

    Returns:
        The manifest of ``out``; None where other processes have shards still to write.

    Raises:
        StageError, ModelError, ArtifactError: data, weights, output or settings cannot be used.
        Stopped: the user pressed Ctrl-C.
    """
    progress = progress or Progress()
    source = open_source(
        data,
        split=settings.split,
        classes=settings.classes,
        limit=settings.limit,
        image_column=settings.image_column,
        label_column=settings.label_column,
    )
    tokenizer = load_tokenizer(settings.tokenizer)
    config = tokenizer.config
    if config.codebook_size > 2**16:
        raise StageError(f"the tokenizer has {config.codebook_size} codes; artifacts store up to {2**16}")
    if settings.image_size % config.downsampling:
        raise StageError(
            f"--image-size is {settings.image_size}; this tokenizer needs a multiple of {config.downsampling}"
        )
    parts: list[tuple[Source, Path]] = [(source, out)]
    if settings.holdout is not None:
        training, held_out = split_holdout(source, settings.holdout, settings.seed, settings.group_regex)
        parts = [(training, out), (held_out, holdout_folder(out))]
    tokenizer.to(choose_device(settings.device))
    fingerprint = fingerprint_of(settings.tokenizer, "tokenizer")
    with contextlib.ExitStack() as stack:
        builds = []
        for part, folder in parts:  # all of them, so that one that is refused is refused before any work
            decides = decisive(data, part, fingerprint, settings)
            builds.append(open_build(folder, part, decides, settings))
            stack.callback(builds[-1].close)
        manifests = [
            encode_source(data, part, build, tokenizer, settings, progress)
            for (part, _), build in zip(parts, builds, strict=True)
        ]
    return manifests[0]


def holdout_folder(out: Path) -> Path:
    """The directory of the held-out part, beside ``out``."""
    named = out if out.name not in ("", "..") else out.resolve()
    return named.with_name(f"{named.name}-holdout")


def decisive(data: str, source: Source, fingerprint: str, settings: TokenizeSettings) -> dict[str, Any]:
    """The settings that decide an artifact's bytes, with the tokenizer's fingerprint and the listing's."""
    described = source.describe()
    decides = identity(settings) | {
        "data": data,
        "listing": described["listing_sha256"],
        "tokenizer": fingerprint,
        "precision": precision_name(choose_device(settings.device), settings.precision),
    }
    return decides | ({"holdout": described["holdout"]} if "holdout" in described else {})


def open_build(folder: Path, source: Source, decides: dict[str, Any], settings: TokenizeSettings) -> ArtifactBuild:
    """The artifact of ``source`` in ``folder``, to be written or finished."""
    return ArtifactBuild(
        folder,
        settings=decides,
        n_shards=source.n_parts(settings.shard_size),
        container=settings.container,
        overwrite=settings.overwrite,
    )


def encode_source(
    data: str,
    source: Source,
    build: ArtifactBuild,
    tokenizer: VQTokenizer,
    settings: TokenizeSettings,
    progress: Progress,
) -> Manifest | None:
    """Writes what of ``build`` is missing; gives its manifest, or None where other processes have shards to write."""
    out, config = build.folder, tokenizer.config
    side = settings.image_size // config.downsampling
    is_holdout = build.settings.get("holdout", {}).get("part") == "held out"

    def check_strict(shards: Sequence[ShardInfo]) -> None:
        unusable = sum(len(shard.left_out) for shard in shards) - len(source.left_out)
        if settings.strict and unusable:
            raise StageError(
                f"{unusable} images cannot be used, and --strict allows none: an earlier run without it left them "
                f"out of {out} ({out / LEFT_OUT} has the reasons). Mend or remove them, or leave --strict out"
            )

    def make_manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        check_strict(shards)
        left = [item for shard in shards for item in shard.left_out]
        n_rows = sum(shard.rows for shard in shards)
        if n_rows == 0:
            reasons = "; ".join(f"{item.key}: {item.reason}" for item in left[:3])
            raise StageError(f"none of the {source.n_items or len(left)} images of {data} can be used ({reasons} …)")
        return Manifest(
            kind="codes",
            container=settings.container,
            grid=(side, side),
            codebook_size=config.codebook_size,
            views=n_views(settings.views, settings.crop_range),
            class_names=source.name_classes(max(shard.statistics["labels"] for shard in shards)),
            rows=n_rows,
            shards=shards,
            settings=build.settings,
            source=source.describe(),
            tokenizer={"path": settings.tokenizer, "fingerprint": build.settings["tokenizer"]},
            statistics=merge_reconstruction(shards),
            left_out=len(left),
            made_by=made_by(),
        )

    def report(manifest: Manifest, from_any_process: bool = False) -> None:
        lines = [f"held out: {manifest.rows} images in {out}"] if is_holdout else reconstruction_lines(manifest)
        for line in lines:
            progress.say(line, from_any_process=from_any_process)

    if build.finished is not None:
        check_strict(build.finished.shards)
        report(build.finished)
        return build.finished
    keeps = f"Stopped. Finished shards are kept in {out}; run the same command again to go on."
    with (
        stops_with(keeps),
        CodeEncoder(tokenizer, settings) as encoder,
        progress.task("tokenize holdout" if is_holdout else "tokenize", source.n_items, "images") as task,
    ):
        write_shards(build, source, encoder, settings, task)
    is_last = not (out / MANIFEST).is_file()  # of the processes, as far as this one can tell
    manifest = build.finish(make_manifest)
    if manifest is not None:
        report(manifest, from_any_process=is_last)
    else:
        n = build.remaining()
        progress.say(
            f"{n} {'shard is' if n == 1 else 'shards are'} still being written by other processes; "
            "the last one to finish writes the manifest"
        )
    return manifest


def write_shards(
    build: ArtifactBuild, source: Source, encoder: CodeEncoder, settings: TokenizeSettings, task: Task
) -> None:
    """Writes every shard of ``build`` that is this process's to write."""
    keys: list[str] = []
    labels: list[int] = []
    left_out: list[LeftOut] = []
    sample: dict[int, NDArray[np.uint8]] = {}  # by row of the shard, the crop whose reconstruction is measured
    n_left_out = 0
    position = rank() * build.n_shards // world_size()  # in the round that todo() makes

    @functools.cache
    def positions(index: int) -> set[int]:
        n_shards, size = build.n_shards, settings.shard_size
        return set(sampled_positions(index, n_shards=n_shards, shard_size=size, n_items=source.n_items))

    before: Future[None] | None = None  # the shard that is being written
    with ThreadPoolExecutor(1) as writer, closing(crops_ahead(build, source, settings)) as stream:
        for index, image in stream:
            if before is not None and before.done():
                before.result()  # raises what went wrong, soon
            if source.n_items is not None:
                for i in range(position, position + (index - position) % build.n_shards):
                    first = i % build.n_shards * settings.shard_size
                    task.skip(min(settings.shard_size, source.n_items - first))
            position = index if image is not None else (index + 1) % build.n_shards
            if isinstance(image, Crops):
                pixels = image.pixels.result()
                if isinstance(pixels, UnusableImage):
                    image = LeftOut(key=image.key, reason=pixels.reason)
                else:
                    if len(keys) + len(left_out) in positions(index):
                        sample[len(keys)] = pixels[0].copy()  # or all its views stay in memory
                    encoder.add(pixels)
                    keys.append(image.key)
                    labels.append(image.label)
            if isinstance(image, LeftOut):
                if settings.strict:
                    raise StageError(f"{image.key}: {image.reason}. Without --strict it would be left out")
                left_out.append(image)
                n_left_out += 1
            if image is not None:
                task.advance(1, f"{n_left_out} left out" if n_left_out else "")
                continue
            codes = encoder.end_shard()
            rows = Rows(
                keys=keys,
                labels=np.array(labels, np.int32),
                codes=codes.reshape(len(keys), n_views(settings.views, settings.crop_range), codes.shape[1]),
            )
            if index == 0:
                left_out = [LeftOut(key=item.key, reason=item.reason) for item in source.left_out] + left_out
            statistics: dict[str, Any] = {"labels": max(labels, default=-1) + 1}  # names the classes of a stream
            if sample:
                measured = encoder.reconstruction_psnr(np.stack([*sample.values()]), rows.codes[[*sample], 0])
                statistics[SHARD_KEY] = [round(value, 2) for value in measured]
            if before is not None:
                before.result()  # one at a time: memory is bounded
            before = writer.submit(build.add, index, rows, statistics=statistics, left_out=left_out)
            keys, labels, left_out, sample = [], [], [], {}
        if before is not None:
            before.result()


@dataclass(frozen=True)
class Crops:
    """An image whose views are being made: (views, size, size, 3) uint8, or why it has none."""

    key: str
    label: int
    pixels: Future[NDArray[np.uint8] | UnusableImage]


def crops_ahead(
    build: ArtifactBuild, source: Source, settings: TokenizeSettings
) -> Generator[tuple[int, Crops | LeftOut | None], None, None]:
    """The images of each shard still to write, in order, with the shard's number; None stands at a shard's end.

    They are read, decoded and cropped in threads, as far ahead as memory allows.
    """
    bytes_each = n_views(settings.views, settings.crop_range) * settings.image_size**2 * 3
    workers = settings.workers or default_workers()

    def crop(item: Item) -> NDArray[np.uint8] | UnusableImage:
        try:
            with budget.in_use():
                return views(item.load(), settings.image_size, settings.views, settings.crop_range)
        except UnusableImage as error:
            return error

    def images() -> Generator[tuple[int, Crops | LeftOut | None], None, None]:
        with ThreadPoolExecutor(workers) as pool:
            try:
                for index in build.todo(rank(), world_size()):
                    for item in source.part(index, settings.shard_size):
                        if isinstance(item, Item):
                            yield index, Crops(item.key, item.label, pool.submit(crop, item))
                        else:
                            yield index, LeftOut(key=item.key, reason=item.reason)
                    yield index, None
            except GeneratorExit:  # nobody wants the rest
                pool.shutdown(cancel_futures=True)
                raise

    return prefetch(images(), limit=max(workers, min(IMAGES_AHEAD, CROPS_AHEAD // bytes_each)))


def default_workers() -> int:
    """This process's share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class CodeEncoder:
    """Turns the crops of one shard after another into codes, ``batch`` crops at a time.

        with CodeEncoder(tokenizer, settings) as encoder:
            encoder.add(crops)                               # as often as the shard has images
            codes = encoder.end_shard()

    Codes depend on neither the number of cores nor the company an image has: on CPUs each image is encoded by one
    thread (shared out among several, convolutions round differently with each number of them), and elsewhere all
    batches have one size, the last one of a shard filled up with pixels that nobody asks for. One batch is filled
    while the one before is computed.
    """

    def __init__(self, tokenizer: VQTokenizer, settings: TokenizeSettings) -> None:
        self.tokenizer, self.precision = tokenizer, settings.precision
        self.device = tokenizer.quantize.embedding.weight.device
        self.n_tokens = (settings.image_size // tokenizer.config.downsampling) ** 2
        shape = (settings.batch, settings.image_size, settings.image_size, 3)
        on_cuda = self.device.type == "cuda"
        self._buffers = [torch.zeros(shape, dtype=torch.uint8, pin_memory=on_cuda) for _ in range(2)]
        self._filled = 0  # crops in the first buffer
        self._running: deque[Callable[[], torch.Tensor]] = (
            deque()
        )  # each gives the codes of a batch, and waits for them
        self._codes: list[NDArray[np.uint16]] = []
        self._cores = torch.get_num_threads()

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(self._cores)
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # for each thread of the pool
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._cores)

    def add(self, crops: NDArray[np.uint8]) -> None:
        """Takes crops (n, size, size, 3)."""
        while len(crops):
            buffer = self._buffers[0].numpy()
            taken = crops[: len(buffer) - self._filled]
            buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            crops = crops[len(taken) :]
            if self._filled == len(buffer):
                self._start()

    def end_shard(self) -> NDArray[np.uint16]:
        """The codes (n, N) of all crops since the shard before."""
        if self._filled:
            self._start()
        while self._running:
            self._collect()
        codes = np.concatenate(self._codes) if self._codes else np.zeros((0, self.n_tokens), np.uint16)
        self._codes = []
        return codes

    def reconstruction_psnr(self, crops: NDArray[np.uint8], codes: NDArray[np.uint16]) -> list[float]:
        """PSNR, in dB, of crops (n, size, size, 3) against what their codes (n, N) decode to: n values."""
        if self.device.type == "cpu":
            return list(self._pool.map(self._psnr, crops, codes))
        return [self._psnr(crop, row) for crop, row in zip(crops, codes, strict=True)]

    @torch.no_grad()
    def _psnr(self, crop: NDArray[np.uint8], codes: NDArray[np.uint16]) -> float:
        decoded = self.tokenizer.decode(torch.from_numpy(codes[None].astype(np.int64)).to(self.device))
        return psnr(to_uint8(decoded).cpu(), torch.from_numpy(crop)[None]).item()

    def _start(self) -> None:
        pixels, n = self._buffers[0], self._filled
        if self.device.type == "cpu":
            images = [self._pool.submit(self._encode, image) for image in pixels[:n].split(1)]
            self._running.append(lambda: torch.cat([image.result() for image in images]))
        else:
            codes = self._encode(pixels.to(self.device, non_blocking=True))[:n]
            self._running.append(_copy_from_cuda(codes) if self.device.type == "cuda" else codes.cpu)
        self._buffers.reverse()
        self._filled = 0
        if len(self._running) == len(self._buffers):
            self._collect()  # its pixels' buffer is filled next

    def _collect(self) -> None:
        self._codes.append(self._running.popleft()().numpy().astype(np.uint16))

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Codes (n, N) int32 of uint8 pixels (n, size, size, 3) on the device."""
        with autocast(self.device, self.precision):
            return self.tokenizer.encode(from_uint8(pixels)).int()


def _copy_from_cuda(codes: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Queues a copy to the host right behind what computes ``codes``: ``codes.cpu()`` would wait for later batches."""
    copy = torch.empty(codes.shape, dtype=codes.dtype, pin_memory=True).copy_(codes, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(codes.device))

    def wait() -> torch.Tensor:
        done.synchronize()
        return copy

    return wait
