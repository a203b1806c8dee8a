import argparse
import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dpar import DPAR, DPARConfig, LlamaGen, LlamaGenConfig, ModelError, VQConfig, VQTokenizer, fingerprint
from dpar.checkpoint_files import HEADS, read, write
from dpar.pretrained import model_type
from dpar.rope import token_table, with_condition

VQ = VQConfig(codebook_size=48, codebook_dim=6, channels=32, channel_multipliers=(1, 2), residual_blocks=1)
GPT = LlamaGenConfig(codebook_size=48, grid_height=3, grid_width=3, classes=5, width=32, heads=2, layers=2)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def vq() -> State:
    torch.manual_seed(0)
    return VQTokenizer(VQ).state_dict()


@pytest.fixture(scope="module")
def gpt() -> State:
    torch.manual_seed(1)
    model = LlamaGen(GPT)
    torch.nn.init.normal_(model.output.weight)
    return model.state_dict()


def saved(path: Path, held: Any) -> Path:
    torch.save(held, path)
    return path


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


def assert_holds(model: torch.nn.Module, state: State) -> None:
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name].float()) for name in state)


# Where the state dict is, and other entries next to it


@pytest.mark.parametrize("key", ["model", "ema", "module", "state_dict", None])
def test_a_state_dict_is_found_under_each_of_llamagens_keys(
    tmp_path: Path, vq: State, gpt: State, key: str | None
) -> None:
    for name, state in (("vq", vq), ("gpt", gpt)):
        saved(tmp_path / f"{name}.pt", state if key is None else {key: state, "steps": 7})
    tokenizer = VQTokenizer.from_pretrained(tmp_path / "vq.pt")
    assert tokenizer.config == VQ
    assert not tokenizer.training
    assert_holds(tokenizer, vq)
    model = LlamaGen.from_pretrained(str(tmp_path / "gpt.pt"), heads=2, grid=(3, 3))
    assert model.config == GPT
    assert_holds(model, gpt)


def test_the_model_is_preferred_to_its_moving_average(tmp_path: Path, vq: State) -> None:
    average = {name: torch.zeros_like(tensor) for name, tensor in vq.items()}
    assert_holds(VQTokenizer.from_pretrained(saved(tmp_path / "a.pt", {"ema": average, "model": vq})), vq)
    assert_holds(VQTokenizer.from_pretrained(saved(tmp_path / "b.pt", {"ema": vq, "model": None})), vq)


def training_file(path: Path, state: State, **arguments: object) -> Path:
    given = {"gpt_type": "c2i", "image_size": 48, "downsample_size": 16, "num_classes": 5, "dropout_p": 0.1}
    held = {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "steps": 300}
    return saved(path, held | {"args": argparse.Namespace(**given | arguments)})


def test_heads_and_grid_are_read_from_the_arguments_of_a_training_file(tmp_path: Path, gpt: State) -> None:
    path = training_file(tmp_path / "0000300.pt", gpt, n_head=2)
    model = LlamaGen.from_pretrained(path)
    assert model.config == GPT
    assert_holds(model, gpt)
    assert read(training_file(tmp_path / "b.pt", gpt, gpt_model="GPT-B"), grid=(3, 3)).sizes["heads"] == 12


def test_heads_and_grid_are_read_from_a_stored_rotary_table(tmp_path: Path, gpt: State) -> None:
    table = with_condition(token_table(3, 3, 16))
    model = LlamaGen.from_pretrained(saved(tmp_path / "c2i_384.pt", {"model": gpt | {"freqs_cis": table}}))
    assert model.config == GPT
    for other in (table * 2, table[:-1], table[:, :3]):
        path = saved(tmp_path / "other.pt", gpt | {"freqs_cis": other})
        with pytest.raises(ModelError, match=r"other\.pt.*freqs_cis"):
            LlamaGen.from_pretrained(path)


def test_known_derived_tensors_are_ignored(tmp_path: Path, vq: State) -> None:
    path = saved(tmp_path / "vq.pt", {"model": vq | {"quantize.codebook_used": torch.zeros(65536)}})
    assert_holds(VQTokenizer.from_pretrained(path), vq)


def test_files_of_half_precision_load_as_float32(tmp_path: Path, gpt: State) -> None:
    half = {name: tensor.bfloat16() for name, tensor in gpt.items()}
    model = LlamaGen.from_pretrained(saved(tmp_path / "a.pt", half), heads=2, grid=(3, 3))
    assert model.output.weight.dtype == torch.float32
    assert_holds(model, half)


