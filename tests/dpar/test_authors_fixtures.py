"""Files in the format of DPAR's authors against results of the authors' modules: tests/fixtures/README.md."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dpar import DPAR, DPARConfig, LlamaGen, ModelError, PatchRule, SamplingOptions, patch_starts, sample, token_entropy
from dpar.pretrained import read_weights
from pipeline.convert import convert
from pipeline.settings.models import ConvertSettings
from tests.dpar.conftest import FIXTURES, Reference

TOLERANCE = 1e-4
TINY: dict[str, Any] = {"heads": 4, "grid": (8, 8)}


class Fixture(NamedTuple):
    """The options that a checkpoint needs, and the part of its logits that is stored."""

    name: str
    said: dict[str, Any]
    stored: tuple[slice, slice] = (slice(None), slice(None))  # tokens, codes


FIXTURES_OF_DPAR = [
    Fixture("dpar_tiny", TINY),
    Fixture("dpar_tiny_e2d2", TINY),
    Fixture("dpar_tiny_3d", TINY | {"rope": "dynamic-compact"}),
    pytest.param(Fixture("dpar_b_256", {}, (slice(None, None, 5), slice(None, None, 16))), marks=pytest.mark.slow),
]


def assert_close(values: Tensor, expected: Any) -> None:
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def check_dpar(model: DPAR, fixture: Fixture, arrays: dict[str, Any]) -> None:
    codes, labels = torch.from_numpy(arrays["codes"].astype(np.int64)), torch.from_numpy(arrays["labels"])
    starts = patch_starts(
        arrays["entropy"], float(arrays["threshold"]), int(arrays["max_length"]), model.config.grid_width
    )
    np.testing.assert_array_equal(starts, arrays["starts"])
    logits = model(codes, labels, torch.from_numpy(starts))
    tokens, entries = fixture.stored
    assert_close(logits[:, tokens, entries], arrays["logits"])
    assert_close(F.cross_entropy(logits.transpose(1, 2), codes, reduction="none"), arrays["nll"])


@pytest.mark.parametrize("fixture", FIXTURES_OF_DPAR, ids=lambda fixture: fixture.name)
def test_dpar_equals_the_authors_before_and_after_conversion(fixture: Fixture, authors: Any, tmp_path: Path) -> None:
    checkpoint, arrays = authors(fixture.name)
    check_dpar(DPAR.from_pretrained(checkpoint, **fixture.said), fixture, arrays)
    convert(str(checkpoint), tmp_path / "directory", ConvertSettings(**fixture.said))
    convert(str(tmp_path / "directory"), tmp_path / "back.pt", ConvertSettings())
    check_dpar(DPAR.from_pretrained(tmp_path / "back.pt"), fixture, arrays)  # the given options are in the file now
    there, back = (torch.load(path, weights_only=True)["model"] for path in (checkpoint, tmp_path / "back.pt"))
    assert there.keys() == back.keys()
    assert all(torch.equal(there[name], back[name]) for name in there)


@pytest.mark.slow
def test_the_published_dpar_b_is_the_preset(authors: Any) -> None:
    assert DPAR.from_pretrained(authors("dpar_b_256").checkpoint).config == DPARConfig()


@torch.no_grad()
def test_the_entropy_model_equals_the_authors(entropy_tiny: LlamaGen, authors: Any) -> None:
    arrays = authors("entropy_tiny").arrays
    codes = torch.from_numpy(arrays["codes"].astype(np.int64))
    logits = entropy_tiny(codes)
    assert_close(logits, arrays["logits"])
    assert_close(token_entropy(logits), arrays["entropy"])
    stored = entropy_tiny.entropy(codes)
    assert stored[:, 0].isinf().all()
    np.testing.assert_array_equal(stored[:, 1:].numpy(), token_entropy(logits).half().numpy())


@pytest.mark.parametrize("cfg_scale", ["1.0", "2.0"])
def test_greedy_codes_and_starts_equal_those_of_the_authors_sampler(
    cfg_scale: str, entropy_tiny: LlamaGen, authors: Any
) -> None:
    model = DPAR.from_pretrained(authors("dpar_tiny").checkpoint, **TINY)
    with np.load(FIXTURES / "dpar_tiny_greedy.npz") as arrays:
        codes, starts = sample(
            model,
            torch.from_numpy(arrays["labels"]),
            entropy_tiny,
            PatchRule(threshold=float(arrays["threshold"])),
            SamplingOptions(cfg_scale=float(cfg_scale), temperature=0),
        )
        np.testing.assert_array_equal(codes.numpy(), arrays[f"greedy_cfg{cfg_scale}"])
        np.testing.assert_array_equal(starts.numpy(), arrays[f"starts_cfg{cfg_scale}"])


@pytest.fixture
def tiny(authors: Any) -> Reference:
    reference: Reference = authors("dpar_tiny")
    return reference


@pytest.fixture
def entropy_tiny(authors: Any) -> LlamaGen:
    return LlamaGen.from_pretrained(authors("entropy_tiny").checkpoint, **TINY)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("name", ["checkpoint.pt", "model.safetensors"])
def test_both_formats_are_read_with_any_prefix(tiny: Reference, prefix: str, name: str, tmp_path: Path) -> None:
    tensors = torch.load(tiny.checkpoint, weights_only=True)["model"]
    prefixed = {prefix + key: value for key, value in tensors.items()}
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save({"model": prefixed, "steps": 5}, path)
    else:
        save_file(prefixed, path)
    expected, model = DPAR.from_pretrained(tiny.checkpoint, **TINY), DPAR.from_pretrained(path, **TINY)
    assert model.config == expected.config
    for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_values_that_tensors_do_not_determine_are_asked_for(tiny: Reference) -> None:
    with pytest.raises(
        ModelError, match=r"dpar_tiny\.pt does not record its number of heads.*pass heads= to from_pretrained"
    ):
        DPAR.from_pretrained(tiny.checkpoint)
    with pytest.raises(ModelError, match="rope is '3d'; it must be one of dynamic"):
        DPAR.from_pretrained(tiny.checkpoint, **TINY, rope="3d")


def test_a_missing_tensor_is_refused_by_name(tiny: Reference, tmp_path: Path) -> None:
    tensors = torch.load(tiny.checkpoint, weights_only=True)["model"]
    del tensors["decoder_start_embedding.weight"]
    torch.save({"model": tensors}, tmp_path / "cut.pt")
    with pytest.raises(ModelError, match=r"cut\.pt does not fit a DPAR: missing decoder_start"):
        DPAR.from_pretrained(tmp_path / "cut.pt", **TINY)


def test_loading_into_the_wrong_class_is_refused_by_name(tiny: Reference, authors: Any) -> None:
    with pytest.raises(
        ModelError, match=r"dpar_tiny\.pt is a DPAR model: 1 \+ 3 \+ 2 layers.*LlamaGen's GPT is needed"
    ):
        LlamaGen.from_pretrained(tiny.checkpoint, **TINY)
    with pytest.raises(ModelError, match=r"entropy_tiny\.pt is LlamaGen's GPT.*no start token; a DPAR model is needed"):
        DPAR.from_pretrained(authors("entropy_tiny").checkpoint, **TINY)


def test_an_option_that_the_authors_model_lacks_cannot_be_exported(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"codebook_size": 8, "grid_height": 2, "grid_width": 2, "width": 32, "heads": 2}
    DPAR(DPARConfig(classes=1, **sizes, decoder_start="class")).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="the authors' model has no decoder_start"):
        convert(str(tmp_path / "model"), tmp_path / "model.pt", ConvertSettings())


def test_weights_of_the_first_architecture_are_refused_with_a_remedy(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"codebook_size": 8, "grid_height": 2, "grid_width": 2, "width": 32, "heads": 2}
    folder = DPAR(DPARConfig(classes=1, **sizes)).save_pretrained(tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(ModelError, match=r"format version 1.*reads 2.*train the model again with `dpar train`"):
        DPAR.from_pretrained(folder)


def test_config_json_records_the_kind_of_entropy_model(tmp_path: Path, authors: Any) -> None:
    convert(str(authors("entropy_tiny").checkpoint), tmp_path / "e", ConvertSettings(**TINY))
    assert read_weights(tmp_path / "e").values["start_token"] is False
    assert LlamaGen.from_pretrained(tmp_path / "e").cls_embedding is None
