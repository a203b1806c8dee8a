"""Two processes of one run give the numbers of one process, with DDP and with FSDP."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.trained import (
    EXACT,
    build,
    chosen,
    command,
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

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("made") / "patches")


def same_numbers(one: Path, other: Path) -> None:
    """Compare losses, held-out scores, weights and their average, up to float32 rounding of reordered sums."""
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
def test_two_processes_with_ddp_and_with_fsdp_give_the_numbers_of_one(patches: Path, tmp_path: Path) -> None:
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
    # each resumes from a checkpoint of another number of processes or of the other mode
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
    assert f"Stopped. Step {step} is saved in {out}; run the same command again to resume." in said[0]
    assert not said[1]
    assert metrics(out)[-1]["step"] == step


def torchrun(patches: Path, out: Path, module: str = "torch.distributed.run", **values: Any) -> Any:
    """Run ``dpar train`` in two processes started by torchrun or by `dpar-torchrun`."""
    launcher = [sys.executable, "-m", module, "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "-m", "dpar", "train", str(patches), str(out), *options(chosen(**values))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "500"},
        cwd=patches.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_an_error_of_all_processes_or_of_the_first_is_printed_once(patches: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    run(patches, out, steps=1)
    for values in ({"steps": 1, "lr": 5e-4}, {"steps": 1, "batch": 3}):  # found by the first process; by all
        process = torchrun(patches, out, **values)
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 1
        assert [line[:7] for line in errors.splitlines()].count("Error: ") == 1, errors
        assert "another process of this run has ended" not in errors


@pytest.mark.slow
def test_a_changed_share_makes_all_processes_resume_from_the_previous_checkpoint(patches: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    settings: dict[str, Any] = {"steps": 2, "checkpoint_every": 1, "fsdp": True}
    ends(together(patches, out, **settings))
    before = digests(out)
    share = out / "checkpoints" / "step-00000002" / "shard-00002-model-00001-of-00001.safetensors"
    content = bytearray(share.read_bytes())
    content[-100] ^= 1
    share.write_bytes(content)
    messages, _ = ends(together(patches, out, **settings))
    assert f"step-00000002 is damaged: {share.name} has changed since it was written" in messages
    assert digests(out) == before


@pytest.mark.slow
def test_a_second_command_on_a_run_is_refused_and_a_killed_one_does_not_block(patches: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    first = command(patches, out, steps=500, checkpoint_every=1000)
    while first.poll() is None and lines_of(out) < 1:
        time.sleep(0.01)
    (refusal,) = ends([command(patches, out, steps=500, checkpoint_every=1000)], 1)
    assert f"Error: {out} is in use by process {first.pid} on " in refusal
    assert first.poll() is None
    first.kill()
    first.communicate()
    ends([command(patches, out, steps=2, override=True)])
    assert [line["step"] for line in metrics(out)] == [1, 2]


@pytest.mark.slow
def test_dpar_torchrun_exits_with_the_status_of_the_signal_or_error_and_no_traceback(
    patches: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    process = torchrun(patches, out, "pipeline.runtime.torchrun", steps=500, checkpoint_every=1000)
    while process.poll() is None and lines_of(out) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 75, errors
    assert errors.count("Stopped. Step ") == 1
    assert "Traceback" not in errors
    (name,) = saved(out)
    assert metrics(out)[-1]["step"] == int(name.removeprefix("step-"))
    process = torchrun(patches, out, "pipeline.runtime.torchrun", steps=500, batch=3)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 1
    assert "Traceback" not in errors


@pytest.mark.slow
def test_one_process_prints_the_summary_and_locks_the_run(patches: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    process = torchrun(patches, out, steps=2)
    printed, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert printed.count("step 2, bits/token") == 1
    assert errors.count("weights: ") == 1
    assert "Warning: `broadcast_buffers`" not in errors


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves_one_step_in_all_processes(patches: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    process = torchrun(patches, out, steps=500, checkpoint_every=1000)
    while process.poll() is None and lines_of(out) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=180)
    assert process.returncode != 0
    (name,) = saved(out)
    assert f"Stopped. Step {int(name.removeprefix('step-'))} is saved in {out}" in said
    assert len({key.split()[0] for key in digests(out)}) == 3  # both processes' shares, and the weights
