"""Full and read-only disks and a source that disappears, with real file systems and processes."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpar.tokenizer import VQConfig, VQTokenizer
from pipeline.runtime.progress import Progress
from pipeline.settings.artifacts import TokenizeSettings
from pipeline.tokenize import tokenize
from shards.manifest import BUILD, MANIFEST

IMAGES = 800  # more than are read ahead
ENCODE: dict[str, Any] = {"image_size": 16, "shard_size": 20, "device": "cpu"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a tokenizer, and the artifact of an undisturbed run."""
    home = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        path = home / "photos" / f"class {i % 2}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    torch.manual_seed(0)
    config = VQConfig(codebook_size=32, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)
    VQTokenizer(config).save_pretrained(home / "vq")
    settings = TokenizeSettings(tokenizer=str(home / "vq"), **ENCODE)
    assert tokenize(str(home / "photos"), home / "undisturbed", settings, Progress(quiet=True)) is not None
    return home


def command(home: Path, out: Path) -> list[str]:
    words: list[object] = ["-m", "dpar", "tokenize", home / "photos", out, "--tokenizer", home / "vq"]
    for name, value in ENCODE.items():
        words += [f"--{name.replace('_', '-')}", value]
    return [sys.executable, *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_only_whole_shards(out: Path, home: Path) -> int:
    """Return the number of shards; require that each is complete and that there are no partial files."""
    assert not (out / MANIFEST).exists()
    assert not list(out.glob("*.part"))
    whole = files(home / "undisturbed")
    found = {name: digest for name, digest in files(out).items() if name.endswith(".arrow")}
    assert found.items() <= whole.items()
    return len(found)


def check_one_message(said: str, *parts: str) -> None:
    errors = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, said
    assert "Traceback" not in said
    for part in parts:
        assert part in errors[0]


def in_own_mounts(script: str) -> None:
    """Run a shell script that may mount private file systems; skip the test where that is forbidden."""
    probe = "mkdir -p /tmp && mount -t tmpfs tmpfs /tmp"
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    tried = subprocess.run(["unshare", "-rm", "sh", "-c", probe], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"may not mount in a namespace of its own: {tried.stderr.strip()}")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-euc", script], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_full_disk_is_one_message_and_the_same_command_resumes(home: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    again = shlex.join(command(home, disk / "a"))
    in_own_mounts(
        f"""
        cd {shlex.quote(str(tmp_path))}
        mount -t tmpfs -o size=200k tmpfs disk
        status=0; {again} > said 2>&1 || status=$?
        echo $status > status
        cp -r disk/a full
        mount -o remount,size=64m disk
        {again}
        cp -r disk/a mended
        """
    )
    assert (tmp_path / "status").read_text() == "1\n"
    said = (tmp_path / "said").read_text()
    check_one_message(said, "No space left on device", "free some space and run the same command again", "are kept")
    assert 0 < check_only_whole_shards(tmp_path / "full", home) < IMAGES // ENCODE["shard_size"]
    assert files(tmp_path / "mended") == files(home / "undisturbed")


def test_a_read_only_output_is_one_message_before_any_work(home: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    again = shlex.join(command(home, disk / "a"))
    in_own_mounts(
        f"""
        cd {shlex.quote(str(tmp_path))}
        mount -t tmpfs -o ro tmpfs disk
        status=0; {again} > said 2>&1 || status=$?
        echo $status > status
        test -z "$(ls disk)"
        mount -o remount,rw disk
        {again}
        cp -r disk/a mended
        """
    )
    assert (tmp_path / "status").read_text() == "1\n"
    said = (tmp_path / "said").read_text()
    check_one_message(said, "Read-only file system", str(disk), "run the same command again, or name another output")
    assert files(tmp_path / "mended") == files(home / "undisturbed")


def test_a_missing_source_stops_the_stage_and_the_same_command_resumes_when_it_is_back(
    home: Path, tmp_path: Path
) -> None:
    out, photos, away = tmp_path / "a", home / "photos", home / "away"
    process = subprocess.Popen(
        command(home, out), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and not list((out / BUILD).glob("[0-9]*.json")):
        time.sleep(0.001)
    photos.rename(away)
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        away.rename(photos)
    assert process.returncode == 1, said
    check_one_message(said, str(photos), "Finished shards are kept", "run the same command again")
    assert check_only_whole_shards(out, home) > 0
    done = subprocess.run(command(home, out), env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert files(out) == files(home / "undisturbed")
