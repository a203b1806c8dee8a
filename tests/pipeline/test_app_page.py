"""The page of `dpar app`, served by a real process: through Gradio's client, and in a browser if installed."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.app.drawing import Choices, generate
from pipeline.app.model import Model, load_model
from pipeline.settings.app import AppSettings
from tests.pipeline.sampled import SIDE, N, save_bundles

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundles(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def model(home: Path) -> Model:
    return load_model(str(home / "dpar-bundle"), AppSettings(device="cpu"))


SAMPLING = (2.0, 1.0, 0, 1.0, 3.1, 4)  # guidance, temperature, top-k, top-p, threshold, seed
WIDTHS = (1280, 420)  # pixels: a screen and a phone
PATIENCE = 240_000  # milliseconds, for a busy machine
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def start_app(bundle: Path, temporary: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """Start `dpar app` in a new process and return it with the address that it prints."""
    pytest.importorskip("gradio", reason="the extra app is not installed")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), "COLUMNS": "300"}
    command = [sys.executable, "-m", "dpar", "app", str(bundle), "--port", str(free_port()), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, *options], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith("The page is at http://127.0.0.1:"), first + process.stdout.read()
    return process, first.split()[-1]


@pytest.fixture(scope="module")
def app(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, address = start_app(home / "dpar-bundle", tmp_path_factory.mktemp("temporary"))
    yield address
    process.terminate()
    process.wait(240)


@pytest.fixture(scope="module")
def client(app: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from gradio_client import Client

    return Client(app, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def test_the_page_generates_and_offers_the_picture_with_its_settings(client: Any, model: Model) -> None:
    status, gallery, *_, download, settings = client.predict(True, [1], 3, *SAMPLING, api_name="/generate")
    expected = generate(model, [1], 3, Choices(cfg_scale=2.0, threshold=3.1, seed=4))
    assert f"{np.mean([picture.starts.sum() for picture in expected]):.1f} patches per image" in status
    assert "Compute saved" in status
    assert "LlamaGen of the same depth and width (6 layers, width 192)" in status
    assert [item["caption"] for item in gallery["value"]] == [picture.caption for picture in expected]
    with Image.open(download["value"]) as file:
        assert np.asarray(file).tolist() == np.asarray(expected[0].image).tolist()
        assert json.loads(file.info["parameters"])["seed"] == 4
    assert settings["seed"] == 4


def test_the_page_shows_the_patches_of_an_uploaded_image(client: Any, model: Model, home: Path) -> None:
    from gradio_client import handle_file

    path = home / "photos" / "bird" / "0.png"
    status, *images = client.predict(handle_file(str(path)), 3.1, 4, True, api_name="/patchify")
    assert f"{model.pipe.patchify(Image.open(path), threshold=3.1).patches} patches" in status
    assert len([image for image in images if image]) == 3


def test_the_page_edits_an_image(client: Any, home: Path) -> None:
    from gradio_client import handle_file

    drawing = {"background": handle_file(str(home / "photos" / "cat" / "1.png")), "layers": [], "composite": None}
    status, gallery, *_ = client.predict(True, drawing, "Keep the top rows", 2, 1, 2, *SAMPLING, api_name="/edit")
    assert f"{2 * SIDE} of {N} tokens kept" in status
    assert len(gallery["value"]) == 2


def test_errors_appear_as_text_on_the_page(client: Any) -> None:
    status, *_ = client.predict(True, [], 1, *SAMPLING, api_name="/generate")
    assert 'role="alert"' in status
    assert "choose at least one class" in status


def test_the_page_fetches_nothing_and_sends_nothing_elsewhere(app: str) -> None:
    page = urllib.request.urlopen(app, timeout=60).read().decode()
    assert '"analytics_enabled":false' in page
    theme = urllib.request.urlopen(f"{app}theme.css", timeout=60).read().decode()
    assert "system-ui" in theme
    assert not re.findall(r"(?:src|href)=\"https?://|@import|fonts\.g", page + theme)


def test_the_app_ends_at_sigterm_and_leaves_no_files(home: Path, tmp_path: Path) -> None:
    process, _ = start_app(home / "dpar-bundle", tmp_path)
    assert list(tmp_path.iterdir())
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 0
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for found in map(shutil.which, BROWSERS) if found), None)
    with playwright.sync_playwright() as driver:
        if path is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)}, nor Playwright's own")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def page(request: Any, browser: Any, app: str) -> Iterator[Any]:
    """The page in a new browser session, checked for errors, foreign requests and sideways scrolling at the end."""
    context = browser.new_context(viewport={"width": request.param, "height": 900})
    context.set_default_timeout(PATIENCE)
    page, problems = context.new_page(), list[str]()
    page.on("console", lambda message: problems.extend([message.text] if message.type == "error" else []))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda asked: problems.extend([asked.url] if asked.url.startswith("http") else []))
    page.goto(app)
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    yield page
    width = page.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert [problem for problem in problems if not problem.startswith(app)] == []
    assert width <= request.param


def shown(page: Any, selector: str) -> Any:
    return page.locator(selector).locator("visible=true")


def wait_for_text(page: Any, text: str) -> None:
    page.get_by_text(re.compile(text)).locator("visible=true").first.wait_for()


def test_generate_in_a_browser(page: Any, tmp_path: Path) -> None:
    page.get_by_role("button", name="Generate", exact=True).click()
    wait_for_text(page, "patches per image")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download PNG").click()
    download.value.save_as(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as file:
        assert json.loads(file.info["parameters"])["class"] == "bird"
    drawn = shown(page, ".pictures img").first.get_attribute("src")
    page.get_by_label("Draw the patches").locator("visible=true").uncheck()
    page.wait_for_function("old => document.querySelector('.pictures img').getAttribute('src') != old", arg=drawn)
    shown(page, ".pictures .thumbnail-item").nth(2).click()
    page.get_by_text("Settings of this picture").locator("visible=true").click()
    wait_for_text(page, "max_length")


def test_patchify_in_a_browser(page: Any) -> None:
    page.get_by_role("tab", name="Patchify").click()
    shown(page, ".gallery-item").first.click()
    wait_for_text(page, r"^\d+ patches$")
    threshold = page.get_by_label("number input for Threshold, nats").locator("visible=true")
    threshold.fill("0")
    threshold.press("Enter")
    wait_for_text(page, f"^{N} patches$")


@pytest.mark.parametrize("mode", ["Keep the top rows", "Draw the part to sample"])
def test_edit_in_a_browser(page: Any, mode: str) -> None:
    page.get_by_role("tab", name="Edit").click()
    shown(page, ".gallery-item").first.click()
    page.get_by_text(mode).click()
    if mode == "Draw the part to sample":
        page.get_by_label("Brush").first.click()
        box = shown(page, "canvas").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2 + 5, steps=4)
        page.mouse.up()
    page.get_by_role("button", name="Edit", exact=True).click()
    wait_for_text(page, rf"^\d+ of {N} tokens kept")
