import hashlib
import io
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from rich.console import Console

import dpar
from dpar.tokenizer import VQConfig, VQTokenizer, from_uint8
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress, Task
from pipeline.settings.artifacts import TokenizeSettings
from pipeline.sources import open_indexed
from pipeline.sources.crops import views
from pipeline.tokenize import tokenize
from shards.locks import Claims
from shards.manifest import BUILD, MANIFEST, Manifest
from shards.reader import open_artifact

SIZE, SIDE, V = 16, 8, 32
CLASSES = ("bird", "cät")
A_CLASS = 5
QUIET = Progress(quiet=True)


pytestmark = pytest.mark.usefixtures("one_thread")


def picture(rng: np.random.Generator) -> Image.Image:
    width, height = rng.integers(20, 60, 2)
    return Image.fromarray(rng.integers(0, 256, (int(height), int(width), 3), np.uint8))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a folder of usable images, and one with two unusable images."""
    home = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    for folder in ("photos", "mixed"):
        for name in CLASSES:
            (home / folder / name).mkdir(parents=True)
            for i in range(A_CLASS):
                picture(rng).save(home / folder / name / f"{i}.png")
    stream = io.BytesIO()
    picture(rng).save(stream, "JPEG")
    (home / "mixed" / "bird" / "2b cut.jpg").write_bytes(stream.getvalue()[:-200])
    (home / "mixed" / "cät" / "notes.jpg").write_text("not a picture at all")
    torch.manual_seed(0)
    config = VQConfig(codebook_size=V, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)
    VQTokenizer(config).save_pretrained(home / "vq")
    return home


def chosen(home: Path, **values: Any) -> TokenizeSettings:
    return TokenizeSettings(
        **{"tokenizer": str(home / "vq"), "image_size": SIZE, "shard_size": 3, "device": "cpu", **values}
    )


def run(home: Path, out: Path, data: str = "photos", **values: Any) -> Manifest:
    manifest = tokenize(str(home / data), out, chosen(home, **values), QUIET)
    assert manifest is not None
    return manifest


def command(home: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    """Start ``dpar tokenize`` on the usable images in a new process, one image per shard."""
    options = ["--tokenizer", str(home / "vq"), "--image-size", str(SIZE), "--shard-size", "1", "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", "dpar", "tokenize", str(home / "many"), str(out), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "500", **environment},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def many(home: Path) -> Path:
    """The artifact of an undisturbed run with enough images for a run to be stopped."""
    rng = np.random.default_rng(1)
    for name in CLASSES:
        (home / "many" / name).mkdir(parents=True)
        for i in range(60):
            picture(rng).save(home / "many" / name / f"{i}.png")
    run(home, home / "undisturbed", "many", shard_size=1)
    return home / "undisturbed"


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def wait_for_shards(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and len(list((out / BUILD).glob("[0-9]*.json"))) < count:
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()


@pytest.mark.parametrize("container", ["arrow", "webdataset"])
@pytest.mark.parametrize(("kind", "crop_range"), [("center", (1.0,)), ("ten-crop", (1.1, 1.05))])
def test_codes_equal_the_tokenizers_on_each_crop(
    home: Path, tmp_path: Path, container: str, kind: Any, crop_range: tuple[float, ...]
) -> None:
    manifest = run(home, tmp_path / "a", views=kind, crop_range=crop_range, container=container, batch=7)
    artifact = open_artifact(tmp_path / "a", kind="codes")
    source = open_indexed(str(home / "photos"))
    tokenizer = VQTokenizer.from_pretrained(home / "vq")
    assert (manifest.rows, manifest.grid, manifest.codebook_size) == (len(source), (SIDE, SIDE), V)
    assert manifest.class_names == CLASSES
    assert manifest.views == (1 if kind == "center" else 20)
    assert manifest.tokenizer["fingerprint"] == dpar.fingerprint(home / "vq")
    row = 0
    for index in range(len(manifest.shards)):
        rows = artifact.shard_rows(index)
        for i in range(len(rows)):
            crops = views(source.load(row), SIZE, kind, crop_range)
            with torch.no_grad():
                codes = tokenizer.encode(from_uint8(torch.from_numpy(crops)))
            np.testing.assert_array_equal(rows.codes[i], codes.numpy())
            assert rows.keys[i] == source.key(row)
            assert rows.labels[i] == source.label(row)
            row += 1
    assert row == len(source)


def test_codes_do_not_depend_on_the_number_of_threads_that_decode(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "a", workers=1)
    run(home, tmp_path / "b", workers=4)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_images_that_cannot_be_used_are_left_out_counted_and_listed_with_reasons(home: Path, tmp_path: Path) -> None:
    mixed = run(home, tmp_path / "a", "mixed")
    assert (mixed.rows, mixed.left_out) == (2 * A_CLASS, 2)
    listed = (tmp_path / "a" / "left_out.tsv").read_text(encoding="utf-8").splitlines()
    assert listed[0] == "key\treason"
    found = dict(line.split("\t") for line in listed[1:])
    assert list(found) == ["bird/2b cut.jpg", "cät/notes.jpg"]
    assert "truncated" in found["bird/2b cut.jpg"]
    assert "not an image" in found["cät/notes.jpg"]
    artifact = open_artifact(tmp_path / "a")
    keys = artifact.keys(np.arange(len(artifact)))
    assert keys == [f"{name}/{i}.png" for name in CLASSES for i in range(A_CLASS)]


def test_files_rejected_by_the_listing_are_left_out_too(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "empty").mkdir(parents=True)
    (data / "cat").mkdir()
    (data / "cat" / "bird").symlink_to(home / "photos" / "bird")
    for i in range(2):
        Image.new("RGB", (20, 20)).save(data / "cat" / f"{i}.png")
    Image.new("RGB", (20, 20)).save(data / "stray.png")
    manifest = tokenize(str(data), tmp_path / "a", chosen(home), QUIET)
    assert manifest is not None
    assert (manifest.rows, manifest.left_out) == (2, 3)
    listed = (tmp_path / "a" / "left_out.tsv").read_text(encoding="utf-8")
    assert all(f"\n{key}\t" in listed for key in ("cat/bird", "empty", "stray.png"))


def test_strict_stops_at_the_first_image_that_cannot_be_used(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"bird/2b cut\.jpg: .*truncated.*Without --strict it would be left out"):
        run(home, tmp_path / "a", "mixed", strict=True)
    assert not (tmp_path / "a" / MANIFEST).exists()
    assert run(home, tmp_path / "a", "mixed").left_out == 2  # resumes without it


def test_strict_refuses_images_that_an_earlier_run_left_out(home: Path, tmp_path: Path) -> None:
    made = run(home, tmp_path / "a", "mixed")
    with pytest.raises(StageError, match=r"2 images cannot be used.*left_out\.tsv has the reasons"):
        run(home, tmp_path / "a", "mixed", strict=True)
    assert run(home, tmp_path / "a", "mixed") == made
    assert run(home, tmp_path / "b") == run(home, tmp_path / "b", strict=True)


def test_a_shard_claimed_by_another_process_is_skipped_and_named(home: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / BUILD).mkdir(parents=True)
    claims = Claims(tmp_path / "a" / BUILD)
    assert claims.claim(1)
    said = io.StringIO()
    progress = Progress(Console(file=said, width=500), quiet=False)
    assert tokenize(str(home / "photos"), tmp_path / "a", chosen(home), progress) is None
    assert "1 shard is still being written by other processes" in said.getvalue()
    claims.release(1)
    run(home, tmp_path / "a")
    run(home, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_each_tar_of_a_stream_is_a_shard_and_numbers_name_its_classes(home: Path, tmp_path: Path) -> None:
    storage = fsspec.filesystem("memory")
    rng = np.random.default_rng(2)
    for index, labels in enumerate(((0, 2), (1, 0, 0))):
        with storage.open(f"/stream/{index}.tar", "wb") as file, webdataset.TarWriter(file) as tar:
            for i, label in enumerate(labels):
                tar.write({"__key__": f"{index}-{i}", "png": picture(rng), "cls": label})
    manifest = tokenize("memory://stream/{0..1}.tar", tmp_path / "a", chosen(home), QUIET)
    assert manifest is not None
    assert [shard.rows for shard in manifest.shards] == [2, 3]
    assert manifest.class_names == ("0", "1", "2")
    artifact = open_artifact(tmp_path / "a")
    assert [[*artifact.shard_rows(index).labels] for index in range(2)] == [[0, 2], [1, 0, 0]]


def test_memory_holds_only_waiting_crops_not_a_full_shard(
    home: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sources.crop_stream.BYTES_AHEAD", 2**20)
    images, bytes_each = 60, 10 * 64 * 64 * 3
    tracemalloc.start()
    try:
        run(home, tmp_path / "a", "many", image_size=64, views="ten-crop", limit=images, shard_size=images)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < images * bytes_each * 0.6


def test_the_number_of_threads_of_torch_is_restored(home: Path, tmp_path: Path) -> None:
    torch.set_num_threads(3)
    try:
        run(home, tmp_path / "a")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_a_source_without_a_single_usable_image_is_one_message_with_reasons(home: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    for i in range(4):
        (tmp_path / "data" / "cat" / f"{i}.jpg").write_text("not a picture")
    for _ in range(2):
        with pytest.raises(StageError, match=r"none of the 4 images of .*data can be used \(cat/0\.jpg: "):
            tokenize(str(tmp_path / "data"), tmp_path / "a", chosen(home), QUIET)


def test_an_invalid_image_size_is_refused_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="--image-size is 15; this tokenizer needs a multiple of 2"):
        run(home, tmp_path / "a", image_size=15)
    assert not (tmp_path / "a").exists()


def test_other_settings_are_refused_with_both_values_and_overwrite_replaces(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "a")
    with pytest.raises(ValueError, match="views was 'center' and is now 'flip'"):
        run(home, tmp_path / "a", views="flip")
    assert run(home, tmp_path / "a", views="flip", overwrite=True).views == 2


def test_images_added_to_the_source_are_noticed(home: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / "data" / "cat" / f"{i}.png")
        if i == 1:
            tokenize(str(tmp_path / "data"), tmp_path / "a", chosen(home), QUIET)
    with pytest.raises(ValueError, match="listing was"):
        tokenize(str(tmp_path / "data"), tmp_path / "a", chosen(home), QUIET)


def test_a_picture_replaced_between_a_stop_and_the_next_run_is_noticed(home: Path, tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "data" / "cat").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / "data" / "cat" / f"{i}.png")
    settings = chosen(home, shard_size=1)
    with pytest.raises(InterruptedError):
        tokenize(str(tmp_path / "data"), tmp_path / "a", settings, Stopping(quiet=True))
    assert list((tmp_path / "a" / BUILD).glob("[0-9]*.json"))
    Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / "data" / "cat" / "3.png")
    with pytest.raises(ValueError, match=r"listing was .* and is now .*--overwrite"):
        tokenize(str(tmp_path / "data"), tmp_path / "a", settings, QUIET)


class Stopping(Progress):
    """Stops the run at its third image, after the first is written."""

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        with super().task(title, total, unit) as task:
            advance = task.advance

            def stop(n: int = 1, note: str = "") -> None:
                advance(n, note)
                if task._done == 3:
                    raise InterruptedError

            task.advance = stop  # type: ignore[method-assign]
            yield task


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(home: Path, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    process = command(home, out)
    wait_for_shards(out, 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / MANIFEST).exists()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("[0-9]*.arrow")}
    run(home, out, "many", shard_size=1)
    assert files(out) == files(many)
    recorded = sorted(kept)[:-1]  # the kill may have come between the last shard and its record
    assert len(recorded) >= 2
    assert all((out / name).stat().st_mtime_ns == kept[name] for name in recorded)


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_says_how_to_resume(home: Path, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    process = command(home, out)
    wait_for_shards(out, 2, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"Stopped. Finished shards are kept in {out}; run the same command again to resume." in said
    assert "Traceback" not in said
    assert not list(out.glob("*.part"))
    run(home, out, "many", shard_size=1)
    assert files(out) == files(many)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(home: Path, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    started = [command(home, out, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in range(2)]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert files(out) == files(many)
