"""Kills `dpar tokenize` and `dpar patchify` at random moments and compares what is there in the end with an
undisturbed run, byte by byte: `python -m tests.kill_campaign --kills 100`.

Each victim is the real command in processes of its own. It is left alone until a first new shard shows that it is at
work, then for a random while, then one or all of its processes get SIGKILL; and again, until all shards are done.
Whatever has a final name after a kill must already have its final bytes, and no finished shard may be written twice.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from dpar import LlamaGen, LlamaGenConfig, VQConfig, VQTokenizer
from pipeline.patchify import patchify
from pipeline.runtime.progress import Progress
from pipeline.settings.artifacts import PatchifySettings, TokenizeSettings
from pipeline.tokenize import tokenize

Stage = Literal["tokenize", "patchify"]
Start = Literal["alone", "two by hand", "torchrun"]

ROOT = Path(__file__).parent.parent
BUILD = ".build"
SIZE, V = 16, 32
LONGEST_DELAY = 0.4  # seconds between the first sign of work and the kill
KILLS_A_FOLDER = 6  # then it is run to the end, and the next folder begins
ENCODE: dict[str, Any] = {"image_size": SIZE, "shard_size": 1, "batch": 2, "device": "cpu"}
MEASURE: dict[str, Any] = {"target_length": 1.5, "batch": 2, "device": "cpu"}


@dataclass
class Report:
    """What a campaign saw; ``wrong`` is empty if all promises were kept."""

    stage: Stage
    start: Start
    kills: int = 0  # that hit a process at work
    mid_write: int = 0  # of them, those that left a half-written file behind
    folders: int = 0
    unfinished: int = 0  # restarts that found some shards done and some not
    wrong: list[str] = field(default_factory=list)


def prepare(folder: Path, shards: int) -> Path:
    """Images, weights, and what undisturbed runs make of them: ``tokenize/`` and ``patchify/``."""
    rng = np.random.default_rng(0)
    for i in range(shards):
        path = folder / "photos" / ("bird", "cät")[i % 2] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).save(path)
    (folder / "photos" / "bird" / "broken.jpg").write_text("not a picture")
    torch.manual_seed(0)
    config = VQConfig(codebook_size=V, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)
    VQTokenizer(config).save_pretrained(folder / "vq")
    side = SIZE // config.downsampling
    sizes = LlamaGenConfig(codebook_size=V, grid_height=side, grid_width=side, classes=0, width=32, heads=2, layers=1)
    model = LlamaGen(sizes)
    torch.nn.init.normal_(model.output.weight, std=0.4)
    model.save_pretrained(folder / "entropy")
    quiet = Progress(quiet=True)
    encode = TokenizeSettings(tokenizer=str(folder / "vq"), **ENCODE)
    tokenize(str(folder / "photos"), folder / "tokenize", encode, quiet)
    measure = PatchifySettings(entropy_model=str(folder / "entropy"), **MEASURE)
    patchify(folder / "tokenize", folder / "patchify", measure, quiet)
    return folder


def command(stage: Stage, home: Path, out: Path) -> list[str]:
    """The arguments of ``dpar`` that make what ``prepare`` made."""
    if stage == "tokenize":
        words, values = [home / "photos", out, "--tokenizer", home / "vq"], ENCODE
    else:
        words, values = [home / "tokenize", out, "--entropy-model", home / "entropy"], MEASURE
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", value]
    return ["-m", "dpar", stage, *(str(word) for word in words)]


def start_processes(stage: Stage, start: Start, home: Path, out: Path) -> list[subprocess.Popen[bytes]]:
    """The command as a user would start it; each process leads a group of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if start == "torchrun" else []
    line = [sys.executable, *launcher, *command(stage, home, out)]
    return [
        subprocess.Popen(
            line,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for _ in range(2 if start == "two by hand" else 1)
    ]


def finals(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that has its final name."""
    found = {}
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        if path.is_file() and inside.parts[0] != BUILD and not any(p.endswith(".part") for p in inside.parts):
            found[inside.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file is behind each finished shard's name, and since when."""
    recorded = {path.stem for path in (folder / BUILD).glob("[0-9]*.json")}
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.glob("[0-9]*.arrow")
        if path.stem in recorded
    }


def n_shards(folder: Path) -> int:
    return len(list(folder.glob("[0-9]*.arrow")))


def campaign(stage: Stage, start: Start, kills: int, home: Path, folder: Path, seed: int = 0) -> Report:
    """Kills until ``kills`` have hit a process at work, in as many output folders under ``folder`` as that takes.

    Args:
        stage: the command.
        start: how its processes are started.
        kills: how many are to hit.
        home: what ``prepare`` made.
        folder: where victims write; finished ones are removed again.
        seed: of the moments and the choice of victims.
    """
    chance = random.Random(f"{stage} {start} {seed}")
    report = Report(stage, start)
    expected = finals(home / stage)
    while report.kills < kills and not report.wrong:
        out = folder / f"{stage}-{start.replace(' ', '-')}-{seed}-{report.folders}"
        report.folders += 1
        for _ in range(KILLS_A_FOLDER):
            if report.kills >= kills or (out / "manifest.json").exists():
                break
            kill_once(stage, start, home, out, chance, report, expected)
        finish(stage, start, home, out, report)
        if (found := finals(out)) != expected:
            names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            report.wrong.append(f"{out}: not the bytes of an undisturbed run: {', '.join(names[:5])}")
        if (out / BUILD).exists() or list(out.glob("*.part")):
            report.wrong.append(f"{out}: leavings of killed processes")
        if not report.wrong:
            shutil.rmtree(out)
    return report


def kill_once(
    stage: Stage, start: Start, home: Path, out: Path, chance: random.Random, report: Report, expected: dict[str, str]
) -> None:
    """Starts the command, kills one or all of its processes at a random moment, and looks at what is left."""
    before, shards_before = stamps(out), n_shards(out)
    report.unfinished += 0 < shards_before < len(expected)
    processes = start_processes(stage, start, home, out)
    while n_shards(out) == shards_before and all(process.poll() is None for process in processes):
        time.sleep(0.002)
    time.sleep(chance.random() * LONGEST_DELAY)
    at_work = not (out / "manifest.json").exists()
    one = chance.random() < 0.5
    for victim in processes[: 1 if one else None]:
        if victim.poll() is None:
            # Under torchrun "one" is a worker; the launcher then ends the rest.
            pids = children(victim.pid)[:1] if start == "torchrun" and one else group(victim.pid)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            report.kills += at_work
    halves = [*out.glob("*.part"), *(out / BUILD).glob("*.part")]
    report.mid_write += bool(halves) and at_work
    for process in processes:
        process.communicate(timeout=300)
    report.wrong += [
        f"{out / name}: {what}"
        for name, digest in finals(out).items()
        if (what := "half-written" if digest != expected.get(name) else "")
    ]
    check_kept(before, out, report)


def finish(stage: Stage, start: Start, home: Path, out: Path, report: Report) -> None:
    """Runs the command undisturbed to its end."""
    before = stamps(out)
    for process in start_processes(stage, start, home, out):
        _, said = process.communicate(timeout=600)
        if process.returncode:
            report.wrong.append(f"{out}: the last run ended with {process.returncode}: {said.decode()[-500:]}")
    check_kept(before, out, report)


def check_kept(before: dict[str, tuple[int, int]], out: Path, report: Report) -> None:
    """A shard that was finished before is the same file still."""
    for name, stamp in before.items():
        path = out / name
        if not path.exists() or (path.stat().st_ino, path.stat().st_mtime_ns) != stamp:
            report.wrong.append(f"{path}: was finished, and was written again")


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def group(pid: int) -> list[int]:
    """A process and all under it, the first process first."""
    found = [pid]
    for process in found:
        found += children(process)
    return found


def table(reports: list[Report]) -> str:
    """Markdown."""
    lines = [
        "| stage | processes | kills at work | left half a file | restarts over some shards | folders | result |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in reports:
        result = "; ".join(r.wrong) or "every byte as in an undisturbed run"
        lines.append(f"| {r.stage} | {r.start} | {r.kills} | {r.mid_write} | {r.unfinished} | {r.folders} | {result} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="in all, over both stages and all ways to start")
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="victims at the same time, in folders of their own")
    arguments = parser.parse_args()
    kinds = [(stage, start) for stage in get_args(Stage) for start in get_args(Start)]
    shares = [arguments.kills // len(kinds) + (i < arguments.kills % len(kinds)) for i in range(len(kinds))]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.at_once) as pool:
        home = prepare(Path(folder) / "home", arguments.shards)
        reports = list(
            pool.map(
                lambda kind, share: campaign(kind[0], kind[1], share, home, Path(folder), arguments.seed),
                kinds,
                shares,
            )
        )
    sys.stdout.write(table(reports) + "\n")
    sys.exit(any(report.wrong for report in reports))


if __name__ == "__main__":
    main()
