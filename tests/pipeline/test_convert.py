"""LlamaGen's files in the pipeline: conversion, upload, and use as tokenizer, entropy model and generator."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from dpar import DPAR, DPARConfig, LlamaGen, LlamaGenConfig, VQConfig, VQTokenizer, stored_entropy, token_entropy
from dpar.checkpoint_files import write
from pipeline.convert import convert
from pipeline.evaluate import evaluate
from pipeline.patchify import patchify
from pipeline.runs.run_folder import read_run
from pipeline.runs.weights import load_entropy_model
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.sample import sample_pictures
from pipeline.scoring.likelihood import bits_per_token
from pipeline.settings.artifacts import PatchifySettings, TokenizeSettings
from pipeline.settings.models import ConvertSettings
from pipeline.settings.sampling import EvalSettings, SampleSettings
from pipeline.settings.training import EntropySettings
from pipeline.tokenize import tokenize
from pipeline.train import train_entropy
from shards.reader import open_artifact

QUIET = Progress(quiet=True)
CLASSES = ("bird", "cat", "dog")
VQ = VQConfig(codebook_size=32, channels=32, channel_multipliers=(1, 1), residual_blocks=1, latent_channels=32)
GPT = LlamaGenConfig(codebook_size=32, grid_height=4, grid_width=4, classes=3, width=32, heads=2, layers=2)
SIZES: dict[str, Any] = {"width": 32, "heads": 2, "grid_height": 4, "grid_width": 4}
CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


def state_of(model: torch.nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(tensor.shape, generator=generator) / 4 + (tensor.ndim == 1)).to(dtype)
        for name, tensor in model.state_dict().items()
    }


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``vq.pt`` and ``gpt.pt`` in LlamaGen's format, photographs, and their ``codes``."""
    home = tmp_path_factory.mktemp("home")
    torch.save({"model": state_of(VQTokenizer(VQ), 0) | {"quantize.codebook_used": torch.ones(65536)}}, home / "vq.pt")
    write(home / "gpt.pt", "llamagen", SIZES, state_of(LlamaGen(GPT), 1))
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (home / "photos" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).save(home / "photos" / name / f"{i}.png")
    settings = TokenizeSettings(tokenizer=str(home / "vq.pt"), image_size=8, **CPU)
    tokenize(str(home / "photos"), home / "codes", settings, QUIET)
    return home


def run_convert(src: Path, dst: Path) -> str:
    return convert(str(src), dst, ConvertSettings(), QUIET).description


def assert_equal_bytes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def dpar(*arguments: object, status: int = 0) -> str:
    """Run the command in this process and return its output."""
    import cli

    done = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == status, done.output
    return done.output


# Converting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_becomes_a_directory_and_the_same_file_again_byte_for_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    vq, gpt = state_of(VQTokenizer(VQ), 2, dtype), state_of(LlamaGen(GPT), 3, dtype)
    torch.save({"model": vq | {"quantize.codebook_used": torch.ones(65536)}}, tmp_path / "vq.pt")
    write(tmp_path / "gpt.pt", "llamagen", SIZES, gpt)
    for name, state in (("vq", vq), ("gpt", gpt)):
        said = run_convert(tmp_path / f"{name}.pt", tmp_path / name)
        assert said.startswith("LlamaGen's VQ tokenizer: 32 codes" if name == "vq" else "LlamaGen's GPT: 2 layers")
        assert {p.name for p in (tmp_path / name).iterdir()} == {"config.json", "model.safetensors", "README.md"}
        assert_equal_bytes(load_file(tmp_path / name / "model.safetensors"), state)
        run_convert(tmp_path / name, tmp_path / f"{name}-again.pt")
        back = torch.load(tmp_path / f"{name}-again.pt", weights_only=True)["model"]
        back.pop("quantize.codebook_used", None)
        assert_equal_bytes(back, state)
    from_file, from_directory = (VQTokenizer.from_pretrained(tmp_path / name) for name in ("vq.pt", "vq"))
    assert from_file.config == from_directory.config
    assert_equal_bytes(dict(from_file.state_dict()), dict(from_directory.state_dict()))
    for name in ("gpt.pt", "gpt", "gpt-again.pt"):
        assert LlamaGen.from_pretrained(tmp_path / name).config == GPT