def test_files_in_pytorchs_old_format_load(tmp_path: Path, vq: State) -> None:
    torch.save({"model": vq}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_holds(VQTokenizer.from_pretrained(tmp_path / "old.pt"), vq)


# Sizes


def shapes_of(width: int, layers: int = 1, classes: int = 1000) -> State:
    """Return a GPT's tensors of these sizes without memory for their values."""
    with torch.device("meta"):
        config = LlamaGenConfig(width=width, heads=HEADS[width], layers=layers, classes=classes)
        shapes = {name: tensor.shape for name, tensor in LlamaGen(config).state_dict().items()}
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("width", "head_width"), [(768, 64), (1024, 64), (1280, 64), (1536, 64), (3200, 100)])
def test_the_number_of_heads_is_known_for_llamagens_widths(tmp_path: Path, width: int, head_width: int) -> None:
    sizes = read(saved(tmp_path / "c2i_X_256.pt", shapes_of(width, layers=3))).sizes
    assert LlamaGenConfig(**sizes).head_dim == head_width
    assert (sizes["layers"], sizes["classes"], sizes["codebook_size"]) == (3, 1000, 16384)


def test_an_unknown_number_of_heads_must_be_given(tmp_path: Path, gpt: State) -> None:
    path = saved(tmp_path / "a.pt", gpt)
    with pytest.raises(ModelError, match=r"a\.pt does not record its number of heads.*width of 32.*pass heads="):
        LlamaGen.from_pretrained(path)
    with pytest.raises(ModelError, match=r"a\.pt has 2 heads; 4 were requested"):
        LlamaGen.from_pretrained(training_file(tmp_path / "a.pt", gpt, n_head=2), heads=4)


@pytest.mark.parametrize(
    ("name", "side"),
    [("c2i_B_256.pt", 16), ("c2i_XXL_384.pt", 24), ("gpt_512.pt", 32), ("a.pt", 16), ("a_2560.pt", 16)],
)
def test_the_grid_comes_from_the_file_name_or_llamagens_default(tmp_path: Path, name: str, side: int) -> None:
    sizes = read(saved(tmp_path / name, shapes_of(768))).sizes
    assert (sizes["grid_height"], sizes["grid_width"]) == (side, side)


def test_weights_for_384_px_are_refused_for_256_px_with_the_reason(tmp_path: Path) -> None:
    path = saved(tmp_path / "c2i_B_384.pt", shapes_of(768))
    assert read(path, grid=(24, 24)).sizes["grid_width"] == 24
    with pytest.raises(ModelError, match=r"c2i_B_384\.pt is for a grid of 24×24.*16×16 was requested.*trained on"):
        LlamaGen.from_pretrained(path, grid=(16, 16))


def test_a_directory_must_match_the_requested_heads_and_grid(tmp_path: Path) -> None:
    LlamaGen(GPT).save_pretrained(tmp_path)
    assert LlamaGen.from_pretrained(tmp_path, heads=2, grid=(3, 3)).config == GPT
    with pytest.raises(ModelError, match="has 2 heads; 4 were requested"):
        LlamaGen.from_pretrained(tmp_path, heads=4)
    with pytest.raises(ModelError, match="is for a grid of 3×3; 4×4 was requested"):
        LlamaGen.from_pretrained(tmp_path, grid=(4, 4))


def test_a_model_without_a_guidance_class_is_refused(tmp_path: Path, gpt: State) -> None:
    path = training_file(tmp_path / "a.pt", gpt, n_head=2, num_classes=6)
    with pytest.raises(ModelError, match=r"a\.pt was trained without a guidance class"):
        LlamaGen.from_pretrained(path)


# Files that do not match


def test_missing_and_unexpected_tensors_are_listed(tmp_path: Path, vq: State, gpt: State) -> None:
    odd = without(vq, "quant_conv.bias", "decoder.conv_in.bias") | {"loss.logvar": torch.zeros(1)}
    with pytest.raises(ModelError) as caught:
        VQTokenizer.from_pretrained(saved(tmp_path / "vq.pt", {"model": odd}))
    for said in ("vq.pt", "missing quant_conv.bias", "missing decoder.conv_in.bias", "unexpected loss.logvar"):
        assert said in str(caught.value)
    for name in ("norm.weight", "tok_embeddings.weight"):
        path = saved(tmp_path / "gpt.pt", without(gpt, name))
        with pytest.raises(ModelError, match=f"missing {name}"):
            LlamaGen.from_pretrained(path, heads=2, grid=(3, 3))
    grouped = gpt | {"layers.1.attention.wqkv.weight": torch.zeros(64, 32)}
    with pytest.raises(ModelError, match=r"layers.1.attention.wqkv.weight is \(64, 32\), not \(96, 32\)"):
        LlamaGen.from_pretrained(saved(tmp_path / "gpt.pt", grouped), heads=2, grid=(3, 3))


