"""Checkpoints under kills, signals and full disks."""

import io
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pipeline.runs.checkpoints import damage, load_full_tensors, own_share
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.train import train
from shards.files import file_sha256
from tests.pipeline.trained import (
    build,
    chosen,
    command,
    digests,
    ends,
    lines_of,
    metrics,
    results,
    run,
    saved,
    weights,
)

LIKELY: dict[str, Any] = {"dropout": 0.1, "guidance_dropout": 0.3}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("made") / "patches")


def wait_until_lines(process: Any, out: Path, lines: int, saving: bool = False) -> None:
    """Wait until the run has this many lines of metrics and, if requested, is saving a checkpoint."""
    while process.poll() is None and not (
        lines_of(out) >= lines and (not saving or list(out.glob("checkpoints/*.part")))
    ):
        time.sleep(0.001)


@pytest.mark.slow
def test_a_run_killed_while_saving_resumes_from_the_previous_checkpoint_to_the_same_bytes(
    patches: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": 12, "checkpoint_every": 1, "ema": 0.9, **LIKELY}
    out, reached, hits = tmp_path / "killed", 0, 0
    luck = random.Random(0)
    for _ in range(5):
        process = command(patches, out, **settings)
        wait_until_lines(process, out, reached + 1, saving=True)
        time.sleep(luck.random() * 0.05)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
        hits += bool(list(out.glob("checkpoints/*.part")))
        found = [out / "checkpoints" / name for name in saved(out) if not name.endswith(".part")]
        assert all(damage(path) is None for path in found)
        if found:
            published = weights(out)  # never half-written; of the newest checkpoint, or of one about to appear
            assert published.keys() == load_full_tensors(found[-1], "model.").keys()
        reached = lines_of(out)
    assert hits >= 2
    run(patches, out, **settings)
    run(patches, tmp_path / "undisturbed", **settings)
    assert digests(out) == digests(tmp_path / "undisturbed")
    assert results(out) == results(tmp_path / "undisturbed")
    assert [line["step"] for line in metrics(out)] == list(range(1, 13))


@pytest.mark.slow
def test_signals_save_the_step_exit_with_their_status_and_say_how_to_resume(patches: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    settings: dict[str, Any] = {"steps": 60, "checkpoint_every": 1000, **LIKELY}
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)):
        reached = lines_of(out)
        process = command(patches, out, **settings)
        wait_until_lines(process, out, reached + 3)
        process.send_signal(number)
        (said,) = ends([process], status)
        step = int(saved(out)[-1].removeprefix("step-"))
        assert reached < step < 60
        assert f"Stopped. Step {step} is saved in {out}; run the same command again to resume." in said
        assert "Traceback" not in said
        assert metrics(out)[-1]["step"] == step
    run(patches, out, **settings)
    run(patches, tmp_path / "undisturbed", **settings)
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(tmp_path / "undisturbed").items())
    assert results(out) == results(tmp_path / "undisturbed")