def test_the_command_prints_the_conversion_and_the_card_records_its_source(home: Path, tmp_path: Path) -> None:
    said = dpar("convert", home / "gpt.pt", tmp_path / "gpt")
    parameters = sum(p.numel() for p in LlamaGen(GPT).parameters())
    assert "LlamaGen's GPT: 2 layers of width 32, 2 heads, 4×4 tokens of 32 codes, 3 classes" in said
    assert f"{parameters / 1e6:.1f} M parameters in 18 tensors" in said
    digest = hashlib.sha256((home / "gpt.pt").read_bytes()).hexdigest()
    assert f"Converted from `gpt.pt`, SHA-256 `{digest}`" in (tmp_path / "gpt" / "README.md").read_text()


def test_an_existing_equal_output_is_kept(home: Path, tmp_path: Path) -> None:
    write(tmp_path / "other.pt", "llamagen", SIZES, state_of(LlamaGen(GPT), 9))
    for name in ("out", "out.pt"):
        run_convert(home / "gpt.pt", tmp_path / name)
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        run_convert(home / "gpt.pt", tmp_path / name)  # the same: nothing to do
        with pytest.raises(StageError, match=f"{name} exists and holds something else"):
            run_convert(home / "vq.pt", tmp_path / name)
        with pytest.raises(StageError, match=f"{name} exists and holds something else"):
            run_convert(tmp_path / "other.pt", tmp_path / name)
        assert {p: p.stat().st_mtime_ns for p in before} == before
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("do not lose me")
    with pytest.raises(StageError, match="work exists and holds something else"):
        run_convert(home / "gpt.pt", tmp_path / "work")


def test_a_dpar_becomes_a_file_of_its_authors_and_a_directory_again(tmp_path: Path) -> None:
    config = DPARConfig(
        codebook_size=32, grid_height=4, grid_width=4, classes=3, width=32, heads=2, patch_layers=1, rope="2d"
    )
    DPAR(config).save_pretrained(tmp_path / "dpar")
    assert run_convert(tmp_path / "dpar", tmp_path / "dpar.pt").startswith("a DPAR model: 1 + 1 + 3 layers")
    run_convert(tmp_path / "dpar.pt", tmp_path / "copy")
    assert DPAR.from_pretrained(tmp_path / "copy").config == config
    original, copy = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("dpar", "copy"))
    assert original == copy


def test_only_directories_are_pushed_to_a_hub(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"--push-to needs a directory"):
        convert(str(home / "gpt.pt"), tmp_path / "b.pt", ConvertSettings(push_to="me/gpt"), QUIET)
    assert not list(tmp_path.glob("*.pt*"))


# The Hub


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the Hub unreachable and return the folder of cached downloads."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.usefixtures("no_hub")
def test_an_unreachable_hub_is_one_message_and_the_directory_is_complete(home: Path, tmp_path: Path) -> None:
    said = dpar("convert", home / "vq.pt", tmp_path / "vq", "--push-to", "me/vq", status=1)
    assert len(said.strip().splitlines()) == 1
    assert "vq is written, but the upload to me/vq failed" in said
    assert VQTokenizer.from_pretrained(tmp_path / "vq").config == VQ


def test_pushed_weights_load_by_name(home: Path, tmp_path: Path, no_hub: Path) -> None:
    run_convert(home / "gpt.pt", tmp_path / "gpt")
    cached = no_hub / "models--me--gpt"  # the cached download of me/gpt
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tmp_path / "gpt", cached / "snapshots" / ("0" * 40))
    assert LlamaGen.from_pretrained("me/gpt").config == GPT
    assert "LlamaGen's GPT: 2 layers" in dpar("convert", "me/gpt", tmp_path / "again")
    original, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("gpt", "again"))
    assert original == again
    with pytest.raises(ValueError, match="me/other is not a local directory, and the Hub could not be read"):
        LlamaGen.from_pretrained("me/other")


