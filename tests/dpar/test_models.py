import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpar import (
    DPAR,
    PRESETS,
    DPARConfig,
    LlamaGen,
    LlamaGenConfig,
    ModelError,
    VQConfig,
    VQTokenizer,
    fingerprint,
    preset,
)
from dpar.pretrained import model_type

V, CLASSES = 23, 3
SIZES: dict[str, Any] = {
    "codebook_size": V,
    "grid_height": 4,
    "grid_width": 4,
    "classes": CLASSES,
    "width": 32,
    "heads": 2,
}


def dpar(**sizes: Any) -> DPAR:
    torch.manual_seed(0)
    return DPAR(DPARConfig(**{**SIZES, "patch_layers": 2, "decoder_layers": 2, **sizes}))


def llamagen(**sizes: Any) -> LlamaGen:
    torch.manual_seed(0)
    return LlamaGen(LlamaGenConfig(**{**SIZES, "layers": 2, **sizes}))


def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    config = VQConfig(
        codebook_size=16, codebook_dim=4, channels=32, channel_multipliers=(1, 2), residual_blocks=1, latent_channels=8
    )
    return VQTokenizer(config)


Model = DPAR | LlamaGen | VQTokenizer
MODELS: list[Callable[[], Model]] = [dpar, llamagen, tokenizer]
SEQUENCES: list[Callable[..., DPAR | LlamaGen]] = [dpar, llamagen]


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(V, (4, 16), generator=generator)
    starts = torch.rand(4, 16, generator=generator) < 0.4
    starts[:, ::4] = True  # patches of at most four tokens
    return codes, torch.tensor([0, 1, 2, CLASSES]), starts


def run(model: DPAR | LlamaGen, codes: Tensor, labels: Tensor | None, starts: Tensor) -> Tensor:
    logits: Tensor = model(codes, labels, starts) if isinstance(model, DPAR) else model(codes, labels)
    return logits


def loss_of(model: DPAR | LlamaGen) -> Tensor:
    codes, labels, starts = batch()
    return F.cross_entropy(run(model, codes, labels, starts).flatten(0, 1), codes.flatten())


# Learning


@pytest.mark.slow
@pytest.mark.parametrize("make", SEQUENCES)
def test_a_model_can_memorise_one_batch(make: Callable[..., DPAR | LlamaGen]) -> None:
    model = make(width=64, dropout=0.0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        loss = loss_of(model)
        if loss.item() < 0.05:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss_of(model).item() < 0.05


@pytest.mark.parametrize("make", SEQUENCES)
def test_an_untrained_model_predicts_all_tokens_equally(make: Callable[..., DPAR | LlamaGen]) -> None:
    assert loss_of(make()).item() == pytest.approx(torch.tensor(float(V)).log().item(), abs=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        dpar(),
        dpar(encoder_layers=2),
        dpar(decoder_start="class"),
        dpar(rope="dynamic-compact", dropout=0.0),
        dpar(rope="2d", classes=0),
        llamagen(),
        llamagen(classes=0),
        llamagen(classes=0, start_token=False),
    ],
)
def test_every_parameter_receives_a_gradient(model: DPAR | LlamaGen) -> None:
    torch.manual_seed(0)
    nn.init.normal_(model.output.weight)
    codes, labels, starts = batch()
    fit = labels.clamp(max=model.config.classes)
    targets = model.targets(codes) if isinstance(model, LlamaGen) else codes
    F.cross_entropy(run(model, codes, fit, starts).flatten(0, 1), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("make", SEQUENCES)
def test_dropout_acts_in_training_only(make: Callable[..., DPAR | LlamaGen]) -> None:
    model = make(dropout=0.5)
    nn.init.normal_(model.output.weight)
    with torch.no_grad():
        assert not torch.equal(run(model, *batch()), run(model, *batch()))
        model.eval()
        assert torch.equal(run(model, *batch()), run(model, *batch()))


@pytest.mark.parametrize("make", SEQUENCES)
def test_weights_start_as_llamagens_do(make: Callable[..., DPAR | LlamaGen]) -> None:
    for name, parameter in make(width=64).named_parameters():
        if name == "output.weight":
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 500:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


@pytest.mark.parametrize("make", SEQUENCES)
def test_autocast_logits_are_close_to_float32(make: Callable[..., DPAR | LlamaGen]) -> None:
    model = make().eval()
    nn.init.normal_(model.output.weight, std=0.1)
    with torch.no_grad():
        exact = run(model, *batch())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = run(model, *batch()).float()
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)


