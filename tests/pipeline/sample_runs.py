"""Shared by the tests of `dpar sample`: runs to sample from, the command on them, and what it wrote."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dpar.tokenizer import VQTokenizer, from_uint8
from pipeline.patchify import patchify
from pipeline.sample import sample_pictures
from pipeline.settings.artifacts import PatchifySettings
from pipeline.settings.sampling import SampleSettings
from pipeline.sources.crops import views
from shards.reader import open_artifact
from tests.pipeline.sampled import CPU, QUIET, SIZE, save_home, save_run

CLASSES = ("bird", "cat & dog", "fish")
FOLDERS = ("0000-bird", "0001-cat_dog", "0002-fish")


def save_runs(home: Path) -> Path:
    """Save images, a tokenizer, an entropy model, patches, and runs of LlamaGen and of DPAR with both strategies."""
    save_home(home, CLASSES, a_class=2)
    static = PatchifySettings(strategy="static", static_length=1.81, **CPU)
    patchify(home / "codes", home / "static patches", static, QUIET)
    save_run(home / "dpar", home / "patches", "dpar-tiny")
    save_run(home / "static", home / "static patches", "dpar-tiny")
    save_run(home / "llama", home / "codes", "llamagen-tiny", std=0.05)
    return home


def run(home: Path, out: Path, model: str = "dpar", **values: Any) -> dict[str, Any]:
    return sample_pictures(home / model, out, SampleSettings(**{**CPU, "per_class": 2, **values}), QUIET)


def held(out: Path) -> dict[str, Any]:
    artifact = open_artifact(out / "codes", verify=True)
    rows = np.arange(len(artifact))
    batch = artifact.gather(rows, np.zeros_like(rows))
    return {"codes": batch.codes, "starts": batch.starts, "labels": batch.labels, "made": artifact.manifest}


def pictures(out: Path) -> list[str]:
    return sorted(path.relative_to(out / "images").as_posix() for path in out.glob("images/*/*.png"))


def write_image(path: Path, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    rng = np.random.default_rng(5)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    return path


def codes_of(home: Path, image: Path) -> np.ndarray:
    pixels = views(Image.open(image), SIZE, "center", (1.0,))
    return VQTokenizer.from_pretrained(home / "vq").encode(from_uint8(torch.from_numpy(pixels)))[0].numpy()
