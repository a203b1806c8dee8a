"""`dpar app` without its page: the functions behind the tabs, and its start."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpar import DPARPipeline, locations
from dpar.errors import ModelError
from dpar.flops import count, linear_macs
from dpar.presets import preset
from pipeline.app.compute import Compute
from pipeline.app.drawing import Choices, edit, generate, mask_of_layers, place_patches
from pipeline.app.jobs import Cancelled, Jobs
from pipeline.app.model import Model, load_model, percent
from pipeline.app.pictures import drawn, entropy_picture, shared_scale, write_png
from pipeline.app.serve import serve
from pipeline.runtime.errors import StageError
from pipeline.settings.app import AppSettings
from tests.pipeline.sampled import BUNDLE_CLASSES, SIDE, SIZE, N, save_bundles, save_run

ROOT = Path(__file__).parents[2]
SETTINGS = AppSettings(device="cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundles(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def model(home: Path) -> Model:
    return load_model(str(home / "dpar-bundle"), SETTINGS)


@pytest.fixture(scope="module")
def photo(home: Path) -> Image.Image:
    return Image.open(home / "photos" / "bird" / "0.png")


def pixels(images: list[Image.Image]) -> list[Any]:
    return [np.asarray(image).tolist() for image in images]


def test_the_settings_in_a_downloaded_png_sample_the_same_picture(model: Model, tmp_path: Path) -> None:
    pictures = generate(model, [0, 2], 2, Choices(cfg_scale=3.0, temperature=0.8, top_k=20, top_p=0.9, seed=5))
    with Image.open(write_png(pictures[3], tmp_path)) as file:
        assert isinstance(file.info["parameters"], str)
        settings = json.loads(file.info["parameters"])
        downloaded = np.asarray(file).tolist()
    assert (settings["class"], settings["patches"]) == ("fish", int(pictures[3].starts.sum()))
    names = ("cfg_scale", "temperature", "top_k", "top_p", "threshold", "seed")
    again = model.pipe(["bird", "bird", "fish", "fish"], **{name: settings[name] for name in names})
    assert np.asarray(again.images[settings["index"]]).tolist() == downloaded


def test_a_picture_is_shown_with_its_patches_and_its_entropies(model: Model) -> None:
    pictures = generate(model, [1], 2, Choices())
    assert drawn(pictures[0], True, 64).size == drawn(pictures[0], False, 64).size == (64, 64)
    assert pixels([drawn(pictures[0], True, 64)]) != pixels([drawn(pictures[0], False, 64)])
    low, high = shared_scale(pictures)
    finite = np.concatenate([picture.entropy[1:] for picture in pictures if picture.entropy is not None])
    assert low <= np.quantile(finite, 0.02) < np.quantile(finite, 0.98) <= high
    assert entropy_picture(pictures[0], (low, high)) is not None


@pytest.mark.parametrize(
    ("threshold", "max_length", "row_reset"), [(0.0, 4, True), (3.2, 0, False), (9.0, 3, False), (9.0, 0, True)]
)
def test_sliders_recompute_patches_from_stored_entropies(
    home: Path, photo: Image.Image, threshold: float, max_length: int, row_reset: bool
) -> None:
    model = load_model(str(home / "dpar-bundle"), SETTINGS)
    measured = model.pipe.patchify(photo)
    expected = model.pipe.patchify(photo, threshold=threshold, max_length=max_length, row_reset=row_reset)
    model.pipe.entropy_model = None
    placed = place_patches(model, measured, threshold, max_length, row_reset)
    assert placed.patches == expected.patches
    assert placed.picture.width >= 16 * SIZE


def test_editing_samples_what_is_painted_and_reports_what_is_kept(model: Model, photo: Image.Image) -> None:
    layer = Image.new("RGBA", photo.size, (0, 0, 0, 0))
    layer.paste((255, 0, 0, 255), (0, 10, 10, 12))  # 10 × 12 pixels, cropped to the middle 10 rows
    mask = mask_of_layers([None, layer], photo.size)
    assert mask.getextrema() == (0, 255)
    by_mask = edit(model, photo, 1, 2, Choices(seed=3), mask=mask)
    by_rows = edit(model, photo, 1, 2, Choices(seed=3), keep_rows=SIDE - 1)
    assert by_mask[0].settings["kept_tokens"] == N - SIDE
    assert pixels([p.image for p in by_mask]) == pixels([p.image for p in by_rows])
    assert pixels([by_rows[0].image]) != pixels([by_rows[1].image])


@pytest.mark.parametrize(
    ("labels", "each", "values", "message"),
    [
        ([], 1, {}, "choose at least one class"),
        ([0, 1, 2], 30, {}, "90 pictures were requested; from 1 to 64 are possible"),
        ([7], 1, {}, "no class 7; they are 0 to 2"),
        ([0], 1, {"seed": None}, "seed is empty; give a number"),
        ([0], 1, {"seed": -1}, "the seed is -1; it must be from 0 to"),
        ([0], 1, {"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
    ],
)
def test_wrong_choices_are_one_message(
    model: Model, labels: list[int], each: int, values: dict[str, Any], message: str
) -> None:
    with pytest.raises((StageError, ModelError), match=message):
        generate(model, labels, each, Choices(**values))


def test_editing_without_an_image_or_with_nothing_painted_is_one_message(model: Model, photo: Image.Image) -> None:
    with pytest.raises(StageError, match="choose an image first"):
        edit(model, None, 0, 1, Choices(), keep_rows=2)
    with pytest.raises(ModelError, match="there is nothing to sample: the mask has no white pixel"):
        edit(model, photo, 0, 1, Choices(), mask=mask_of_layers([], photo.size))


def test_compute_saved_is_the_difference_to_a_llamagen_of_the_same_depth_and_width() -> None:
    sizes: dict[str, Any] = {"codebook_size": 64, "grid_height": 8, "grid_width": 8, "classes": 3}
    dpar, llamagen = preset("dpar-tiny", **sizes), preset("llamagen-tiny", **sizes)
    entropy_model = preset("llamagen-xs", **{**sizes, "classes": 0}, start_token=False)
    compute = Compute(dpar, entropy_model)  # type: ignore[arg-type]
    assert compute.baseline == llamagen
    baseline = count(llamagen)
    one_pass = compute.saved(40.0, guided=False)
    assert one_pass.generator == pytest.approx(1 - linear_macs(dpar, 40.0) / baseline.linear)
    assert one_pass.generator - one_pass.total == pytest.approx(count(entropy_model).linear / baseline.linear)
    guided = compute.saved(32.0, guided=True)
    expected = count(dpar, 2.0).sampling(count(entropy_model), True) / baseline.sampling(None, True)
    assert guided.total == pytest.approx(1 - expected)


def test_a_share_that_rounds_to_zero_has_no_sign() -> None:
    assert [percent(share) for share in (-0.002, 0.002, 0.19, -0.04)] == [
        "0\u00a0%",
        "0\u00a0%",
        "19\u00a0%",
        "−4\u00a0%",
    ]


def test_a_session_can_stop_only_its_own_job() -> None:
    jobs, started = Jobs(), threading.Event()
    outcome: list[str] = []

    def work(progress: Any) -> None:
        started.set()
        for _ in range(6000):
            progress(0.5)
            time.sleep(0.01)

    def run() -> None:
        try:
            jobs.run("one", work)
        except Cancelled:
            outcome.append("cancelled")

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(30)
    jobs.stop("another")
    time.sleep(0.1)
    assert thread.is_alive()
    jobs.stop("one")
    thread.join(30)
    assert outcome == ["cancelled"]
    assert jobs.run("one", lambda progress: 7) == 7  # and the next one runs


def test_jobs_run_one_at_a_time() -> None:
    jobs, running, most = Jobs(), [0], [0]

    def work(_: Any) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.05)
        running[0] -= 1

    threads = [threading.Thread(target=jobs.run, args=(str(i), work)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_run_is_loaded_with_its_moving_average(home: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "other", home / "patches", "dpar-tiny", seed=9)
    shutil.copytree(home / "dpar", tmp_path / "run")
    last = generate(load_model(str(tmp_path / "run"), SETTINGS), [0], 1, Choices())
    shutil.copytree(tmp_path / "other" / "model", tmp_path / "run" / "model-ema")
    average = generate(load_model(str(tmp_path / "run"), SETTINGS), [0], 1, Choices())
    other = generate(load_model(str(tmp_path / "other"), SETTINGS), [0], 1, Choices())
    assert pixels([average[0].image]) == pixels([other[0].image])
    assert pixels([average[0].image]) != pixels([last[0].image])


def test_a_built_in_bundle_is_loaded_like_any_other(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(locations.BUILTIN, "builtin:test", str((home / "dpar-bundle").absolute()))
    assert load_model("builtin:test", SETTINGS).pipe.class_names == BUNDLE_CLASSES
    assert locations.weights_path("builtin:test", "tokenizer") == str(home / "dpar-bundle" / "tokenizer")
    assert DPARPipeline.from_pretrained("builtin:test").rule == load_model("builtin:test", SETTINGS).pipe.rule


def test_a_llamagen_samples_and_has_no_patches_to_show(home: Path) -> None:
    model = load_model(str(home / "llama-bundle"), SETTINGS)
    pictures = generate(model, [0], 1, Choices(threshold=None))
    assert pictures[0].entropy is None
    assert not model.by_entropy
    assert "no patches" in " ".join(model.patches_text(float(N), guided=True))


def test_a_port_in_use_is_one_message(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StageError, match=f"cannot listen at 127.0.0.1, port {port}: Address already in use"):
            serve(str(home / "dpar-bundle"), AppSettings(port=port), ready=print)


def test_missing_gradio_is_one_message_with_the_extra(home: Path, tmp_path: Path) -> None:
    (tmp_path / "gradio.py").write_text("raise ImportError('not installed')")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "COLUMNS": "300"}
    command = [sys.executable, "-m", "dpar", "app", str(home / "dpar-bundle")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["Error: dpar app needs Gradio: pip install 'dpar[app]'"]
