"""Example images for the page: from the built-in emoji if the model shares their classes, else photographs.

paths = write_examples(model.pipe.class_names, folder)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.sources.emoji import open_emoji
from pipeline.sources.photos import Photos
from pipeline.sources.source import IndexedSource

COUNT = 8
SIDE = 512  # pixels; the page's editor shows an image at its own size


def write_examples(class_names: Sequence[str], folder: Path) -> list[Path]:
    """Write held-out images as PNG files into ``folder``, at most one per class, spread over the classes."""
    source: IndexedSource = open_emoji("validation")
    if not set(source.class_names) & set(class_names):
        source = Photos("validation")
    labels = np.array([source.label(i) for i in range(len(source))])
    firsts = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)]
    chosen = [firsts[i] for i in np.unique(np.linspace(0, len(firsts) - 1, COUNT).astype(int))]
    paths = []
    for index in chosen:
        path = folder / f"{source.class_names[source.label(index)].replace(' ', '-')}.png"
        source.load(index).resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(path)
        paths.append(path)
    return paths
