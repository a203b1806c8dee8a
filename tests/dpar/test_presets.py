"""Presets, and the ranges of the fields of a config."""

from typing import Any

import pytest
import torch

from dpar import DPAR, PRESETS, DPARConfig, LlamaGen, LlamaGenConfig, ModelError, preset


@pytest.mark.parametrize(
    ("config", "name", "value", "fault"),
    [
        (DPARConfig, "codebook_size", 0, "codebook_size is 0; it must be at least 1"),
        (DPARConfig, "grid_height", 0, "grid_height is 0"),
        (DPARConfig, "grid_width", -1, "grid_width is -1"),
        (DPARConfig, "classes", -1, "classes is -1"),
        (DPARConfig, "heads", 0, "heads is 0"),
        (DPARConfig, "heads", 7, "width 768 over 7 heads is 109.714 per head"),
        (DPARConfig, "heads", 64, "width 768 over 64 heads is 12 per head; rotary positions need a multiple of 8"),
        (DPARConfig, "dropout", 1.0, "dropout is 1.0"),
        (DPARConfig, "dropout", -0.1, "dropout is -0.1"),
        (DPARConfig, "encoder_layers", 0, "encoder_layers is 0"),
        (DPARConfig, "patch_layers", 0, "patch_layers is 0"),
        (DPARConfig, "decoder_layers", -2, "decoder_layers is -2"),
        (DPARConfig, "rope", "3d", "rope is '3d'; it must be one of dynamic, dynamic-compact, 2d"),
        (LlamaGenConfig, "layers", 0, "layers is 0"),
        (LlamaGenConfig, "width", 0, "width is 0"),
    ],
)
def test_a_config_out_of_range_is_refused_by_name(config: type[Any], name: str, value: object, fault: str) -> None:
    with pytest.raises(ModelError, match=fault):
        config(**{name: value})


def test_the_defaults_are_the_b_presets() -> None:
    assert preset("dpar-b") == DPARConfig()
    assert preset("llamagen-b") == LlamaGenConfig()


def test_every_field_of_a_preset_can_be_overridden() -> None:
    config = preset("dpar-l", classes=5, grid_width=24, rope="2d")
    assert isinstance(config, DPARConfig)
    assert (config.classes, config.grid_width, config.rope, config.width) == (5, 24, "2d", 1024)
    with pytest.raises(ModelError, match="patch_layers is 0"):
        preset("dpar-l", patch_layers=0)


@pytest.mark.parametrize("size", ["b", "l", "xl", "xxl"])
def test_dpar_has_as_many_layers_as_llamagen_of_its_size(size: str) -> None:
    ours, theirs = preset(f"dpar-{size}"), preset(f"llamagen-{size}")
    assert isinstance(ours, DPARConfig)
    assert isinstance(theirs, LlamaGenConfig)
    assert ours.encoder_layers + ours.patch_layers + ours.decoder_layers == theirs.layers
    assert (ours.width, ours.heads) == (theirs.width, theirs.heads)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_a_model(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = DPAR(config) if isinstance(config, DPARConfig) else LlamaGen(config)
    assert model.output.weight.shape == (16384, config.width)


@pytest.mark.parametrize(
    ("name", "nearest"), [("dpar-bb", "dpar-b"), ("dparl", "dpar-l"), ("lamagen-xl", "llamagen-xl")]
)
def test_an_unknown_preset_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ModelError, match=f"no preset is called '{name}'. Did you mean {nearest}\\? Available: dpar-"):
        preset(name)


def test_an_unknown_preset_without_a_near_match_lists_all() -> None:
    with pytest.raises(ModelError, match=r"no preset is called '?qqq'?\. Available: .*llamagen-xxl"):
        preset("qqq")
