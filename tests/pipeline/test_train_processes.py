"""Two processes of one run: the numbers of one process, whichever way they share the model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline.training import (
    EXACT,
    build,
    chosen,
    digests,
    ends,
    largest_difference,
    lines_of,
    metrics,
    options,
    run,
    saved,
    together,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("made") / "patches")


def same_numbers(one: Path, other: Path) -> None:
    """Losses, held-out scores and weights, both kinds, within the rounding of float32 sums in another order."""
    names = (
        "step",
        "loss",
        "grad_norm",
        "patches_per_image",
        "validation_bits_per_token",
        "ema_validation_bits_per_token",
    )
    ours, theirs = ([[line.get(name, 0) for name in names] for line in metrics(out)] for out in (one, other))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert b == pytest.approx(a, abs=1e-5)
    for kind in ("model", "model-ema"):
        assert largest_difference(one, other, kind) < 1e-5


@pytest.mark.slow
def test_two_processes_with_half_the_batch_each_give_the_numbers_of_one_by_copies_and_by_shares(
    patches: Path, tmp_path: Path
) -> None:
    held_out = build(tmp_path / "held out", seed=5)
    settings: dict[str, Any] = {
        "steps": 4,
        "batch": 8,
        "checkpoint_every": 2,
        "lr": 1e-4,
        "ema": 0.5,
        "weight_decay": 0.5,
        "validation": held_out,
        "eval_every": 2,
        "micro_batch": 3,
        "sheet": 0,
        **EXACT,
    }
    run(patches, tmp_path / "one", **settings)
    ends(together(patches, tmp_path / "copies", **settings))
    ends(together(patches, tmp_path / "shares", fsdp=True, **settings))
    for name in ("copies", "shares"):
        same_numbers(tmp_path / "one", tmp_path / name)
        assert saved(tmp_path / name) == ["step-00000002", "step-00000004"]
        assert json.loads((tmp_path / name / "run.json").read_text())["resolved"]["processes"] == 2
    # and each goes on with what another number of processes, or the other way to share, has left
    for name in ("one", "copies", "shares"):
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000004")
        shutil.copytree(tmp_path / name, tmp_path / f"{name} anew")
    run(patches, tmp_path / "shares anew", **settings)
    same_numbers(tmp_path / "one", tmp_path / "shares anew")
    ends(together(patches, tmp_path / "one anew", fsdp=True, **settings))
    same_numbers(tmp_path / "shares", tmp_path / "one anew")
    run(patches, tmp_path / "copies anew", **settings)
    same_numbers(tmp_path / "one", tmp_path / "copies anew")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(patches: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    processes = together(patches, out, steps=500, checkpoint_every=1000, fsdp=True)
    while processes[0].poll() is None and lines_of(out) < 3:
        time.sleep(0.001)
    processes[1].send_signal(signal.SIGUSR1)
    said = ends(processes, 75)
    step = int(saved(out)[-1].removeprefix("step-"))
    assert f"Stopped. Step {step} is saved in {out}; run the same command again to go on." in said[0]
    assert not said[1]
    assert metrics(out)[-1]["step"] == step


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves_one_step_in_all_processes(patches: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = options(chosen(steps=500, checkpoint_every=1000))
    process = subprocess.Popen(
        [*launcher, "-m", "dpar", "train", str(patches), str(out), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "500"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and lines_of(out) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=180)
    assert process.returncode != 0
    (name,) = saved(out)
    assert f"Stopped. Step {int(name.removeprefix('step-'))} is saved in {out}" in said
    assert len({key.split()[0] for key in digests(out)}) == 3  # both processes' shares, and the weights
