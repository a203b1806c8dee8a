"""``dpar tokenize DATA OUT --tokenizer W``: images to codes.

    manifest = tokenize("photos/", Path("codes"), TokenizeSettings(tokenizer="builtin:photos", image_size=128))

Unusable images are left out; the manifest and ``left_out.tsv`` list them with their reasons.

Decoding, encoding and writing overlap across shard boundaries: threads read, decode and crop images; this thread
encodes them; one thread hashes and writes the previous shard. A batch never mixes images of two shards, so a shard's
bytes depend only on its images.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray

from dpar.tokenizer import VQTokenizer, from_uint8, psnr, to_uint8
from pipeline.runs.weights import fingerprint_of, load_tokenizer
from pipeline.runtime.device import autocast, choose_device, precision_name, rank, world_size
from pipeline.runtime.engine import Count, Engine, open_engine
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress, stops_with
from pipeline.runtime.provenance import made_by
from pipeline.runtime.work_sharing import Shards
from pipeline.scoring.reconstruction_sample import (
    SHARD_KEY,
    merge_reconstruction,
    reconstruction_lines,
    sampled_positions,
)
from pipeline.settings.artifacts import TokenizeSettings
from pipeline.settings.fields import identity
from pipeline.sources import Source, UnusableImage, open_source
from pipeline.sources.crop_stream import Crops, crop_stream
from pipeline.sources.crops import n_views
from pipeline.sources.holdout import split_holdout
from shards.left_out import LEFT_OUT
from shards.manifest import MANIFEST, LeftOut, Manifest, ShardInfo
from shards.rows import Rows
from shards.storage import Location, Url, is_file
from shards.writer import ArtifactBuild


def tokenize(data: str, out: Location, settings: TokenizeSettings, progress: Progress | None = None) -> Manifest | None:
    """Encode every image of ``data`` and write a codes artifact to ``out``, a directory or URL.

    With ``settings.holdout`` the held-out images go to a second artifact, :func:`holdout_folder` of ``out``.

    Any number of processes may share the work (``torchrun``, the same command several times, or Ray's workers); a
    second run resumes the first.

    Returns:
        The manifest of ``out``; None while other processes still write shards.

    Raises:
        StageError, ModelError, ArtifactError: data, weights, output or settings cannot be used.
        Stopped: the user pressed Ctrl-C.
    """
    progress = progress or Progress()
    stopped = f"Stopped. Finished shards are kept in {out}; run the same command again to resume."
    with stops_with(stopped), open_engine(settings, progress) as engine:
        return _tokenize(data, out, settings, progress, engine)


def _tokenize(
    data: str, out: Location, settings: TokenizeSettings, progress: Progress, engine: Engine
) -> Manifest | None:
    source = open_source(
        data,
        split=settings.split,
        classes=settings.classes,
        limit=settings.limit,
        image_column=settings.image_column,
        label_column=settings.label_column,
    )
    fingerprint = _fingerprint(settings.tokenizer)
    tokenizer = engine.load(_load_tokenizer, settings.tokenizer, fingerprint, settings.device)
    config = tokenizer.config
    if config.codebook_size > 2**16:
        raise StageError(f"the tokenizer has {config.codebook_size} codes; artifacts store up to {2**16}")
    if settings.image_size % config.downsampling:
        raise StageError(
            f"--image-size is {settings.image_size}; this tokenizer needs a multiple of {config.downsampling}"
        )
    parts: list[tuple[Source, Location]] = [(source, out)]
    if settings.holdout is not None:
        training, held_out = split_holdout(source, settings.holdout, settings.seed, settings.group_regex)
        parts = [(training, out), (held_out, holdout_folder(out))]
    with contextlib.ExitStack() as stack:
        builds = []
        for part, folder in parts:  # open all first, so that a refusal comes before any work
            values = artifact_identity(data, part, fingerprint, settings)
            build = ArtifactBuild(
                folder,
                settings=values,
                n_shards=part.n_parts(settings.shard_size),
                container=settings.container,
                overwrite=settings.overwrite,
                share=(rank(), world_size()),
            )
            builds.append(build)
            stack.callback(build.close)
        manifests = [
            encode_source(data, part, build, tokenizer, settings, progress, engine)
            for (part, _), build in zip(parts, builds, strict=True)
        ]
    return manifests[0]


def _fingerprint(tokenizer: str) -> str:
    try:
        return fingerprint_of(tokenizer, "tokenizer")
    except OSError:
        load_tokenizer(tokenizer)  # raises an error that says what is missing
        raise


def _load_tokenizer(name: str, fingerprint: str, device: str) -> VQTokenizer:
    return load_tokenizer(name, fingerprint).to(choose_device(device))


@overload
def holdout_folder(out: Path) -> Path: ...
@overload
def holdout_folder(out: Url) -> Url: ...
def holdout_folder(out: Location) -> Location:
    """Return the directory of the held-out part, next to ``out``."""
    named = out.resolve() if isinstance(out, Path) and out.name in ("", "..") else out
    return named.with_name(f"{named.name}-holdout")


def artifact_identity(data: str, source: Source, fingerprint: str, settings: TokenizeSettings) -> dict[str, Any]:
    """Return the settings that determine an artifact's bytes, with the fingerprints of tokenizer and listing."""
    described = source.describe()
    values = identity(settings) | {
        "data": data,
        "listing": described["listing_sha256"],
        "tokenizer": fingerprint,
        "precision": precision_name(choose_device(settings.device), settings.precision),
    }
    return values | ({"holdout": described["holdout"]} if "holdout" in described else {})


def encode_source(
    data: str,
    source: Source,
    build: ArtifactBuild,
    tokenizer: VQTokenizer,
    settings: TokenizeSettings,
    progress: Progress,
    engine: Engine,
) -> Manifest | None:
    """Write the missing shards of ``build``; return its manifest, or None while other processes still write shards."""
    out, config = build.folder, tokenizer.config
    side = settings.image_size // config.downsampling
    is_holdout = build.settings.get("holdout", {}).get("part") == "held out"

    def check_strict(shards: Sequence[ShardInfo]) -> None:
        unusable = sum(len(shard.left_out) for shard in shards) - len(source.left_out)
        if settings.strict and unusable:
            raise StageError(
                f"{unusable} images cannot be used, and --strict allows none: an earlier run without it left them "
                f"out of {out} ({out / LEFT_OUT} has the reasons). Repair or remove them, or omit --strict"
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

    def work(indices: Generator[int, None, None], count: Count) -> None:
        with CodeEncoder(tokenizer, settings) as encoder:
            write_shards(build, source, encoder, settings, indices, count)

    with progress.task("tokenize holdout" if is_holdout else "tokenize", source.n_items, "images") as task:
        if settings.engine == "ray" and source.n_items is not None:  # write_shards counts what a process passes over
            left = [i * settings.shard_size for i in build.unfinished()]
            task.skip(source.n_items - sum(min(settings.shard_size, source.n_items - i) for i in left))
        engine.run(Shards(build), work, task)
    is_last = not is_file(out / MANIFEST)  # this is probably the last process to finish
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
    build: ArtifactBuild,
    source: Source,
    encoder: CodeEncoder,
    settings: TokenizeSettings,
    todo: Generator[int, None, None],
    task: Count,
) -> None:
    """Write the shards of ``build`` that ``todo`` claims."""
    keys: list[str] = []
    labels: list[int] = []
    left_out: list[LeftOut] = []
    sample: dict[int, NDArray[np.uint8]] = {}  # row of the shard -> crop whose reconstruction is measured
    n_left_out = 0
    position = rank() * build.n_shards // world_size()  # todo() starts here

    @functools.cache
    def positions(index: int) -> set[int]:
        n_shards, size = build.n_shards, settings.shard_size
        return set(sampled_positions(index, n_shards=n_shards, shard_size=size, n_items=source.n_items))

    writing: Future[None] | None = None  # the previous shard
    with ThreadPoolExecutor(1) as writer, closing(crop_stream(todo, source, settings)) as stream:
        for index, image in stream:
            if writing is not None and writing.done():
                writing.result()  # raises an error early
            if source.n_items is not None:
                for i in range(position, position + (index - position) % build.n_shards):
                    first = i % build.n_shards * settings.shard_size
                    task.skip(min(settings.shard_size, source.n_items - first))
            position = index if image is not None else (index + 1) % build.n_shards
            if isinstance(image, Crops):
                pixels = image.pixels.result()
                if isinstance(pixels, UnusableImage):
                    image = LeftOut(image.key, pixels.reason)
                else:
                    if len(keys) + len(left_out) in positions(index):
                        sample[len(keys)] = pixels[0].copy()  # a slice would keep all views in memory
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
                left_out = [*source.left_out, *left_out]
            statistics: dict[str, Any] = {"labels": max(labels, default=-1) + 1}  # a stream's classes are its labels
            if sample:
                measured = encoder.reconstruction_psnr(np.stack([*sample.values()]), rows.codes[[*sample], 0])
                statistics[SHARD_KEY] = [round(value, 2) for value in measured]
            if writing is not None:
                writing.result()  # one at a time, to bound memory
            writing = writer.submit(build.add, index, rows, statistics=statistics, left_out=left_out)
            keys, labels, left_out, sample = [], [], [], {}
        if writing is not None:
            writing.result()


class CodeEncoder:
    """Encodes crops into codes, shard by shard, ``batch`` crops at a time.

        with CodeEncoder(tokenizer, settings) as encoder:
            encoder.add(crops)                               # once per image of the shard
            codes = encoder.end_shard()

    Codes depend neither on the number of cores nor on the other images of a batch. On a CPU one thread encodes each
    image, because the rounding of convolutions depends on the number of threads. Elsewhere all batches have the same
    size; the last one of a shard is padded. One batch is filled while the previous one is computed.
    """

    def __init__(self, tokenizer: VQTokenizer, settings: TokenizeSettings) -> None:
        self.tokenizer, self.precision = tokenizer, settings.precision
        self.device = tokenizer.quantize.embedding.weight.device
        self.n_tokens = (settings.image_size // tokenizer.config.downsampling) ** 2
        shape = (settings.batch, settings.image_size, settings.image_size, 3)
        on_cuda = self.device.type == "cuda"
        self._buffers = [torch.zeros(shape, dtype=torch.uint8, pin_memory=on_cuda) for _ in range(2)]
        self._filled = 0  # crops in the first buffer
        self._running: deque[Callable[[], torch.Tensor]] = deque()  # each waits for a batch and returns its codes
        self._codes: list[NDArray[np.uint16]] = []
        self._cores = torch.get_num_threads()

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(self._cores)
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # in each thread of the pool
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._cores)

    def add(self, crops: NDArray[np.uint8]) -> None:
        """Add crops (n, size, size, 3) uint8 to the shard."""
        while len(crops):
            buffer = self._buffers[0].numpy()
            taken = crops[: len(buffer) - self._filled]
            buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            crops = crops[len(taken) :]
            if self._filled == len(buffer):
                self._start()

    def end_shard(self) -> NDArray[np.uint16]:
        """Return the codes (n, N) uint16 of all crops added since the previous shard."""
        if self._filled:
            self._start()
        while self._running:
            self._collect()
        codes = np.concatenate(self._codes) if self._codes else np.zeros((0, self.n_tokens), np.uint16)
        self._codes = []
        return codes

    def reconstruction_psnr(self, crops: NDArray[np.uint8], codes: NDArray[np.uint16]) -> list[float]:
        """Return the PSNR, in dB, between crops (n, size, size, 3) and the images decoded from their codes (n, N)."""
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
            self._collect()  # frees the buffer that is filled next

    def _collect(self) -> None:
        self._codes.append(self._running.popleft()().numpy().astype(np.uint16))

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return codes (n, N) int32 of uint8 pixels (n, size, size, 3) on the device."""
        with autocast(self.device, self.precision):
            return self.tokenizer.encode(from_uint8(pixels)).int()


def _copy_from_cuda(codes: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Queue a copy to the host right after ``codes`` are computed: ``codes.cpu()`` would wait for later batches."""
    copy = torch.empty(codes.shape, dtype=codes.dtype, pin_memory=True).copy_(codes, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(codes.device))

    def wait() -> torch.Tensor:
        done.synchronize()
        return copy

    return wait
