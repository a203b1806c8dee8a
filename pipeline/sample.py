"""``dpar sample RUN OUT``: pictures.

sample_pictures(Path("run"), Path("pictures"), SampleSettings(classes=("cat",), cfg_scale=2.0))

OUT/sheet.png         one row a class
OUT/CLASS/N.png       each picture
OUT/samples.npz       codes, starts and labels, and how they were sampled
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import StageError
from pipeline.generate import Drawn, Generator, choose_classes
from pipeline.pictures import draw_patches, enlarge, sheet
from pipeline.progress import Progress, stops_with
from pipeline.settings import SampleSettings
from pipeline.versions import made_by
from pipeline.weights import fingerprint_of

SHEET_CLASSES = 50  # rows of a sheet, at most


def sample_pictures(run: Path, out: Path, settings: SampleSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Samples pictures from a run of ``dpar train`` and writes them to ``out``.

    Returns:
        What was made: the sheet, the number of images, mean patches an image.

    Raises:
        StageError, ModelError: run, output or settings cannot be used.
        Stopped: the user pressed Ctrl-C.
    """
    progress = progress or Progress()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "samples.npz").is_file())):
        raise StageError(f"{out} holds something else; name a new or empty directory for the pictures")
    generator = Generator.load(run, settings)
    labels = np.repeat(choose_classes(generator.class_names, settings.classes), settings.per_class)
    with stops_with("Stopped; nothing was written."):
        drawn = generator.sample(labels, np.arange(len(labels)), settings.cfg_scale, progress, "sample")
    out.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"settings": dataclasses.asdict(settings), "rule": generator.rule, "made_by": made_by()}
    how |= {"run": str(run), "weights": fingerprint_of(str(run))}
    np.savez_compressed(  # first: by it a later sampling knows the directory for its own
        out / "samples.npz",
        codes=drawn.codes.astype(np.uint16),
        starts=drawn.starts,
        labels=labels.astype(np.int32),
        how=np.array(json.dumps(how)),
    )
    for old in out.glob("[0-9][0-9][0-9][0-9]*/[0-9]*.png"):  # of an earlier sampling
        old.unlink()
    for i, label in enumerate(labels):
        folder = out / folder_name(int(label), generator.class_names[label])
        folder.mkdir(exist_ok=True)
        Image.fromarray(drawn.pixels[i]).save(folder / f"{i % settings.per_class:04d}.png")
    picture = sample_sheet(generator, drawn, labels, patches=settings.show_patches)
    picture.save(out / "sheet.png")
    return {
        "sheet": str(out / "sheet.png"),
        "images": len(labels),
        "patches_per_image": float(drawn.starts.sum(axis=1).mean()),
    }


def sample_sheet(
    generator: Generator, drawn: Drawn, labels: NDArray[np.integer], *, patches: bool, columns: int | None = None
) -> Image.Image:
    """A row of pictures for each class, at most ``columns`` of them, with their patches drawn on if asked.

    Where there are more than SHEET_CLASSES classes, those shown are spread evenly over them.
    """
    size = drawn.pixels.shape[1]
    scale = max(1, round((320 if patches else 128) / size))  # lines need room
    rows = []
    chosen = np.unique(labels)
    if len(chosen) > SHEET_CLASSES:
        chosen = chosen[np.linspace(0, len(chosen) - 1, SHEET_CLASSES).astype(int)]
    for label in chosen:
        mine = np.flatnonzero(labels == label)[:columns]
        rows.append(
            [
                draw_patches(drawn.pixels[i], drawn.starts[i], generator.grid, scale)
                if patches
                else enlarge(drawn.pixels[i], scale)
                for i in mine
            ]
        )
    return sheet(rows, row_titles=[generator.class_names[label] for label in chosen])


def folder_name(label: int, name: str) -> str:
    """A directory name for a class, safe on every file system: its number, and what of its name can be kept."""
    kept = re.sub(r"[^\w-]+", "_", name).strip("_")[:60]
    return f"{label:04d}-{kept}" if kept else f"{label:04d}"
