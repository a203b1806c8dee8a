"""Inputs of the tests of sampling and scoring: tiny images, weights, artifacts and runs; and real processes."""

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dpar import DPAR, LlamaGen, LlamaGenConfig
from dpar.model import DPARConfig
from dpar.presets import preset
from dpar.tokenizer import VQConfig, VQTokenizer
from pipeline.export import export
from pipeline.patchify import patchify
from pipeline.runtime.progress import Progress
from pipeline.settings.artifacts import PatchifySettings, TokenizeSettings
from pipeline.settings.sampling import ExportSettings
from pipeline.tokenize import tokenize
from pipeline.train import lineage
from shards.files import write_json
from shards.manifest import Manifest

V, SIDE, SIZE = 32, 4, 8
N = SIDE * SIDE
QUIET = Progress(quiet=True)
CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
RULE: dict[str, Any] = {"threshold": 3.1, "max_length": 4, "row_reset": True}
VQ = VQConfig(codebook_size=V, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)


def save_photos(folder: Path, classes: tuple[str, ...], a_class: int) -> None:
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(a_class):
            Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(folder / name / f"{i}.png")


def save_patches(home: Path, photos: Path, codes: Path, patches: Path) -> None:
    """Save codes and patches of the photos, by the tokenizer and the entropy model in ``home``."""
    settings = TokenizeSettings(tokenizer=str(home / "vq"), image_size=SIZE, shard_size=4, **CPU)
    tokenize(str(photos), codes, settings, QUIET)
    patchify(codes, patches, PatchifySettings(entropy_model=str(home / "entropy"), **RULE, **CPU), QUIET)


def save_home(home: Path, classes: tuple[str, ...], a_class: int) -> None:
    """Save ``photos/``, ``vq/``, ``entropy/``, ``codes/`` and ``patches/``."""
    save_photos(home / "photos", classes, a_class)
    torch.manual_seed(0)
    VQTokenizer(VQ).save_pretrained(home / "vq")
    config = LlamaGenConfig(codebook_size=V, grid_height=SIDE, grid_width=SIDE, classes=0, width=32, heads=2, layers=2)
    entropy_model = LlamaGen(config)
    nn.init.normal_(entropy_model.output.weight, std=0.3)
    entropy_model.save_pretrained(home / "entropy")
    save_patches(home, home / "photos", home / "codes", home / "patches")


def save_run(run: Path, data: Path, model: str, seed: int = 3, std: float = 0.2) -> None:
    """Save a run as `dpar train` does, of a model with non-uniform outputs, so that samples depend on their inputs."""
    manifest = Manifest.read(data)
    config = preset(
        model,
        codebook_size=manifest.codebook_size,
        grid_height=manifest.grid[0],
        grid_width=manifest.grid[1],
        classes=len(manifest.class_names),
    )
    torch.manual_seed(seed)
    made = DPAR(config) if isinstance(config, DPARConfig) else LlamaGen(config)
    nn.init.normal_(made.output.weight, std=std)
    run.mkdir()
    inputs = {"data": str(data), **lineage(manifest)}
    write_json(
        run / "run.json",
        {"format_version": 2, "kind": "train", "settings": {"model": model, "batch": 2}, "inputs": inputs},
    )
    made.save_pretrained(run / "model")


def save_inception(folder: Path) -> Path:
    """Save random weights of torch-fidelity's Inception in place of the published ones."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Newborn(FeatureExtractorInceptionV3):
        """Keeps its initial weights, to avoid the download."""

        def load_state_dict(self, *_: Any) -> None:
            pass

    torch.save({}, folder / "nothing.pth")
    torch.manual_seed(0)
    newborn = Newborn("inception", ["2048"], feature_extractor_weights_path=str(folder / "nothing.pth"))
    for module in newborn.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(newborn.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


def save_dino(folder: Path) -> Path:
    """Save random weights of the smallest DINOv2 in Meta's format."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    torch.save(model.state_dict() | {"mask_token": torch.zeros(1, 384)}, folder / "dinov2_vits14_pretrain.pth")
    return folder / "dinov2_vits14_pretrain.pth"


BUNDLE_CLASSES = ("bird", "cat", "fish")


def save_bundles(home: Path) -> Path:
    """Call `save_home` and add a run of DPAR, one of LlamaGen, and a bundle of each."""
    save_home(home, BUNDLE_CLASSES, a_class=2)
    save_run(home / "dpar", home / "patches", "dpar-tiny")
    save_run(home / "llama", home / "codes", "llamagen-tiny", std=0.05)
    for name in ("dpar", "llama"):
        export(home / name, home / f"{name}-bundle", ExportSettings(samples=0, **CPU), QUIET)
    return home


def everything(out: Path) -> dict[str, bytes]:
    """Return all files below a directory except empty locks."""
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.stat().st_size}


def start(
    work: Callable[[], object], rank: int = 0, world_size: int = 1, fresh: bool = False
) -> multiprocessing.process.BaseProcess:
    """Start a process that does the work as a process of ``torchrun``; work that calls backward needs ``fresh``."""
    context = multiprocessing.get_context("spawn") if fresh else multiprocessing.get_context("fork")
    process = context.Process(target=_work_as, args=(work, rank, world_size))
    process.start()
    return process


def _work_as(work: Callable[[], object], rank: int, world_size: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    work()


def killed_again_and_again(work: Callable[[], object], out: Path, kills: int, fresh: bool = False) -> int:
    """Kill the work whenever it has written a few files in ``out``, then let it finish; return the number of kills."""
    chance, hits = random.Random(0), 0
    for _ in range(kills):
        seen = files(out)
        process = start(work, fresh=fresh)
        more = chance.randint(1, 3)
        while process.is_alive() and len(files(out) - seen) < more:
            pass
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        hits += process.exitcode == -signal.SIGKILL
    process = start(work, fresh=fresh)
    process.join()
    assert process.exitcode == 0
    return hits


def files(out: Path) -> set[str]:
    """Return names of finished and unfinished files, some of which a running process may remove meanwhile."""
    return {os.path.join(root, name) for root, _, names in os.walk(out) for name in names if ".locks" not in root}
