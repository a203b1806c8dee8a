from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpar import DPAR, DPARPipeline, LlamaGen
from dpar.locations import weights_path
from dpar.pretrained import fingerprint
from dpar.tokenizer import VQTokenizer, from_uint8, psnr, to_uint8
from pipeline.patchify import patchify
from pipeline.runs.weights import load_tokenizer
from pipeline.sample import sample_pictures
from pipeline.settings.artifacts import PatchifySettings, TokenizeSettings
from pipeline.settings.sampling import SampleSettings
from pipeline.sources import open_indexed
from pipeline.sources.crops import views
from pipeline.tokenize import tokenize
from tests.pipeline.sampled import QUIET

EMOJI = "builtin:emoji"
LLAMAGEN = "builtin:emoji-llamagen"


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    return load_tokenizer("builtin:photos")


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    source = open_indexed("builtin:photos", split="validation")
    return torch.from_numpy(np.concatenate([views(source.load(i), 128, "center", (1.0,)) for i in range(len(source))]))


@pytest.fixture(scope="module")
def codes(tokenizer: VQTokenizer, held_out: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([tokenizer.encode(from_uint8(chunk)) for chunk in held_out.split(40)])


def test_held_out_crops_reconstruct_at_21_db_or_better(
    tokenizer: VQTokenizer, held_out: torch.Tensor, codes: torch.Tensor
) -> None:
    with torch.no_grad():
        decoded = torch.cat([to_uint8(tokenizer.decode(chunk)) for chunk in codes.split(40)])
    assert psnr(decoded, held_out).mean() >= 21


def test_held_out_crops_use_60_percent_of_the_codebook(tokenizer: VQTokenizer, codes: torch.Tensor) -> None:
    assert len(codes.unique()) >= 0.6 * tokenizer.config.codebook_size


def test_the_tokenizer_of_photographs_takes_at_most_4_mb() -> None:
    assert sum(p.stat().st_size for p in Path(weights_path("builtin:photos")).iterdir()) <= 4e6


@pytest.fixture(scope="module")
def pipe() -> DPARPipeline:
    return DPARPipeline.from_pretrained(EMOJI)


def test_all_weights_of_the_emoji_take_at_most_40_mb() -> None:
    weights = Path(weights_path("builtin:photos")).parent
    assert sum(path.stat().st_size for path in weights.rglob("emoji*/**/*") if path.is_file()) <= 40e6


def test_the_shipped_models_are_those_of_the_shipped_emoji(pipe: DPARPipeline) -> None:
    assert pipe.class_names == tuple(open_indexed(EMOJI, split="train").class_names)
    assert isinstance(pipe.generator, DPAR)
    assert pipe.rule is not None
    assert pipe.rule.strategy == "entropy"


def test_held_out_emoji_cost_the_shipped_generator_fewer_bits_than_its_entropy_model(pipe: DPARPipeline) -> None:
    assert pipe.entropy_model is not None
    assert pipe.rule is not None
    source = open_indexed(EMOJI, split="validation", limit=51)
    pixels = np.concatenate([views(source.load(i), 128, "center", (1.0,)) for i in range(len(source))])
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    with torch.no_grad():
        codes = pipe.tokenizer.encode(from_uint8(torch.from_numpy(pixels)))
        starts = torch.from_numpy(pipe.rule.starts(pipe.entropy_model.entropy(codes).numpy(), pipe.grid[1]))
        generator = pipe.generator(codes, labels, starts, loss=True)
        entropy_model = F.cross_entropy(pipe.entropy_model(codes).flatten(0, 1), codes[:, 1:].flatten())
    assert generator < entropy_model


def test_the_baseline_has_the_tokenizer_classes_depth_and_width_of_the_shipped_dpar(pipe: DPARPipeline) -> None:
    baseline = DPARPipeline.from_pretrained(LLAMAGEN)
    assert isinstance(pipe.generator, DPAR)
    assert isinstance(baseline.generator, LlamaGen)
    dpar, llamagen = pipe.generator.config, baseline.generator.config
    assert llamagen.width == dpar.width
    assert llamagen.layers == dpar.encoder_layers + dpar.patch_layers + dpar.decoder_layers
    assert baseline.class_names == pipe.class_names
    assert weights_path(LLAMAGEN, "tokenizer") == weights_path(EMOJI, "tokenizer")


def test_one_command_samples_the_baseline(tmp_path: Path) -> None:
    sample_pictures(Path(LLAMAGEN), tmp_path / "out", SampleSettings(classes=("heart",), per_class=1), QUIET)
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 1


def test_one_command_samples_the_shipped_models(tmp_path: Path) -> None:
    settings = SampleSettings(classes=("animal mammal", "heart"), per_class=1, show_patches=True)
    sample_pictures(Path(EMOJI), tmp_path / "out", settings, QUIET)
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 2
    assert (tmp_path / "out" / "sheet.png").is_file()


def test_the_entropy_model_and_the_tokenizer_are_called_by_the_same_name(tmp_path: Path) -> None:
    tokenize(EMOJI, tmp_path / "codes", TokenizeSettings(tokenizer=EMOJI, image_size=128, limit=4), QUIET)
    settings = PatchifySettings(entropy_model=EMOJI, threshold=3.8)
    manifest = patchify(tmp_path / "codes", tmp_path / "patches", settings, QUIET)
    assert manifest is not None
    assert manifest.entropy_model is not None
    assert manifest.entropy_model["fingerprint"] == fingerprint(weights_path(EMOJI, "entropy_model"))
