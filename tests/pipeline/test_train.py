"""`dpar train`: loss, optimizer, validation, moving average, steps that are not finite, and what it records."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpar import DPAR, LlamaGen
from dpar.model import DPARConfig
from dpar.presets import preset
from pipeline.runs.run_folder import RunFolder
from pipeline.runtime.device import fast_bf16
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.settings.training import EntropySettings
from pipeline.train import train, train_entropy
from pipeline.training.loop import Objective, fit
from shards.reader import open_artifact
from tests.pipeline.trained import EXACT, QUIET, V, build, chosen, largest_difference, metrics, run, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def untrained() -> DPAR:
    """Build the model of ``chosen()`` with other weights."""
    config = preset("dpar-tiny", codebook_size=V, grid_height=4, grid_width=4, classes=2)
    assert isinstance(config, DPARConfig)
    return DPAR(config)


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("made") / "patches")


@pytest.mark.parametrize("model", ["dpar-tiny", "llamagen-tiny"])
def test_the_loss_falls_and_the_weights_load(patches: Path, tmp_path: Path, model: str) -> None:
    last = run(patches, tmp_path / "a", model=model, steps=40, batch=8)
    losses = [line["loss"] for line in metrics(tmp_path / "a")]
    assert losses[0] == pytest.approx(np.log(V), abs=1e-3)
    assert last["loss"] < 0.75 * losses[0]
    assert last["bits_per_token"] == pytest.approx(last["loss"] / np.log(2))
    kind = DPAR if model.startswith("dpar") else LlamaGen
    assert kind.from_pretrained(tmp_path / "a" / "model").config.classes == 2


def test_llamagen_trains_on_codes_and_the_entropy_model_on_codes_without_classes(tmp_path: Path) -> None:
    codes = build(tmp_path / "codes", kind="codes")
    run(codes, tmp_path / "a", model="llamagen-tiny", steps=1)
    settings = EntropySettings(model="llamagen-tiny", batch=8, steps=30, lr=1e-3, device="cpu", precision="fp32")
    found = train_entropy(codes, tmp_path / "entropy", settings, QUIET)
    assert found["loss"] < np.log(V) - 0.2
    model = LlamaGen.from_pretrained(tmp_path / "entropy" / "model")
    assert model.config.classes == 0
    with pytest.raises(StageError, match="the entropy model must be a LlamaGen"):
        train_entropy(codes, tmp_path / "b", EntropySettings(model="dpar-tiny"), QUIET)


def test_weights_decay_on_matrices_only(patches: Path, tmp_path: Path) -> None:
    settings = {"steps": 1, "lr": 0.01, **EXACT}
    run(patches, tmp_path / "with", weight_decay=0.5, **settings)
    run(patches, tmp_path / "without", weight_decay=0.0, **settings)
    config = DPAR.from_pretrained(tmp_path / "with" / "model").config
    torch.manual_seed(chosen().seed)
    begun = DPAR(config).state_dict()
    decayed, plain = weights(tmp_path / "with"), weights(tmp_path / "without")
    vectors = 0
    for name, value in begun.items():
        shrunk = plain[name] - 0.01 * 0.5 * value if value.ndim >= 2 else plain[name]
        vectors += value.ndim < 2
        torch.testing.assert_close(decayed[name], shrunk, rtol=0, atol=1e-6 if value.ndim >= 2 else 0)
    assert 0 < vectors < len(begun)


@pytest.mark.parametrize("micro", [1, 3, 4])
@pytest.mark.parametrize("model", ["dpar-tiny", "llamagen-tiny"])
def test_micro_batches_give_the_step_of_the_full_batch(patches: Path, tmp_path: Path, micro: int, model: str) -> None:
    settings = {"model": model, "steps": 3, "batch": 8, "lr": 1e-5, **EXACT}
    run(patches, tmp_path / "whole", **settings)
    run(patches, tmp_path / "parts", micro_batch=micro, **settings)
    assert largest_difference(tmp_path / "whole", tmp_path / "parts") < 1e-6
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


def test_validation_is_the_likelihood_of_the_held_out_artifact(patches: Path, tmp_path: Path) -> None:
    held_out = build(tmp_path / "held out", seed=5)
    run(patches, tmp_path / "a", steps=3, eval_every=2, validation=held_out, lr=0.0)
    found = {line["step"]: line["validation_bits_per_token"] for line in metrics(tmp_path / "a") if len(line) == 2}
    assert found == pytest.approx({2: 4.0, 3: 4.0}, abs=1e-6)  # at a zero head, log2 V


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run_and_keep_only_valid_checkpoints(
    patches: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    settings = {"steps": 200, "lr": 1e6, "checkpoint_every": 1, "weight_decay": 0.5}
    ended = []
    for _ in range(2):  # the second resumes from the newest checkpoint and fails the same way
        with pytest.raises(
            StageError,
            match=rf"10 steps in a row, to step \d+, gave .* lower --lr \(it is 1e\+06\).*{out}/checkpoints",
        ) as refusal:
            run(patches, out, **settings)
        ended.append(str(refusal.value))
        for path in out.rglob("*.safetensors"):
            assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())
    assert ended[0] == ended[1]
    assert metrics(out)[-1]["skipped_steps"] == 9


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(
    patches: Path, tmp_path: Path
) -> None:
    artifact = open_artifact(patches)
    settings = chosen(steps=5, checkpoint_every=1, keep=9, dropout=0.0, weight_decay=0.5, ema=0.5)
    torch.manual_seed(0)
    model = untrained()
    backwards = iter(range(99))
    model.norm.weight.register_hook(lambda gradient: gradient * (math.inf if next(backwards) in (1, 3) else 1))
    with RunFolder(tmp_path / "a", "train", {}, {}) as folder:
        fit(model, Objective(artifact=artifact, validation=None), folder, settings, QUIET)

    def tensors(step: int) -> dict[str, torch.Tensor]:
        (path,) = (tmp_path / "a" / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
        return load_file(path)

    for before, after, same in ((1, 2, True), (2, 3, False), (3, 4, True), (4, 5, False)):
        ours, theirs = tensors(before), tensors(after)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours) == same
    assert [line["skipped_steps"] for line in metrics(tmp_path / "a")] == [0, 1, 1, 2, 2]
    seals = [json.loads(path.read_text()) for path in sorted((tmp_path / "a").glob("checkpoints/*/checkpoint.json"))]
    assert [seal["notes"]["in_a_row"] for seal in seals] == [0, 1, 0, 1, 0]


def test_the_moving_average_follows_its_definition_and_is_saved(patches: Path, tmp_path: Path) -> None:
    out, decay = tmp_path / "a", 0.75
    torch.manual_seed(chosen().seed)
    expected = untrained().state_dict()
    run(patches, out, steps=3, checkpoint_every=1, keep=3, ema=decay)
    for path in sorted((out / "checkpoints").glob("*/*.safetensors")):
        after = load_file(path)
        expected = {name: decay * old + (1 - decay) * after[f"model.{name}"] for name, old in expected.items()}
    average = DPAR.from_pretrained(out / "model-ema").state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(average[name], value)
    assert any(not torch.equal(average[name], value) for name, value in weights(out).items())


def test_a_run_starts_from_given_weights(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a", steps=2)
    run(patches, tmp_path / "b", steps=1, lr=0.0, init=str(tmp_path / "a"))
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0
    shutil.rmtree(tmp_path / "a")
    run(patches, tmp_path / "b", steps=1, lr=0.0, init=str(tmp_path / "a"))  # not needed to resume


def test_the_run_records_device_precision_and_speed(patches: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    run(patches, out, steps=2)
    resolved = json.loads((out / "run.json").read_text())["resolved"]
    assert resolved["precision"] == "fp32"
    assert (resolved["device"], resolved["processes"], resolved["compile"]) == ("cpu", 1, False)
    assert resolved["attention"] == "sdpa"
    assert resolved["attention_reason"]
    line = metrics(out)[-1]
    assert line["flops_per_s"] > 0
    assert line["grad_norm"] > 0
    assert line["memory_gb"] > 0.1
    assert line["tokens_per_s"] == pytest.approx(line["images_per_s"] * 16, rel=0.1)


@pytest.mark.parametrize("choice", [{"checkpoint_layers": True}, {"precision": "bf16"}])
def test_recomputed_layers_and_bfloat16_give_nearly_the_same_losses(
    patches: Path, tmp_path: Path, choice: dict[str, Any]
) -> None:
    run(patches, tmp_path / "a", steps=3)
    run(patches, tmp_path / "b", steps=3, **choice)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("a", "b")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6 if "checkpoint_layers" in choice else 2e-2)


def test_only_a_request_for_the_slower_precision_is_remarked_on(
    patches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = chosen(steps=1)
    for precision in ("auto", "fp32", "bf16"):
        choice = dataclasses.replace(settings, precision=precision)
        train(patches, tmp_path / precision, choice, progress=Progress())
        says = "computes fp32 faster; --precision auto" in capsys.readouterr().err
        assert says == (precision == "bf16" and not fast_bf16(torch.device("cpu")))
