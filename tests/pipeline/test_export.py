"""Bundles: written by `dpar export`, accepted in place of weights, and used as `DPARPipeline`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpar import DPARPipeline, LlamaGen, VQTokenizer
from dpar.bundle import BUNDLE, Bundle
from dpar.errors import ModelError
from dpar.tokenizer import from_uint8
from pipeline.evaluate import evaluate
from pipeline.export import export, training_cost
from pipeline.patchify import patchify
from pipeline.runs.weights import fingerprint_of
from pipeline.runtime.errors import StageError
from pipeline.sample import sample_pictures
from pipeline.settings.artifacts import PatchifySettings, TokenizeSettings
from pipeline.settings.sampling import EvalSettings, ExportSettings, SampleSettings
from pipeline.sources.crops import views
from pipeline.tokenize import tokenize
from shards.manifest import Manifest
from shards.reader import open_artifact
from tests.pipeline.sampled import CPU, QUIET, RULE, SIDE, SIZE, N, everything, save_home, save_run

CLASSES = ("bird", "n01440764 tench", "n02099601 golden retriever")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a tokenizer, an entropy model, patches, runs of DPAR and of LlamaGen, and a bundle of each."""
    home = tmp_path_factory.mktemp("made")
    save_home(home, CLASSES, a_class=2)
    save_run(home / "dpar", home / "patches", "dpar-tiny")
    save_run(home / "llama", home / "codes", "llamagen-tiny", std=0.05)
    for name in ("dpar", "llama"):
        export(home / name, home / f"{name}-bundle", ExportSettings(samples=2, **CPU), QUIET)
    return home


def sampled(run: Path, out: Path, **values: Any) -> dict[str, Any]:
    sample_pictures(run, out, SampleSettings(**{**CPU, "per_class": 2, **values}), QUIET)
    artifact = open_artifact(out / "codes")
    rows = np.arange(len(artifact))
    batch = artifact.gather(rows, np.zeros_like(rows))
    return {"codes": batch.codes.tolist(), "starts": None if batch.starts is None else batch.starts.tolist()}


@pytest.mark.parametrize("name", ["dpar", "llama"])
def test_a_bundle_samples_the_images_of_its_run(home: Path, tmp_path: Path, name: str) -> None:
    assert sampled(home / f"{name}-bundle", tmp_path / "a") == sampled(home / name, tmp_path / "b")