# Weights on disk


@pytest.mark.parametrize("make", MODELS)
def test_a_saved_model_loads_bit_for_bit(make: Callable[[], Model], tmp_path: Path) -> None:
    model = make()
    assert model.save_pretrained(tmp_path / "new" / "weights") == tmp_path / "new" / "weights"
    loaded = type(model).from_pretrained(tmp_path / "new" / "weights")
    assert loaded.config == model.config
    assert not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("make", MODELS)
def test_a_model_saved_as_bfloat16_loads_rounded_in_float32(make: Callable[[], Model], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    ours, theirs = model.state_dict(), type(model).from_pretrained(tmp_path).state_dict()
    for name, tensor in ours.items():
        assert theirs[name].dtype == torch.float32
        assert torch.equal(tensor.bfloat16().float(), theirs[name])


def test_loaded_models_give_the_same_logits(tmp_path: Path) -> None:
    model = dpar(rope="dynamic-compact").eval()
    nn.init.normal_(model.output.weight)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(run(model, *batch()), run(DPAR.from_pretrained(tmp_path), *batch()))


def test_saving_again_replaces_the_weights_and_leaves_no_temporary_files(tmp_path: Path) -> None:
    llamagen().save_pretrained(tmp_path)
    before = fingerprint(tmp_path)
    other = llamagen()
    nn.init.ones_(other.output.weight)
    other.save_pretrained(tmp_path)
    assert fingerprint(tmp_path) != before
    assert (LlamaGen.from_pretrained(tmp_path).output.weight == 1).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_equal_weights_have_equal_fingerprints_whenever_saved(tmp_path: Path) -> None:
    found = {fingerprint(llamagen().save_pretrained(tmp_path)) for _ in range(10)}
    assert len(found) == 1
    assert len(found.pop()) == 64


def test_the_kind_of_a_saved_model_is_read_from_its_config(tmp_path: Path) -> None:
    for make, kind in zip(MODELS, ["dpar", "llamagen", "vq"], strict=True):
        make().save_pretrained(tmp_path / kind)
        assert model_type(tmp_path / kind) == kind


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return llamagen().save_pretrained(tmp_path / "weights")


def test_another_kind_of_model_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"weights holds a 'llamagen' model; a 'dpar' model is needed here"):
        DPAR.from_pretrained(saved)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_fields_that_were_removed_are_read_at_the_value_that_is_left(tmp_path: Path) -> None:
    model = dpar()
    folder = model.save_pretrained(tmp_path / "weights")
    change_config(folder, patch_query="max", offset_embedding=False)
    assert DPAR.from_pretrained(folder).config == model.config
    change_config(folder, patch_query="mean")
    with pytest.raises(ModelError, match=r"config.json has settings that DPARConfig does not know: patch_query"):
        DPAR.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.pop("norm.weight"), "missing norm.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), "unexpected extra"),
        (lambda t: t.update({"norm.weight": torch.zeros(7)}), r"norm.weight is \(7,\), not \(32,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    saved: Path, change: Callable[[dict[str, Tensor]], object], fault: str
) -> None:
    change_tensors(saved, change)
    with pytest.raises(ModelError, match=f"model.safetensors does not fit a LlamaGen: {fault}$"):
        LlamaGen.from_pretrained(saved)


def test_eight_of_many_errors_are_listed_and_the_rest_counted(saved: Path) -> None:
    kept = {f"layers.{i}.attention.wqkv.weight" for i in range(llamagen().config.layers)}
    change_tensors(saved, lambda tensors: [tensors.pop(name) for name in list(tensors) if name not in kept])
    missing = len(llamagen().state_dict()) - len(kept)
    with pytest.raises(ModelError, match=f"missing .*; and {missing - 8} more$"):
        LlamaGen.from_pretrained(saved)