# As a tokenizer


def test_a_tokenizer_file_makes_codes_and_is_recorded_by_path_and_digest(home: Path) -> None:
    digest = hashlib.sha256((home / "vq.pt").read_bytes()).hexdigest()
    assert open_artifact(home / "codes").manifest.tokenizer == {"path": str(home / "vq.pt"), "fingerprint": digest}


def test_a_gpt_file_as_tokenizer_is_refused(home: Path, tmp_path: Path) -> None:
    said = dpar("tokenize", home / "photos", tmp_path / "o", "--tokenizer", home / "gpt.pt", status=1)
    assert "gpt.pt is LlamaGen's GPT" in said
    assert "LlamaGen's VQ tokenizer is needed here" in said
    assert not (tmp_path / "o").exists()


# As an entropy model


@pytest.fixture(scope="module")
def entropy(home: Path) -> Path:
    train_entropy(home / "codes", home / "entropy", EntropySettings(from_llamagen=str(home / "gpt.pt")), QUIET)
    return home / "entropy"


def test_the_entropy_model_of_a_checkpoint_uses_its_guidance_class(home: Path, entropy: Path) -> None:
    conditional = LlamaGen.from_pretrained(home / "gpt.pt")
    model = load_entropy_model(str(entropy))
    assert model.config.classes == 0
    codes = torch.randint(32, (2, 16))
    with torch.no_grad():
        assert torch.equal(model(codes), conditional(codes, torch.tensor([3, 3])))
    digest = hashlib.sha256((home / "gpt.pt").read_bytes()).hexdigest()
    record = read_run(entropy)
    assert record["kind"] == "entropy"
    assert record["settings"]["from_llamagen"] == {"path": str(home / "gpt.pt"), "fingerprint": digest}


def test_patchify_accepts_an_entropy_model_from_llamagen(home: Path, entropy: Path, tmp_path: Path) -> None:
    settings = PatchifySettings(entropy_model=str(entropy), target_length=1.6, **CPU)
    manifest = patchify(home / "codes", tmp_path / "patches", settings, QUIET)
    assert manifest is not None
    assert manifest.statistics["mean_length"] == pytest.approx(1.6, abs=0.1)
    rows = open_artifact(tmp_path / "patches").shard_rows(0)
    with torch.no_grad():
        logits = LlamaGen.from_pretrained(home / "gpt.pt")(torch.from_numpy(rows.codes[:, 0].astype(np.int64)))
    expected = stored_entropy(token_entropy(logits)).numpy()
    assert rows.entropy is not None
    np.testing.assert_allclose(rows.entropy[:, 0, 1:], expected[:, 1:], rtol=0, atol=2e-3)


def test_converting_again_is_accepted_only_for_the_same_checkpoint(home: Path, entropy: Path, tmp_path: Path) -> None:
    before = (entropy / "model" / "model.safetensors").read_bytes()
    train_entropy(home / "codes", entropy, EntropySettings(from_llamagen=str(home / "gpt.pt")), QUIET)
    assert (entropy / "model" / "model.safetensors").read_bytes() == before
    write(tmp_path / "other.pt", "llamagen", SIZES, state_of(LlamaGen(GPT), 5))
    with pytest.raises(StageError, match="holds a run with other settings"):
        train_entropy(home / "codes", entropy, EntropySettings(from_llamagen=str(tmp_path / "other.pt")), QUIET)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grid_height": 3}, "3×4 tokens of 32 codes.*codes holds 4×4 tokens of 32 codes"),
        ({"codebook_size": 64}, "4×4 tokens of 64 codes.*codes holds 4×4 tokens of 32 codes"),
    ],
)
def test_a_checkpoint_for_another_grid_or_codebook_is_refused_with_both_sides(
    home: Path, tmp_path: Path, change: dict[str, int], says: str
) -> None:
    LlamaGen(LlamaGenConfig(**(vars(GPT) | change))).save_pretrained(tmp_path / "gpt")
    settings = EntropySettings(from_llamagen=str(tmp_path / "gpt"))
    with pytest.raises(StageError, match=f"gpt is a model of {says}"):
        train_entropy(home / "codes", tmp_path / "out", settings, QUIET)
    with pytest.raises(StageError, match=f"gpt is a model of {says}"):
        evaluate(tmp_path / "gpt", tmp_path / "out", EvalSettings(reference=home / "codes", **CPU), QUIET)
    assert not (tmp_path / "out").exists()