def test_a_bundle_needs_no_other_files(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dpar-bundle", tmp_path / "elsewhere")
    expected = sampled(home / "dpar", tmp_path / "b")
    hidden = [home / name for name in ("vq", "entropy")]
    for path in hidden:
        path.rename(path.with_suffix(".hidden"))
    try:
        assert sampled(tmp_path / "elsewhere", tmp_path / "a") == expected
    finally:
        for path in hidden:
            path.with_suffix(".hidden").rename(path)


def test_stages_accept_a_bundle_in_place_of_weights(home: Path, tmp_path: Path) -> None:
    bundle = str(home / "dpar-bundle")
    settings = TokenizeSettings(tokenizer=bundle, image_size=SIZE, shard_size=4, **CPU)
    tokenize(str(home / "photos"), tmp_path / "codes", settings, QUIET)
    patchify(tmp_path / "codes", tmp_path / "patches", PatchifySettings(entropy_model=bundle, **RULE, **CPU), QUIET)
    made = Manifest.read(tmp_path / "patches")
    assert made.tokenizer["fingerprint"] == fingerprint_of(str(home / "vq"))
    assert made.entropy_model is not None
    assert made.entropy_model["fingerprint"] == fingerprint_of(str(home / "entropy"))
    scores = EvalSettings(reference=tmp_path / "patches", samples=2, cfg_scale=(1.0,), **CPU)
    result = evaluate(Path(bundle), tmp_path / "scores", scores, QUIET)
    direct = evaluate(home / "dpar", tmp_path / "direct", scores, QUIET)
    assert result.newest.bits_per_token == direct.newest.bits_per_token


def test_the_model_card_has_the_command_that_trained_the_run(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "llama", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["history"] = [{"command": ["/opt/bin/dpar", "train", "my codes", "run", "--steps", "3"]}]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    export(tmp_path / "run", tmp_path / "bundle", ExportSettings(samples=0, **CPU), QUIET)
    assert "| command | `dpar train 'my codes' run --steps 3` |" in (tmp_path / "bundle" / "README.md").read_text()


def test_the_cost_of_a_bundle_counts_the_steps_after_the_measured_ones(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dpar", tmp_path / "run")
    lines = [{"step": 500, "training_gflops_per_image": 3.0}, {"step": 3400, "loss": 4.0}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cost = training_cost(tmp_path / "run")
    assert cost is not None
    assert (cost.steps, cost.gflops_per_image) == (3400, 3.0)


def test_an_entropy_model_of_a_bundle_refuses_codes_of_another_tokenizer(home: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    VQTokenizer(VQTokenizer.from_pretrained(home / "vq").config).save_pretrained(tmp_path / "vq")
    settings = TokenizeSettings(tokenizer=str(tmp_path / "vq"), image_size=SIZE, **CPU)
    tokenize(str(home / "photos"), tmp_path / "codes", settings, QUIET)
    patches = PatchifySettings(entropy_model=str(home / "dpar-bundle"), **RULE, **CPU)
    with pytest.raises(StageError, match="its entropies would be meaningless"):
        patchify(tmp_path / "codes", tmp_path / "patches", patches, QUIET)


def test_the_pipeline_samples_the_images_of_the_command(home: Path, tmp_path: Path) -> None:
    expected = sampled(home / "dpar", tmp_path / "out", cfg_scale=2.0, seed=5)
    pipe = DPARPipeline.from_pretrained(str(home / "dpar-bundle"))
    made = pipe(["bird", "tench", 2], images_per_class=2, cfg_scale=2.0, seed=5, entropies=True)
    assert made.codes.tolist() == expected["codes"]
    assert made.starts.tolist() == expected["starts"]
    files = sorted((tmp_path / "out" / "images").glob("*/*.png"))
    assert [np.asarray(image).tolist() for image in made.images] == [np.asarray(Image.open(p)).tolist() for p in files]
    entropy_model = LlamaGen.from_pretrained(home / "entropy")
    assert made.entropies is not None
    expected_entropy = entropy_model.entropy(torch.from_numpy(made.codes)).numpy()
    assert np.array_equal(made.entropies, expected_entropy)


def test_the_pipeline_patchifies_a_picture_as_the_stages_do(home: Path) -> None:
    pipe = DPARPipeline.from_pretrained(str(home / "dpar-bundle"))
    artifact = open_artifact(home / "patches")
    rows = np.arange(1)
    stored = artifact.gather(rows, np.zeros_like(rows))
    patched = pipe.patchify(Image.open(home / "photos" / "bird" / "0.png"))
    assert artifact.keys(rows) == ["bird/0.png"]
    assert patched.codes.reshape(-1).tolist() == stored.codes[0].tolist()
    assert stored.starts is not None
    assert patched.starts.reshape(-1).tolist() == stored.starts[0].tolist()
    assert patched.reconstruction.size == (SIZE, SIZE)
    assert patched.patches == int(stored.starts[0].sum())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "I;16"])
def test_a_picture_is_cropped_as_dpar_tokenize_crops_it(home: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 65536, (90, 61), np.uint16))
    image = grey if mode == "I;16" else Image.fromarray(rng.integers(0, 256, (90, 61, 3), np.uint8)).convert(mode)
    pipe = DPARPipeline.from_pretrained(str(home / "dpar-bundle"))
    cropped = from_uint8(torch.from_numpy(views(image, SIZE, "center", (1.0,))))
    expected = VQTokenizer.from_pretrained(home / "vq").encode(cropped)
    assert pipe.patchify(image).codes.reshape(-1).tolist() == expected[0].tolist()


@pytest.mark.parametrize("kept", ["rows", "mask"])
def test_the_pipeline_edits_a_picture_as_the_command_does(home: Path, tmp_path: Path, kept: str) -> None:
    path = home / "photos" / "bird" / "0.png"
    image = Image.open(path)
    mask = Image.new("L", image.size)
    mask.paste(255, (3, 4, 7, 9))
    mask.save(tmp_path / "mask.png")
    by_command = {"keep_rows": 2} if kept == "rows" else {"mask": tmp_path / "mask.png"}
    expected = sampled(home / "dpar", tmp_path / "out", cfg_scale=2.0, image=path, classes=("tench",), **by_command)
    pipe = DPARPipeline.from_pretrained(str(home / "dpar-bundle"))
    by_call: dict[str, Any] = {"keep_rows": 2} if kept == "rows" else {"mask": mask}
    edited = pipe("tench", images_per_class=2, image=image, **by_call)
    assert edited.codes.tolist() == expected["codes"]
    assert edited.kept is not None
    assert 0 < edited.kept.sum() < N
    original = pipe.patchify(image).codes.reshape(-1)
    assert (edited.codes[:, edited.kept] == original[edited.kept]).all()
    assert (edited.codes[0] != edited.codes[1]).any()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "an image needs either mask or keep_rows"),
        ({"keep_rows": SIDE}, f"there is nothing to sample: keep_rows {SIDE} keeps all {SIDE} rows"),
        ({"keep_rows": -1}, "keep_rows is -1; the image has 4 rows"),
        ({"mask": Image.new("L", (3, 3))}, "the mask is 3×3 pixels, the image 10×12"),
        ({"mask": Image.new("L", (10, 12))}, "the mask has no white pixel"),
        ({"image": None, "keep_rows": 1}, "mask and keep_rows need an image"),
    ],
)
def test_an_invalid_edit_is_one_message(home: Path, given: dict[str, Any], says: str) -> None:
    pipe = DPARPipeline.from_pretrained(str(home / "dpar-bundle"))
    with pytest.raises(ModelError, match=says):
        pipe("bird", **{"image": Image.open(home / "photos" / "bird" / "0.png"), **given})


