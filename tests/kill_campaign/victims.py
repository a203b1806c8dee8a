"""The commands that are killed, what they read, and their processes."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

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
PATIENCE = 1800.0  # seconds until a run on a busy machine is taken to hang
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cli", "pipeline.tokenize", "pipeline.patchify", "s3fs"])
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


class Victim(Protocol):
    """A command at work."""

    @property
    def pid(self) -> int:
        """Of its first process."""

    def has_ended(self) -> bool:
        """Whether it has."""

    def end(self) -> tuple[int, str]:
        """Wait for its end; return its exit code and what it said at last."""


class Program:
    """Python with some arguments, as a user would start it."""

    def __init__(self, words: list[str], temporary: Path) -> None:
        """Start it; its temporary files are in ``temporary``."""
        self._process = subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        self.pid = self._process.pid

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> tuple[int, str]:
        _, message = self._process.communicate(timeout=PATIENCE)
        return self._process.returncode, message.decode()[-500:]


class Fork:
    """The same in a process that has imported PyTorch and the rest already: a start is most of what a kill costs."""

    def __init__(self, words: list[str], temporary: Path) -> None:
        """Start it; its temporary files are in ``temporary``."""
        number, name = tempfile.mkstemp(suffix=".txt", dir=temporary)
        os.close(number)
        self._said = Path(name)
        self._process = FORKS.Process(target=_run, args=(words, {**os.environ, "TMPDIR": str(temporary)}, name))
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def has_ended(self) -> bool:
        return self._process.exitcode is not None

    def end(self) -> tuple[int, str]:
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, f"still at work after {PATIENCE} seconds"
        return self._process.exitcode, self._said.read_text(errors="replace")[-500:]


def _run(words: list[str], environment: dict[str, str], said: str) -> None:
    """Be ``python -m dpar ...``."""
    os.environ.update(environment)
    tempfile.tempdir = None  # to be looked up again
    torch.set_num_threads(1)
    file = os.open(said, os.O_WRONLY)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    flag, module, *sys.argv[1:] = words
    assert flag == "-m"
    runpy.run_module(module, run_name="__main__")


def children(pid: int) -> list[int]:
    """The processes that a process has started; none if it has ended."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
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
