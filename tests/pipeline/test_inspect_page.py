"""The page of `dpar inspect`: which images it draws, and from what."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import dpar
from dpar.tokenizer import VQTokenizer
from pipeline.generation.generator import decode
from pipeline.inspect import spread
from pipeline.reports.inspection import tables
from pipeline.runtime.errors import StageError
from shards.manifest import Container
from tests.pipeline.inspections import GRID, N, V, build, inspected, look, save_inputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("made"))


def test_images_are_spread_evenly_over_classes() -> None:
    labels = np.repeat(np.arange(4), 10).astype(np.int32)
    assert np.bincount(labels[spread(labels, 8, range(4))]).tolist() == [2, 2, 2, 2]
    assert len(set(labels[spread(labels, 2, range(4))])) == 2
    assert set(labels[spread(labels, 3, [1, 3])]) == {1, 3}
    assert len(spread(labels, 100, range(4))) == 40
    assert len(spread(labels, 0, range(4))) == 0


@pytest.mark.parametrize("container", ["arrow", "webdataset"])
def test_a_page_shows_original_decoded_entropy_and_each_set_of_patches(
    made: Path, tmp_path: Path, container: Container
) -> None:
    artifact, _ = build(made, tmp_path / "a", container=container)
    out = tmp_path / "look"
    found = look(artifact, out, images=3, threshold=(1.0, 3.0))
    kinds = ("original", "decoded", "entropy", "patches-0", "patches-1", "patches-2")
    assert found["pictures"] == [f"{i:03d}-{kind}.png" for i in range(3) for kind in kinds] + ["patches.png"]
    assert {p.name for p in out.iterdir()} == {*found["pictures"], "index.html", "numbers.json"}
    assert json.loads((out / "numbers.json").read_text(encoding="utf-8")) == found
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/webp;base64,') == page.count("src=") == 19
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", page)
    assert "dög &amp; &lt;b&gt;" in page
    assert "<b>" not in page
    assert found["notes"] == []


def test_keys_and_classes_choose_what_is_drawn(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a", kind="codes")
    look(artifact, tmp_path / "keys", keys=("cat/2.png", "bird/1.png"))
    page = (tmp_path / "keys" / "index.html").read_text(encoding="utf-8")
    assert page.index("<h2>cat/2.png</h2>") < page.index("<h2>bird/1.png</h2>")
    assert page.count("<figure") == 4
    look(artifact, tmp_path / "classes", classes=("cat",), images=2)
    page = (tmp_path / "classes" / "index.html").read_text(encoding="utf-8")
    assert page.count("<h2>cat/") == 2
    assert "<h2>bird/" not in page


def test_reconstructions_are_shown_next_to_originals_with_their_psnr(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a", kind="codes")
    found = look(artifact, tmp_path / "look", images=2)
    assert found["pictures"][-1] == "reconstructions.png"
    assert " dB PSNR" in (tmp_path / "look" / "index.html").read_text(encoding="utf-8")


def test_without_their_source_images_are_drawn_without_originals_and_a_note_says_so(made: Path, tmp_path: Path) -> None:
    here = tmp_path / "copy"
    shutil.copytree(made, here)
    artifact, _ = build(here, tmp_path / "a")
    shutil.rmtree(here / "photos")
    found = look(artifact, tmp_path / "look", images=1)
    assert found["pictures"] == ["000-decoded.png", "000-entropy.png", "000-patches-0.png", "patches.png"]
    assert "no longer available" in found["notes"][0]
    assert "Originals are not shown" in (tmp_path / "look" / "index.html").read_text(encoding="utf-8")


def test_static_patches_without_entropies_are_drawn_without_entropy_maps(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a", strategy="static")
    found = inspected(artifact, tmp_path / "look", images=1)
    assert found.entropy is None
    assert found.pictures[:-1] == ["000-original.png", "000-decoded.png", "000-patches-0.png"]
    assert any("static, length 1.81 (stored)" in row for table in tables(found) for row in table.rows)
    with pytest.raises(StageError, match="holds no entropies, which --threshold needs"):
        look(artifact, threshold=(1.0,))


def test_decoding_in_batches_gives_the_same_images(made: Path) -> None:
    tokenizer = VQTokenizer.from_pretrained(made / "vq")
    codes = np.random.default_rng(0).integers(0, V, (5, N))
    np.testing.assert_allclose(
        decode(tokenizer, codes, GRID, batch=2).astype(int), decode(tokenizer, codes, GRID).astype(int), atol=1
    )


def test_another_tokenizer_is_refused_with_both_fingerprints(made: Path, tmp_path: Path) -> None:
    artifact, _ = build(made, tmp_path / "a", kind="codes")
    torch.manual_seed(1)
    VQTokenizer(VQTokenizer.from_pretrained(made / "vq").config).save_pretrained(tmp_path / "other")
    ours, other = (dpar.fingerprint(path)[:12] for path in (made / "vq", tmp_path / "other"))
    with pytest.raises(StageError, match=f"{other}.*{ours}"):
        look(artifact, tmp_path / "look", tokenizer=str(tmp_path / "other"))


def test_a_moved_tokenizer_can_be_given_and_statistics_need_none(made: Path, tmp_path: Path) -> None:
    home = tmp_path / "copy"
    shutil.copytree(made, home)
    artifact, _ = build(home, tmp_path / "a")
    shutil.move(home / "vq", home / "moved")
    with pytest.raises(StageError, match="--tokenizer"):
        look(artifact, tmp_path / "look")
    assert look(artifact, tmp_path / "look", images=0)["pictures"] == []
    assert look(artifact, tmp_path / "look", images=1, tokenizer=str(home / "moved"))["pictures"]