def test_progress_is_reported_after_each_token_and_can_stop_sampling(home: Path) -> None:
    pipe = DPARPipeline.from_pretrained(str(home / "dpar-bundle"))
    shares: list[float] = []
    pipe("bird", images_per_class=3, batch=2, progress=shares.append)
    assert len(shares) == 2 * N  # two batches
    assert shares == sorted(shares)
    assert shares[-1] == 1.0

    def stop(share: float) -> None:
        shares.append(share)
        raise InterruptedError

    shares.clear()
    with pytest.raises(InterruptedError):
        pipe("bird", progress=stop)
    assert shares == [1 / N]


def test_a_higher_threshold_makes_fewer_patches_of_a_picture(home: Path) -> None:
    pipe = DPARPipeline.from_pretrained(str(home / "dpar-bundle"))
    image = Image.open(home / "photos" / "bird" / "0.png")
    assert pipe.patchify(image, threshold=0.0).patches == N
    longest = pipe.patchify(image, threshold=9.0, max_length=0, row_reset=False)
    assert longest.patches < pipe.patchify(image, threshold=9.0).patches
    assert pipe.patchify(image, threshold=9.0).patches == 2 + SIDE - 1  # the first two tokens, and each later row


def test_transparent_pictures_are_on_white(home: Path) -> None:
    pipe = DPARPipeline.from_pretrained(str(home / "dpar-bundle"))
    clear = pipe.patchify(Image.new("RGBA", (20, 12), (0, 0, 0, 0)))
    white = pipe.patchify(Image.new("RGB", (20, 12), "white"))
    assert clear.codes.tolist() == white.codes.tolist()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("golden retreiver", "no class 'golden retreiver'; did you mean 'golden retriever'"),
        (3, "no class 3; they are 0 to 2"),
    ],
)
def test_an_unknown_class_of_the_pipeline_is_one_message(home: Path, asked: Any, says: str) -> None:
    pipe = DPARPipeline.from_pretrained(str(home / "dpar-bundle"))
    with pytest.raises(ModelError, match=says):
        pipe([asked])


def test_writing_a_bundle_again_gives_the_same_bytes(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dpar-bundle", tmp_path / "bundle")
    export(home / "dpar", tmp_path / "bundle", ExportSettings(samples=2, **CPU), QUIET)
    assert everything(tmp_path / "bundle") == everything(home / "dpar-bundle")


def test_bfloat16_bundles_take_half_the_space_and_load(home: Path, tmp_path: Path) -> None:
    done = export(home / "dpar", tmp_path / "bundle", ExportSettings(samples=0, weights_dtype="bf16", **CPU), QUIET)
    full = sum(p.stat().st_size for p in (home / "dpar-bundle").rglob("*.safetensors"))
    half = sum(p.stat().st_size for p in done.folder.rglob("*.safetensors"))
    assert half < 0.52 * full
    assert len(DPARPipeline.from_pretrained(str(done.folder))("bird").images) == 1


def test_the_moving_average_is_what_is_exported(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dpar", tmp_path / "run")
    save_run(tmp_path / "other", home / "patches", "dpar-tiny", seed=9)
    shutil.copytree(tmp_path / "other" / "model", tmp_path / "run" / "model-ema")
    export(tmp_path / "run", tmp_path / "averaged", ExportSettings(samples=0, **CPU), QUIET)
    export(tmp_path / "run", tmp_path / "last", ExportSettings(samples=0, ema=False, **CPU), QUIET)
    assert fingerprint_of(str(tmp_path / "averaged")) == fingerprint_of(str(tmp_path / "other"))
    assert fingerprint_of(str(tmp_path / "last")) == fingerprint_of(str(home / "dpar"))


def test_a_replaced_part_is_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dpar-bundle", tmp_path / "bundle")
    shutil.copytree(home / "llama" / "model", tmp_path / "bundle" / "generator", dirs_exist_ok=True)
    with pytest.raises(ModelError, match=r"is not the generator that .* was exported with"):
        DPARPipeline.from_pretrained(str(tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 9}, "has format version 9; this version reads 1"),
        ({"parts": {}}, "it has no 'generator'"),
        ({"class_names": "abc"}, "class_names must be a list of strings"),
        ({"parts": {"../elsewhere": "0"}}, "'../elsewhere' is not a part of a bundle|../elsewhere is not a part"),
        ({"parts": {"generator": 7}}, "the fingerprint of generator must be a string"),
        ({"patch_rule": {"strategy": "other"}}, "strategy is 'other'"),
    ],
)
def test_a_damaged_bundle_is_one_message(home: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    values = json.loads((home / "dpar-bundle" / BUNDLE).read_text(encoding="utf-8"))
    (tmp_path / BUNDLE).write_text(json.dumps(values | change), encoding="utf-8")
    with pytest.raises(ModelError, match=says):
        Bundle.read(tmp_path)


def test_an_unrelated_directory_is_refused_and_kept(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(StageError, match="holds something else"):
        export(home / "dpar", tmp_path, ExportSettings(**CPU), QUIET)
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_run_is_not_a_bundle(home: Path) -> None:
    with pytest.raises(ModelError, match="is not a bundle"):
        DPARPipeline.from_pretrained(str(home / "dpar"))