def test_a_file_of_the_other_kind_is_refused_by_name(tmp_path: Path, vq: State, gpt: State) -> None:
    vq_file = saved(tmp_path / "vq.pt", vq)
    gpt_file = training_file(tmp_path / "gpt.pt", gpt, n_head=2)
    assert (model_type(vq_file), model_type(gpt_file)) == ("vq", "llamagen")
    with pytest.raises(ModelError, match=r"vq\.pt is LlamaGen's VQ tokenizer: 48 codes.*GPT is needed"):
        LlamaGen.from_pretrained(vq_file)
    with pytest.raises(ModelError, match=r"gpt\.pt is LlamaGen's GPT: 2 layers.*3×3 tokens.*VQ tokenizer is needed"):
        VQTokenizer.from_pretrained(gpt_file)
    with pytest.raises(ModelError, match=r"gpt\.pt is LlamaGen's GPT: 2 layers.*a DPAR model is needed"):
        DPAR.from_pretrained(gpt_file)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 287618418\n"


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"vq_ds16_c2i.pt is at https://example.org\n", "is a text file"),
        (POINTER, r"is a Git LFS pointer of a file of 287,618,418 bytes.*git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (bytes(range(256)) * 8, "is not a file that PyTorch wrote"),
        (b"\x80\x02broken", "is not a file that PyTorch wrote, or damaged"),
    ],
)
def test_an_unrelated_file_is_one_message(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "c2i_B_256.pt"
    path.write_bytes(content)
    for model in (VQTokenizer, LlamaGen):
        with pytest.raises(ModelError, match=rf"c2i_B_256\.pt {says}.*needed") as caught:
            model.from_pretrained(path)
        assert "\n" not in str(caught.value)


def test_other_formats_and_models_are_one_message(tmp_path: Path, vq: State) -> None:
    whole = saved(tmp_path / "whole.pt", vq).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    save_file({"fc.bias": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-3])
    np.savez(tmp_path / "a.npz", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("thesis.tex", "do not lose me")
    saved(tmp_path / "list.pt", [1, 2])
    saved(tmp_path / "empty.pt", {})
    saved(tmp_path / "nothing.pt", {"model": {}, "steps": 3})
    saved(tmp_path / "resnet.pt", {"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)})
    saved(tmp_path / "t2i.pt", {"cls_embedding.cap_proj.fc1.weight": torch.zeros(2), "norm.weight": torch.zeros(2)})
    cases = {
        "cut.pt": "is an incomplete download",
        "a.safetensors": r"holds another model \(its tensors: fc.bias",
        "cut.safetensors": "is not a complete safetensors file",
        "a.npz": "is a zip file that PyTorch did not write",
        "a.zip": "is a zip file that PyTorch did not write",
        "list.pt": "holds a list",
        "empty.pt": "has no state dict",
        "nothing.pt": r"has no state dict, bare or under model, .*\(it has model, steps\)",
        "resnet.pt": r"holds another model \(its tensors: conv1.weight, fc.bias",
        "t2i.pt": "holds LlamaGen's text-to-image GPT",
    }
    for name, says in cases.items():
        for model in (VQTokenizer, LlamaGen):
            with pytest.raises(ModelError, match=f"{name} {says}") as caught:
                model.from_pretrained(tmp_path / name)
            assert "\n" not in str(caught.value), name
    with pytest.raises(ModelError, match=r"no model at .*c2i_B_256\.pt: the file does not exist"):
        LlamaGen.from_pretrained(tmp_path / "c2i_B_256.pt")


def test_code_in_a_file_is_not_executed(tmp_path: Path, vq: State) -> None:
    trace = tmp_path / "was-here"
    for held in ({"model": vq, "args": Harmful(trace)}, Harmful(trace)):
        path = saved(tmp_path / "a.pt", held)
        with pytest.raises(ModelError, match=r"a\.pt holds Python objects \(\w+\.mkdir\).*tensors") as caught:
            VQTokenizer.from_pretrained(path)
        assert "\n" not in str(caught.value)
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Harmful(trace)))
    with pytest.raises(ModelError, match=r"a\.pt"):
        VQTokenizer.from_pretrained(tmp_path / "a.pt")
    assert not trace.exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed while reading, not after


# Files that claim more than they contain


def test_layers_must_be_numbered_without_gaps(tmp_path: Path, vq: State, gpt: State) -> None:
    for state, name in ((vq, "encoder.conv_blocks.999999999.res.0.conv1.weight"), (gpt, "layers.999999999.x")):
        path = saved(tmp_path / "a.pt", state | {name: torch.zeros(1)})
        model = VQTokenizer if state is vq else LlamaGen
        with pytest.raises(ModelError, match=f"unexpected {name}"):
            model.from_pretrained(path, heads=2, grid=(3, 3))


def test_more_layers_than_any_model_has_are_refused_before_they_are_built(tmp_path: Path, gpt: State) -> None:
    path = saved(tmp_path / "a.pt", gpt | {f"layers.{i}.x": torch.zeros(1) for i in range(2000)})
    with pytest.raises(ModelError, match="layers asks for 2000 layers; at most 1024 are read"):
        LlamaGen.from_pretrained(path, heads=2, grid=(3, 3))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"n_head": 2, "grid": [10**9, 10**9]},
            "a grid of 1000000000×1000000000 tokens .* is too large|grid_height is",
        ),
        ({"n_head": 2, "grid": [2**12, 2**12]}, "a grid of 4096×4096 tokens .* is too large"),
        ({"n_head": 2, "grid": ["3", 3]}, r"grid in its training arguments is \['3', 3\]; two whole numbers"),
        ({"n_head": 2, "grid": [3]}, "two whole numbers"),
        ({"n_head": -2}, "n_head in its training arguments is -2; a whole number"),
        ({"n_head": 10**9}, "heads is"),
        ({"n_head": True}, "n_head in its training arguments is True"),
        ({"n_head": 2, "image_size": 48, "downsample_size": "x"}, "downsample_size in its training arguments is 'x'"),
        ({"n_head": 2, "image_size": 0}, "image_size in its training arguments is 0"),
        ({"n_head": 2, "num_classes": torch.zeros(3)}, "num_classes in its training arguments is tensor"),
    ],
)
def test_invalid_training_arguments_are_named(tmp_path: Path, gpt: State, arguments: dict[str, Any], says: str) -> None:
    path = training_file(tmp_path / "a.pt", gpt, **arguments)
    with pytest.raises(ModelError, match=rf"a\.pt: .*({says})"):
        LlamaGen.from_pretrained(path)


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "c2i_B_256.pt", shapes_of(768, layers=3))
    with pytest.raises(ModelError, match=r"c2i_B_256\.pt has tensors of [\d,]+ bytes in a file of [\d,]+"):
        LlamaGen.from_pretrained(path)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_sparse_quantised_and_empty_tensors_are_refused(tmp_path: Path, gpt: State) -> None:
    odd = {
        "sparse": torch.zeros(48, 32).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.zeros(48, 32), 0.1, 0, torch.qint8),
        "empty": torch.empty(48, 32, device="meta"),
    }
    for tensor in odd.values():
        path = saved(tmp_path / "a.pt", gpt | {"tok_embeddings.weight": tensor})
        with pytest.raises(ModelError, match=r"a\.pt"):
            LlamaGen.from_pretrained(path, heads=2, grid=(3, 3))


