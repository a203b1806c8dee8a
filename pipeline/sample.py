"""``dpar sample RUN OUT``: sample pictures from a run.

sample_pictures(Path("run"), Path("pictures"), SampleSettings(classes=("cat",), cfg_scale=2.0))

OUT/codes/                    the tokens, as an artifact: ``dpar inspect OUT/codes`` and every other command opens it
OUT/images/CLASS/INDEX.png    each picture
OUT/samples.npz               all of them, in the format of ADM's evaluation suite (``--npz``)
OUT/nearest.png, .json        each sample and the training image nearest to it (``--show-nearest``)
OUT/sheet.png                 one row per class; with ``--image`` the original, the mask and the samples

Any number of processes may work on one OUT, and a killed run resumes and writes the same files.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Generator as Indices
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.generation.classes import choose_classes
from pipeline.generation.editing import Edit, edit_sheet
from pipeline.generation.generator import Generator
from pipeline.generation.nearest import find_nearest, nearest_sheet, open_training
from pipeline.generation.npz import write_images
from pipeline.generation.sampled_artifact import Plan, labels_of, write_sampled
from pipeline.reports.pictures import draw_patches, enlarge, sheet
from pipeline.runtime.engine import Count, Engine, open_engine
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress, stops_with
from pipeline.runtime.work_sharing import Pieces, claim_parts
from pipeline.settings.sampling import SampleSettings
from shards.files import atomic_path, write_json
from shards.reader import Artifact

SHEET_CLASSES = 50  # most rows of a sheet
SHEET_COLUMNS = 16
DERIVED = ("images", "samples.npz", "sheet.png", "nearest.png", "nearest.json")  # in OUT, computed from the codes


def sample_pictures(run: Path, out: Path, settings: SampleSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Sample pictures from a run of ``dpar train`` and write them to ``out``.

    Returns:
        The path of the sheet, the number of images, and mean patches per image.

    Raises:
        StageError, ModelError, ArtifactError: run, output or settings cannot be used.
        Stopped: the user pressed Ctrl-C.
    """
    progress = progress or Progress()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "codes").is_dir())):
        raise StageError(f"{out} holds something else; name a new or empty directory for the pictures")
    stopped = f"Stopped. Finished images are kept in {out}; run the same command again to resume."
    with stops_with(stopped), open_engine(settings, progress) as engine:
        return _sample_pictures(run, out, settings, progress, engine)


def _sample_pictures(
    run: Path, out: Path, settings: SampleSettings, progress: Progress, engine: Engine
) -> dict[str, Any]:
    generator = engine.load(_load, run, settings)
    classes = choose_classes(generator.class_names, settings.classes)
    if settings.count is None:
        labels = np.repeat(np.asarray(classes, np.int64), settings.per_class or 4)
    else:
        labels = labels_of(classes, settings.count, settings.labels, settings.seed)
    edit = None if settings.image is None else engine.call(lambda: Edit.of(generator, settings))
    place = settings.show_nearest
    training = None if place is None else open_training(place, generator, "--show-nearest")
    plan = Plan(labels=labels, cfg_scale=settings.cfg_scale, edit=edit)
    if settings.overwrite:
        for name in DERIVED:  # they belong to the old codes
            _remove(out / name)
    artifact = write_sampled(generator, plan, out / "codes", progress, "sample", engine, overwrite=settings.overwrite)
    if settings.png:
        _write_pngs(generator, artifact, labels, out, progress, engine)
    if settings.npz:
        _write_npz(generator, artifact, labels, out, progress, engine)
    engine.call(functools.partial(_write_sheet, generator, artifact, labels, edit, settings.show_patches, out))
    if training is not None:
        rows = np.arange(len(labels))
        engine.call(functools.partial(write_nearest, generator, artifact, rows, labels, training, out))
    patches = artifact.manifest.statistics.get("patches_per_image", artifact.manifest.n_tokens)
    return {"sheet": str(out / "sheet.png"), "images": len(labels), "patches_per_image": float(patches)}


def _load(run: Path, settings: SampleSettings) -> Generator:
    return Generator.load(run, settings).with_rule(settings.threshold, settings.max_length)


def _write_pngs(
    generator: Generator,
    artifact: Artifact,
    labels: NDArray[np.int64],
    out: Path,
    progress: Progress,
    engine: Engine,
) -> None:
    names = [folder_name(label, name) for label, name in enumerate(generator.class_names)]
    paths = [out / "images" / names[label] / f"{i:06d}.png" for i, label in enumerate(labels)]
    ends = artifact.ends
    ranges = [range(end - shard.rows, end) for end, shard in zip(ends, artifact.manifest.shards, strict=True)]
    for label in np.unique(labels):
        (out / "images" / names[label]).mkdir(parents=True, exist_ok=True)

    def work(indices: Indices[int, None, None], count: Count) -> None:
        for index in indices:
            for k, pixels in zip(ranges[index], shard_pixels(generator, artifact, index), strict=True):
                save_picture(Image.fromarray(pixels), paths[k])
            count.advance(len(ranges[index]))

    with progress.task("write", len(labels), "pictures") as task:
        pieces = Pieces(out / "images", len(ranges), lambda i: all(paths[k].is_file() for k in ranges[i]))
        engine.run(pieces, work, task)


