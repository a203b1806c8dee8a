import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dpar.tokenizer import VQTokenizer, from_uint8
from pipeline.runs.run_folder import read_metrics
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.settings.training import TrainTokenizerSettings
from pipeline.sources import open_indexed
from pipeline.sources.crops import views
from pipeline.train_tokenizer import train_tokenizer

QUIET = Progress(quiet=True)
SMALL = TrainTokenizerSettings(
    codebook_size=32, image_size=16, classes=("cat", "coffee"), steps=12, batch=4, checkpoint_every=4, precision="fp32"
)


def error(weights: Path) -> float:
    """Return the mean squared reconstruction error on crops of held-out photographs."""
    source = open_indexed("builtin:photos", split="validation", classes=("cat", "coffee"))
    pixels = np.concatenate([views(source.load(i), 16, "center", (1.0,)) for i in range(len(source))])
    images = from_uint8(torch.from_numpy(pixels))
    tokenizer = VQTokenizer.from_pretrained(weights)
    with torch.no_grad():
        return float((tokenizer.decode(tokenizer.encode(images)) - images).square().mean())


def test_training_lowers_the_error_on_held_out_images(tmp_path: Path) -> None:
    short = train_tokenizer("builtin:photos", tmp_path / "short", dataclasses.replace(SMALL, steps=1), QUIET)
    long = train_tokenizer("builtin:photos", tmp_path / "long", dataclasses.replace(SMALL, steps=120), QUIET)
    assert error(long) < 0.7 * error(short)


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, steps=60, restart_every=7, checkpoint_every=13)
    train_tokenizer("builtin:photos", tmp_path / "whole", settings, QUIET)
    options = [
        f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(settings).items() if isinstance(v, int | str)
    ]
    options += ["--classes=cat", "--classes=coffee"]
    command = [sys.executable, "-m", "dpar", "train-tokenizer", "builtin:photos", str(tmp_path / "broken"), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "broken").glob("checkpoints/step-*/checkpoint.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert "run the same command again to resume" in " ".join(said.split())
    subprocess.run(command, check=True, capture_output=True)
    one, other = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "broken"))
    assert one == other


def test_more_steps_continue_from_the_last_checkpoint(tmp_path: Path) -> None:
    train_tokenizer("builtin:photos", tmp_path / "vq", dataclasses.replace(SMALL, steps=2), QUIET)
    train_tokenizer("builtin:photos", tmp_path / "vq", dataclasses.replace(SMALL, steps=3), QUIET)
    assert [line["step"] for line in read_metrics(tmp_path / "vq")] == [2, 3]
    assert [path.name for path in sorted((tmp_path / "vq" / "checkpoints").iterdir())][-1] == "step-00000003"


def test_codes_used_is_logged_before_a_restart_clears_the_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.train_tokenizer.LOG_EVERY", 2)
    train_tokenizer("builtin:photos", tmp_path / "vq", dataclasses.replace(SMALL, steps=4, restart_every=2), QUIET)
    assert all(line["codes_used"] > 0 for line in read_metrics(tmp_path / "vq"))


def test_several_processes_of_torchrun_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StageError, match="trains in one process; start it without torchrun"):
        train_tokenizer("builtin:photos", tmp_path / "vq", SMALL, QUIET)


def test_bf16_weights_take_half_the_space_and_load_as_float32(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, steps=1)
    full = train_tokenizer("builtin:photos", tmp_path / "a", settings, QUIET)
    half = train_tokenizer("builtin:photos", tmp_path / "b", dataclasses.replace(settings, weights_dtype="bf16"), QUIET)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]
    assert VQTokenizer.from_pretrained(half).quantize.embedding.weight.dtype == torch.float32


@pytest.mark.slow
def test_the_adversarial_loss_trains_a_discriminator_from_its_first_step_on(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, adversarial_weight=0.1, adversarial_start=3, image_size=32, steps=6)
    train_tokenizer("builtin:photos", tmp_path / "vq", settings, QUIET)
    assert "adversarial" in read_metrics(tmp_path / "vq")[-1]


def test_an_image_size_that_does_not_divide_and_other_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="multiple of 8"):
        train_tokenizer("builtin:photos", tmp_path / "vq", dataclasses.replace(SMALL, image_size=20), QUIET)
    train_tokenizer("builtin:photos", tmp_path / "vq", dataclasses.replace(SMALL, steps=1), QUIET)
    with pytest.raises(StageError, match=r"lr was 0.001 and is now 0.002"):
        train_tokenizer("builtin:photos", tmp_path / "vq", dataclasses.replace(SMALL, steps=1, lr=2e-3), QUIET)