def test_training_options_with_a_checkpoint_are_wrong_usage(home: Path, tmp_path: Path) -> None:
    options = ("--from-llamagen", home / "gpt.pt", "--device", "cpu", "--steps", 5, "--lr", 0.1)
    said = dpar("entropy", home / "codes", tmp_path / "o", *options, status=2)
    assert "--from-llamagen trains nothing; omit --steps, --lr" in said
    assert not (tmp_path / "o").exists()


# Scored and sampled from


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_weights_trained_elsewhere_score_and_sample_without_a_run(home: Path, tmp_path: Path, kind: str) -> None:
    weights = home / "gpt.pt"
    if kind == "directory":
        weights = tmp_path / "gpt"
        run_convert(home / "gpt.pt", weights)
    settings = EvalSettings(reference=home / "codes", samples=6, cfg_scale=(1.5,), **CPU)
    results = evaluate(weights, tmp_path / "scores", settings, QUIET)
    model = LlamaGen.from_pretrained(home / "gpt.pt")
    expected = bits_per_token(model, open_artifact(home / "codes"), batch=32, precision="fp32")
    assert results.newest.bits_per_token == pytest.approx(expected.bits_per_token, abs=1e-6)
    assert list(results.newest.bits_by_class) == list(CLASSES)
    assert results.cells[0].samples == 6
    assert (tmp_path / "scores" / "cells" / "cfg-1.5" / "samples.png").is_file()
    again = evaluate(weights, tmp_path / "scores", settings, QUIET)
    assert again.to_json() == results.to_json()
    with pytest.raises(StageError, match=r"does not say which tokenizer.*--tokenizer"):
        sample_pictures(weights, tmp_path / "pictures", SampleSettings(**CPU), QUIET)
    made = sample_pictures(
        weights,
        tmp_path / "pictures",
        SampleSettings(tokenizer=str(home / "vq.pt"), classes=("2",), per_class=2, **CPU),
        QUIET,
    )
    assert made["images"] == 2
    assert len(list((tmp_path / "pictures" / "images" / "0002-2").glob("*.png"))) == 2


def test_weights_that_do_not_fit_the_reference_are_refused_with_both_sides(home: Path, tmp_path: Path) -> None:
    settings = EvalSettings(reference=home / "codes", samples=0, **CPU)
    sizes: dict[str, Any] = {"codebook_size": 32, "grid_height": 4, "grid_width": 4, "width": 32, "heads": 2}
    for name, model, says in (
        ("five", LlamaGen(LlamaGenConfig(classes=5, layers=1, **sizes)), "a model of 5 classes; .*codes has 3"),
        (
            "none",
            LlamaGen(LlamaGenConfig(classes=0, layers=1, **sizes)),
            "has no classes",
        ),
        (
            "dpar",
            DPAR(DPARConfig(classes=3, patch_layers=1, **sizes)),
            "name it with --entropy-model",
        ),
    ):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(StageError, match=f"{name} .*{says}"):
            evaluate(tmp_path / name, tmp_path / "out", settings, QUIET)
    with pytest.raises(ValueError, match=r"vq\.pt is LlamaGen's VQ tokenizer"):
        evaluate(home / "vq.pt", tmp_path / "out", settings, QUIET)
    assert not (tmp_path / "out").exists()