def test_a_checkpoint_too_large_for_the_disk_keeps_the_previous_one(patches: Path, tmp_path: Path) -> None:
    settings = {"steps": 4, "checkpoint_every": 2}
    run(patches, tmp_path / "a", **settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000004")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            StageError, match=r"step 4 could not be saved in .*: File too large.*newest checkpoint is step-00000002"
        ):
            run(patches, tmp_path / "b", **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved(tmp_path / "b") == ["step-00000002"]
    assert not list((tmp_path / "b").rglob("*.part"))
    run(patches, tmp_path / "b", **settings)
    assert digests(tmp_path / "b") == digests(tmp_path / "a")


def test_an_incomplete_checkpoint_is_skipped_and_none_left_is_an_error(patches: Path, tmp_path: Path) -> None:
    settings = {"steps": 4, "checkpoint_every": 2}
    run(patches, tmp_path / "a", **settings)
    before = digests(tmp_path / "a")
    for name in ("checkpoint.json", "shard-00001-model-00001-of-00001.safetensors"):
        (tmp_path / "a" / "checkpoints" / "step-00000004" / name).unlink()
        run(patches, tmp_path / "a", **settings)
        assert digests(tmp_path / "a") == before
    for path in (tmp_path / "a").glob("checkpoints/*/checkpoint.json"):
        path.unlink()
    with pytest.raises(StageError, match=r"all checkpoints in .* are damaged"):
        run(patches, tmp_path / "a", **settings)


@pytest.mark.parametrize("change", ["a bit", "a block of zeros"])
def test_a_changed_checkpoint_is_skipped_for_the_previous_one_with_a_message(
    patches: Path, tmp_path: Path, change: str
) -> None:
    settings = {"steps": 4, "checkpoint_every": 2}
    run(patches, tmp_path / "a", **settings)
    before = digests(tmp_path / "a")
    (newest,) = (tmp_path / "a" / "checkpoints" / "step-00000004").glob("*.safetensors")
    content = bytearray(newest.read_bytes())
    if change == "a bit":
        content[-1000] ^= 1
    else:
        content[-5000:] = bytes(5000)
    newest.write_bytes(content)
    with pytest.raises(StageError, match=r"step-00000004 is damaged: .* has changed since it was written"):
        load_full_tensors(newest.parent, "model.")
    messages = io.StringIO()
    train(patches, tmp_path / "a", chosen(**settings), Progress(Console(file=messages, width=500)))
    assert f"step-00000004 is damaged: {newest.name} has changed since it was written" in messages.getvalue()
    assert "using the one before it" in messages.getvalue()
    assert digests(tmp_path / "a") == before


def test_the_seal_has_sha256_of_each_file_and_sizes_alone_are_accepted(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a", steps=2)
    (checkpoint,) = (tmp_path / "a" / "checkpoints").iterdir()
    seal = json.loads((checkpoint / "checkpoint.json").read_text())
    shards = list(checkpoint.glob("*.safetensors"))
    expected = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in shards}
    assert seal["files"] == expected
    seal["files"] = {name: sealed["bytes"] for name, sealed in expected.items()}
    (checkpoint / "checkpoint.json").write_text(json.dumps(seal))
    assert damage(checkpoint) is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", r"is [], expected an object"),
        ('{"notes": {"step": "two"}, "files": {}}', "field notes.step is 'two', expected an integer"),
        ('{"notes": {"step": 3}, "files": {}}', "step is 3, expected that of the folder's name"),
        ('{"notes": {"step": 2}, "files": {"a": 1e400}}', "field files.a is inf, expected"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_seal_with_wrong_values_makes_a_damaged_checkpoint(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002" / "checkpoint.json").write_text(content)
    fault = damage(tmp_path / "step-00000002")
    assert fault is not None
    assert "checkpoint.json" in fault
    assert says in fault


def test_the_state_is_split_over_processes_in_about_equal_shares() -> None:
    sizes = [7, 1, 400, 3, 90, 90, 120, 5, 33, 210]
    tensors = {f"model.{place}": torch.zeros(size) for place, size in enumerate(sizes)}
    for processes in (1, 2, 3, 8):
        shares = [own_share(tensors, process, processes) for process in range(processes)]
        assert sorted(name for share in shares for name in share) == sorted(tensors)
        taken = [sum(len(tensor) for tensor in share.values()) for share in shares]
        assert max(taken) <= 4 / 3 * max(400, sum(sizes) / processes)
    assert not own_share(tensors, 15, 16)  # more processes than tensors


@pytest.mark.slow
def test_out_of_memory_is_one_message_with_the_settings_to_lower(patches: Path, tmp_path: Path) -> None:
    script = f"""
import resource, pathlib
from pipeline.settings.training import TrainSettings
from pipeline.train import train
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 1_000_000_000,) * 2)
try:
    settings = TrainSettings(model="dpar-b", batch=4, steps=1, device="cpu", precision="fp32")
    train(pathlib.Path({str(patches)!r}), pathlib.Path({str(tmp_path / "a")!r}), settings)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "memory is full. Run the same command with a lower --micro-batch (now 4; " in done.stdout
    assert "--checkpoint-layers" in done.stdout


def test_each_start_is_recorded_with_its_command_and_step(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a", steps=2)
    run(patches, tmp_path / "a", steps=2)
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert [start["step"] for start in record["history"]] == [0, 2]
    assert record["history"][1]["command"] == record["command"] == sys.argv
    assert torch.__version__.startswith(record["history"][1]["made_by"]["torch"])
