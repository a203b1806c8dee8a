"""Shared by the tests of scoring: runs to score, `dpar eval` on them, and folders of reference images."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.evaluate import evaluate
from pipeline.settings.sampling import EvalSettings
from tests.pipeline.sampled import CPU, QUIET, SIZE, save_home, save_run

CLASSES = ("bird", "cat")
TOKENIZER_DISTANCE = "tokenizer Fréchet distance"


def save_runs(home: Path) -> Path:
    """Save images, a tokenizer, an entropy model, artifacts, and slightly trained runs of both families."""
    save_home(home, CLASSES, a_class=5)
    for model in ("dpar-tiny", "llamagen-tiny"):
        save_run(home / model, home / "patches", model, std=0.05)
    return home


def run(home: Path, out: Path, model: str = "dpar-tiny", **values: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"reference": home / "patches", "cfg_scale": (1.5,), "samples": 6}
    return evaluate(home / model, out, EvalSettings(**{**defaults, **CPU, **values}), QUIET).to_json()


def write_images(folder: Path, seed: int, count: int, brightest: int = 256, size: int = SIZE) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, brightest, (size, size, 3)).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return folder