@pytest.mark.parametrize(
    ("field", "value", "needed"),
    [
        ("width", "32", "a whole number of at most 16,777,216"),
        ("width", 32.0, "a whole number"),
        ("width", True, "a whole number"),
        ("width", None, "a whole number"),
        ("width", [32], "a whole number"),
        ("width", 2**31, "a whole number"),
        ("width", 10**400, "a whole number"),
        ("width", -32, "at least 1"),
        ("layers", {}, "a whole number"),
        ("layers", 1000, "asks for 1000 layers; .* has tensors of 2"),
        ("layers", 10**7, "asks for 10000000 layers; at most 1024 are read"),
        ("dropout", "0.1", "a number"),
        ("dropout", math.nan, "a number"),
        ("dropout", 10**400, "a number"),
        ("dropout", 1, "at least 0 and below 1"),
        ("start_token", 1, "true or false"),
        ("start_token", "no", "true or false"),
    ],
)
def test_an_invalid_config_value_is_named_with_its_file(saved: Path, field: str, value: object, needed: str) -> None:
    change_config(saved, **{field: value})
    with pytest.raises(ModelError, match=rf"weights/config\.json: {field} .*{needed}") as caught:
        LlamaGen.from_pretrained(saved)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("make", "values", "says"),
    [
        (dpar, {"rope": "3d"}, "rope is '3d'; it must be one of dynamic, dynamic-compact, 2d"),
        (dpar, {"rope": ["2d"]}, r"rope is \['2d'\]; it must be one of"),
        (dpar, {"patch_layers": 10**9}, "patch_layers is 1000000000; it must be a whole number"),
        (tokenizer, {"channel_multipliers": [1, "2"]}, "channel_multipliers is .*; it must be a list of whole numbers"),
        (tokenizer, {"channel_multipliers": 2}, "channel_multipliers is 2; it must be a list of whole numbers"),
        (tokenizer, {"channel_multipliers": [1] * 50_000}, "channel_multipliers asks for 50000 layers"),
        (tokenizer, {"residual_blocks": 10**6}, "residual_blocks asks for 1000000 layers"),
        (tokenizer, {"\x1b[31mred": 1}, r"does not know: '\\x1b\[31mred'"),
    ],
)
def test_choices_and_lists_of_a_config_are_checked_too(
    tmp_path: Path, make: Callable[[], Any], values: dict[str, object], says: str
) -> None:
    model = make()
    change_config(model.save_pretrained(tmp_path), **values)
    with pytest.raises(ModelError, match=rf"config\.json.*{says}"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("values", [{"width": 2**20}, {"codebook_size": 2**24, "classes": 2**24}])
def test_sizes_that_contradict_the_tensors_are_refused_before_allocation(saved: Path, values: dict[str, int]) -> None:
    change_config(saved, **values)
    with pytest.raises(ModelError, match=r"model\.safetensors does not fit a LlamaGen: .* is \("):
        LlamaGen.from_pretrained(saved)


def test_a_grid_too_large_for_memory_is_refused(saved: Path) -> None:
    change_config(saved, grid_height=10**6, grid_width=10**6)
    with pytest.raises(ModelError, match=r"config\.json: a grid of 1000000×1000000 tokens .* too large"):
        LlamaGen.from_pretrained(saved)


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 10_000, '{"width": ', " " * 2**21, "\udcff"])
def test_a_config_that_is_not_json_is_one_message(saved: Path, content: str) -> None:
    (saved / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=r"weights/config\.json cannot be read"):
        LlamaGen.from_pretrained(saved)


def test_a_config_that_is_a_pipe_is_not_waited_for(saved: Path) -> None:
    (saved / "config.json").unlink()
    os.mkfifo(saved / "config.json")
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        LlamaGen.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_that_are_not_floating_point_are_refused(saved: Path, dtype: torch.dtype) -> None:
    change_tensors(saved, lambda tensors: tensors.update({"norm.weight": torch.ones(32, dtype=dtype)}))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelError, match=f"norm.weight holds {kind}, not floating-point numbers"):
        LlamaGen.from_pretrained(saved)


