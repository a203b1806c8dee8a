"""The commands that are killed, what they read, and their processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from dpar import LlamaGen, LlamaGenConfig, VQConfig, VQTokenizer
from pipeline.patchify import patchify
from pipeline.runtime.progress import Progress
from pipeline.settings.artifacts import PatchifySettings, TokenizeSettings
from pipeline.tokenize import tokenize

Stage = Literal["tokenize", "patchify"]

ROOT = Path(__file__).parents[2]
V = 32
ENCODE: dict[str, Any] = {"shard_size": 1, "batch": 2, "device": "cpu"}
MEASURE: dict[str, Any] = {"target_length": 1.5, "batch": 2, "device": "cpu"}


class Home:
    """Images, weights, and what undisturbed runs make of them: ``tokenize/`` and ``patchify/``."""

    def __init__(self, path: Path, shards: int, size: int = 16) -> None:
        """Make all of it: ``shards`` images, encoded at ``size`` pixels."""
        self.path, self.codes = path, str(path / "tokenize")
        self.encode = {**ENCODE, "image_size": size}
        rng = np.random.default_rng(0)
        for i in range(shards):
            photo = path / "photos" / ("bird", "cät")[i % 2] / f"{i:04d}.png"
            photo.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).save(photo)
        (path / "photos" / "bird" / "broken.jpg").write_text("not a picture")
        torch.manual_seed(0)
        vq = VQConfig(codebook_size=V, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)
        VQTokenizer(vq).save_pretrained(path / "vq")
        side = size // vq.downsampling
        sizes = LlamaGenConfig(
            codebook_size=V, grid_height=side, grid_width=side, classes=0, width=32, heads=2, layers=1
        )
        model = LlamaGen(sizes)
        torch.nn.init.normal_(model.output.weight, std=0.4)
        model.save_pretrained(path / "entropy")
        quiet = Progress(quiet=True)
        encode = TokenizeSettings(tokenizer=str(path / "vq"), **self.encode)
        tokenize(str(path / "photos"), path / "tokenize", encode, quiet)
        measure = PatchifySettings(entropy_model=str(path / "entropy"), **MEASURE)
        patchify(path / "tokenize", path / "patchify", measure, quiet)

    def command(self, stage: Stage, out: str) -> list[str]:
        """The arguments of Python that make ``tokenize/`` or ``patchify/`` again."""
        if stage == "tokenize":
            words, values = [self.path / "photos", out, "--tokenizer", self.path / "vq"], self.encode
        else:
            words, values = [self.codes, out, "--entropy-model", self.path / "entropy"], MEASURE
        for name, value in values.items():
            words += [f"--{name.replace('_', '-')}", value]
        return ["-m", "dpar", stage, *(str(word) for word in words)]


def start(words: list[str], temporary: Path) -> subprocess.Popen[bytes]:
    """Start Python as a user would; its temporary files are in ``temporary``."""
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
    )


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def group(pid: int) -> list[int]:
    """A process and all under it, the first process first."""
    found = [pid]
    for process in found:
        found += children(process)
    return found


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