def _write_npz(
    generator: Generator,
    artifact: Artifact,
    labels: NDArray[np.int64],
    out: Path,
    progress: Progress,
    engine: Engine,
) -> None:
    path, shape = out / "samples.npz", (len(labels), *generator.image_size, 3)

    def work(indices: Indices[int, None, None], count: Count) -> None:
        for _ in indices:
            with write_images(path, shape, labels) as append:
                for index in range(len(artifact.manifest.shards)):
                    pixels = shard_pixels(generator, artifact, index)
                    append(pixels)
                    count.advance(len(pixels))

    with progress.task("write", len(labels), "images") as task:
        engine.run(Pieces(path, 1, lambda _: path.is_file()), work, task)


def _write_sheet(
    generator: Generator, artifact: Artifact, labels: NDArray[np.int64], edit: Edit | None, patches: bool, out: Path
) -> None:
    for _ in claim_parts(out / "sheet.png", 1, lambda _: False):
        if edit is None:
            picture = sample_sheet(generator, artifact, labels, patches=patches)
        else:
            shown = np.arange(min(len(labels), SHEET_COLUMNS))
            picture = edit_sheet(generator, edit, row_of_pictures(generator, artifact, shown, patches))
        save_picture(picture, out / "sheet.png")


def write_nearest(
    generator: Generator,
    artifact: Artifact,
    rows: NDArray[np.int64],
    labels: NDArray[np.int64],
    training: Artifact,
    out: Path,
) -> None:
    """Find the training images nearest to samples ``rows`` (n,) of all ``labels``; write nearest.png and .json."""
    codes = artifact.gather(rows, np.zeros_like(rows), entropy=False).codes
    for _ in claim_parts(out / "nearest.png", 1, lambda _: False):
        nearest = find_nearest(codes, training, generator.tokenizer)
        pairs = zip(artifact.keys(rows), nearest.keys, nearest.distance.tolist(), strict=True)
        write_json(out / "nearest.json", [{"sample": s, "nearest": n, "distance": d} for s, n, d in pairs])
        save_picture(nearest_sheet(generator, codes, labels[rows], nearest), out / "nearest.png")


def shard_pixels(generator: Generator, artifact: Artifact, index: int, size: int | None = None) -> NDArray[np.uint8]:
    """Return the pictures of a shard, (rows, H, W, 3) uint8; see :func:`pipeline.generation.generator.decode`."""
    return generator.decode(artifact.shard_rows(index).codes[:, 0], size)


def sample_sheet(
    generator: Generator,
    artifact: Artifact,
    labels: NDArray[np.int64],
    *,
    patches: bool,
    columns: int = SHEET_COLUMNS,
) -> Image.Image:
    """Return a sheet with one row per class of at most ``columns`` pictures, optionally with patches drawn.

    Of more than SHEET_CLASSES classes, an evenly spread selection is shown.
    """
    chosen = np.unique(labels)
    if len(chosen) > SHEET_CLASSES:
        chosen = chosen[np.linspace(0, len(chosen) - 1, SHEET_CLASSES).astype(int)]
    rows = [row_of_pictures(generator, artifact, np.flatnonzero(labels == k)[:columns], patches) for k in chosen]
    return sheet(rows, row_titles=[generator.class_names[label] for label in chosen])


def row_of_pictures(
    generator: Generator, artifact: Artifact, rows: NDArray[np.int64], patches: bool
) -> list[Image.Image]:
    """Return some of the sampled images as pictures, optionally with patches drawn."""
    batch = artifact.gather(rows, np.zeros_like(rows))
    pixels = generator.decode(batch.codes)
    scale = max(1, round((320 if patches else 128) / pixels.shape[1]))  # larger, so that outlines are visible
    if not patches or batch.starts is None:
        return [enlarge(image, scale) for image in pixels]
    return [
        draw_patches(image, starts, generator.grid, scale) for image, starts in zip(pixels, batch.starts, strict=True)
    ]


def folder_name(label: int, name: str) -> str:
    """Return a directory name for a class that is valid on every file system: its number and simplified name."""
    kept = re.sub(r"[^\w-]+", "_", name).strip("_")[:60]
    return f"{label:04d}-{kept}" if kept else f"{label:04d}"


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG file atomically."""
    with atomic_path(path) as part:
        picture.save(part, "PNG")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