@pytest.mark.parametrize(("old", "new"), [(b'"F32"', b'"F\xb32"'), (b'"F32"', b'"Q32"'), (b"norm.w", b"norm\x1bw")])
def test_a_flipped_byte_in_a_header_is_one_message(saved: Path, old: bytes, new: bytes) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(old, new[: len(old)], 1))
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        LlamaGen.from_pretrained(saved)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["my models/vq", "owner/na--me", "a\x1b[31m/b"])
def test_an_invalid_model_name_is_one_message(name: str) -> None:
    with pytest.raises(ModelError, match=r"no model at .*: there is no such directory") as caught:
        VQTokenizer.from_pretrained(name)
    assert str(caught.value).isprintable()


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_weights_file_is_refused(saved: Path, size: int) -> None:
    cut(saved / "model.safetensors", size)
    with pytest.raises(ModelError, match=r"model.safetensors is not a complete safetensors file"):
        LlamaGen.from_pretrained(saved)


def test_missing_weights_are_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"weights holds no weights yet: model.safetensors is missing"):
        LlamaGen.from_pretrained(saved)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model at .*nowhere: there is no such directory"):
        LlamaGen.from_pretrained(tmp_path / "nowhere")


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a model directory: it has no config.json"):
        LlamaGen.from_pretrained(tmp_path)


def test_a_file_in_place_of_a_directory_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json is a file of a model directory; pass the directory"):
        LlamaGen.from_pretrained(saved / "config.json")


@pytest.mark.parametrize(
    ("text", "fault"),
    [(b"", "cannot be read"), (b"{", "cannot be read"), (b"\xff\xfe", "cannot be read"), (b"[1]", "not a JSON object")],
)
def test_a_config_that_is_not_a_json_object_is_refused(saved: Path, text: bytes, fault: str) -> None:
    (saved / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=f"config.json.*{fault}"):
        LlamaGen.from_pretrained(saved)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"colour": 1, "a": 2}, "config.json has settings that LlamaGenConfig does not know: a, colour"),
        ({"format": 99}, "config.json has format version 99; this version reads 1"),
        ({"heads": 3}, "width 32 over 3 heads"),
        ({"model_type": None}, "weights holds a None model"),
    ],
)
def test_invalid_config_values_are_named(saved: Path, values: dict[str, object], fault: str) -> None:
    change_config(saved, **values)
    with pytest.raises(ModelError, match=fault):
        LlamaGen.from_pretrained(saved)


# Configs and presets


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
    assert {f.name for f in fields(config)} >= {"codebook_size", "width"}


@pytest.mark.parametrize(
    ("name", "nearest"), [("dpar-bb", "dpar-b"), ("dparl", "dpar-l"), ("lamagen-xl", "llamagen-xl")]
)
def test_an_unknown_preset_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ModelError, match=f"no preset is called '{name}'. Did you mean {nearest}\\? Available: dpar-"):
        preset(name)


def test_an_unknown_preset_without_a_near_match_lists_all() -> None:
    with pytest.raises(ModelError, match=r"no preset is called '?qqq'?\. Available: .*llamagen-xxl"):
        preset("qqq")


def test_saved_weights_have_the_file_permissions_of_their_config(tmp_path: Path) -> None:
    folder = LlamaGen(LlamaGenConfig(codebook_size=8, width=16, heads=2, layers=1)).save_pretrained(tmp_path / "m")
    modes = {(folder / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_the_name_of_a_run_loads_its_newest_weights(tmp_path: Path) -> None:
    model = dpar().save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text("{}")
    loaded, expected = DPAR.from_pretrained(tmp_path / "run"), DPAR.from_pretrained(model)
    assert fingerprint(tmp_path / "run") == fingerprint(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
    shutil.rmtree(model)
    with pytest.raises(ModelError, match="has no weights yet: it has not written its first checkpoint"):
        DPAR.from_pretrained(tmp_path / "run")


def test_built_in_weights_load_by_their_name() -> None:
    assert VQTokenizer.from_pretrained("builtin:photos").config.codebook_size == 1024
    with pytest.raises(ModelError, match="no weights are called 'builtin:photo'; built in are builtin:photos"):
        VQTokenizer.from_pretrained("builtin:photo")