def test_a_zip_file_that_unpacks_to_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(2**24))
    with pytest.raises(ModelError, match=r"a\.pt is a zip file that PyTorch did not write.* unpack to 16,777,216"):
        LlamaGen.from_pretrained(tmp_path / "a.pt")


# Fingerprints, and writing files


def test_the_fingerprint_of_a_file_is_its_sha256(tmp_path: Path, vq: State) -> None:
    path = saved(tmp_path / "vq.pt", vq)
    assert fingerprint(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_heads_and_grid_missing_from_the_name_survive_writing(
    tmp_path: Path, gpt: State, grid: tuple[int, int]
) -> None:
    sizes = {"width": 32, "heads": 2, "grid_height": grid[0], "grid_width": grid[1]}
    write(tmp_path / "a.pt", "llamagen", sizes, gpt)
    config = LlamaGen.from_pretrained(tmp_path / "a.pt").config
    assert (config.heads, config.grid_height, config.grid_width) == (2, *grid)


def test_a_written_file_passes_llamagens_strict_loading(tmp_path: Path, vq: State) -> None:
    write(tmp_path / "vq.pt", "vq", {}, vq)
    held = torch.load(tmp_path / "vq.pt", weights_only=True)
    assert held.keys() == {"model"}
    assert held["model"].keys() == {*vq, "quantize.codebook_used"}
    write(tmp_path / "c2i_B_384.pt", "llamagen", {"width": 768, "heads": 12, "grid_height": 24, "grid_width": 24}, {})
    assert torch.load(tmp_path / "c2i_B_384.pt", weights_only=True).keys() == {"model"}


def test_rotary_positions_of_dpar_need_a_head_size_divisible_by_8() -> None:
    assert LlamaGenConfig(width=3200, heads=32).head_dim == 100
    with pytest.raises(ModelError, match="100 per head; rotary positions need a multiple of 8"):
        DPARConfig(width=3200, heads=32)
