"""Weights on disk: saved, loaded, and refused if they are damaged or do not fit."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpar import DPAR, LlamaGen, LlamaGenConfig, ModelError, VQTokenizer, fingerprint
from dpar.pretrained import model_type
from tests.dpar.tiny_models import MODELS, Model, batch, dpar, llamagen, run, tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return llamagen().save_pretrained(tmp_path / "weights")


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


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


def test_saved_weights_have_the_file_permissions_of_their_config(tmp_path: Path) -> None:
    folder = LlamaGen(LlamaGenConfig(codebook_size=8, width=16, heads=2, layers=1)).save_pretrained(tmp_path / "m")
    modes = {(folder / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_equal_weights_have_equal_fingerprints_whenever_saved(tmp_path: Path) -> None:
    found = {fingerprint(llamagen().save_pretrained(tmp_path)) for _ in range(10)}
    assert len(found) == 1
    assert len(found.pop()) == 64


def test_the_kind_of_a_saved_model_is_read_from_its_config(tmp_path: Path) -> None:
    for make, kind in zip(MODELS, ["dpar", "llamagen", "vq"], strict=True):
        make().save_pretrained(tmp_path / kind)
        assert model_type(tmp_path / kind) == kind


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


def test_another_kind_of_model_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"weights holds a 'llamagen' model; a 'dpar' model is needed here"):
        DPAR.from_pretrained(saved)


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
