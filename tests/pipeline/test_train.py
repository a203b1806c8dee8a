import dataclasses
import importlib.util
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
from dpar.errors import ModelError
from dpar.model import DPARConfig
from dpar.presets import preset
from pipeline.runs.run_folder import RunFolder
from pipeline.runtime.device import fast_bf16
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.scoring.likelihood import check_same_classes
from pipeline.settings.training import EntropySettings
from pipeline.train import train, train_entropy
from pipeline.training.loop import Objective, fit
from shards.errors import ArtifactError
from shards.reader import open_artifact
from tests.pipeline.trained import (
    EXACT,
    V,
    build,
    chosen,
    digests,
    largest_difference,
    metrics,
    results,
    run,
    saved,
    weights,
)

QUIET = Progress(quiet=True)


pytestmark = pytest.mark.usefixtures("one_thread")


def untrained() -> DPAR:
    """Build the model of ``chosen()`` with other weights."""
    config = preset("dpar-tiny", codebook_size=V, grid_height=4, grid_width=4, classes=2)
    assert isinstance(config, DPARConfig)
    return DPAR(config)


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("made") / "patches")


def test_resuming_from_a_checkpoint_gives_the_same_bytes(patches: Path, tmp_path: Path) -> None:
    settings = {"steps": 6, "checkpoint_every": 2}
    run(patches, tmp_path / "a", **settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000006")
    run(patches, tmp_path / "b", **settings)
    assert digests(tmp_path / "b") == digests(tmp_path / "a")
    assert results(tmp_path / "b") == results(tmp_path / "a")


@pytest.mark.parametrize("left", [0, 7, 1000, -1000])
def test_a_truncated_checkpoint_is_skipped_for_the_previous_one(patches: Path, tmp_path: Path, left: int) -> None:
    settings = {"steps": 4, "checkpoint_every": 2}
    run(patches, tmp_path / "a", **settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (newest,) = (tmp_path / "b" / "checkpoints" / "step-00000004").glob("*.safetensors")
    newest.write_bytes(newest.read_bytes()[:left])
    run(patches, tmp_path / "b", **settings)
    assert digests(tmp_path / "b") == digests(tmp_path / "a")
    assert results(tmp_path / "b") == results(tmp_path / "a")


def test_a_run_stopped_before_its_first_checkpoint_restarts_with_its_metrics(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a")
    before, whole = digests(tmp_path / "a"), results(tmp_path / "a")
    for path in (tmp_path / "a" / "checkpoints").iterdir():
        shutil.rmtree(path)
    run(patches, tmp_path / "a")
    assert digests(tmp_path / "a") == before
    assert results(tmp_path / "a") == whole


def test_a_truncated_line_of_metrics_is_dropped(patches: Path, tmp_path: Path) -> None:
    settings = {"steps": 4, "checkpoint_every": 2}
    run(patches, tmp_path / "a", **settings)
    whole = results(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-00000004")
    path = tmp_path / "a" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    run(patches, tmp_path / "a", **settings)
    assert results(tmp_path / "a") == whole


def test_a_finished_run_is_not_trained_again(patches: Path, tmp_path: Path) -> None:
    first = run(patches, tmp_path / "a")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.safetensors")}
    assert run(patches, tmp_path / "a") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.safetensors")} == stamps


def test_only_the_newest_two_checkpoints_are_kept(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a", steps=7, checkpoint_every=2)
    assert saved(tmp_path / "a") == ["step-00000006", "step-00000007"]
    run(patches, tmp_path / "b", steps=7, checkpoint_every=2, keep=3)
    assert saved(tmp_path / "b") == ["step-00000004", "step-00000006", "step-00000007"]


def test_other_settings_or_data_over_a_run_are_refused_with_both_values(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a", steps=1)
    before = digests(tmp_path / "a")
    with pytest.raises(StageError) as refusal:
        run(patches, tmp_path / "a", steps=1, lr=5e-4, batch=2)
    assert "lr was 0.001 and is now 0.0005" in str(refusal.value)
    assert "batch was 4 and is now 2" in str(refusal.value)
    build(tmp_path / "other", seed=7)
    with pytest.raises(StageError, match="artifact was"):
        run(tmp_path / "other", tmp_path / "a", steps=1)
    assert digests(tmp_path / "a") == before


def test_more_steps_continue_to_the_weights_of_one_long_run_and_fewer_are_refused(
    patches: Path, tmp_path: Path
) -> None:
    run(patches, tmp_path / "a", steps=2)
    run(patches, tmp_path / "a", steps=4)
    run(patches, tmp_path / "b", steps=4)
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")
    history = json.loads((tmp_path / "a" / "run.json").read_text())["history"]
    assert [start["step"] for start in history] == [0, 2]
    assert history[1]["changed"] == {"steps": [2, 4]}
    run(patches, tmp_path / "a", steps=None, epochs=1.5)  # six steps
    assert metrics(tmp_path / "a")[-1]["step"] == 6
    with pytest.raises(StageError, match="steps was None and is now 3"):
        run(patches, tmp_path / "a", steps=3)


def test_settings_that_do_not_affect_the_result_may_change(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a", steps=1)
    run(patches, tmp_path / "a", steps=1, log_every=3, micro_batch=2, checkpoint_every=9, eval_every=5)


def test_a_folder_killed_before_the_first_record_is_accepted(patches: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "run.json.4711.part").write_text("{")
    run(patches, tmp_path / "a", steps=1)
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "mine").touch()
    with pytest.raises(StageError, match="holds something else"):
        run(patches, tmp_path / "b", steps=1)


def test_a_folder_with_other_files_is_refused_and_unchanged(patches: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StageError, match="holds something else"):
        run(patches, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


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


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"tokenizer": "1" * 64}, "was made with tokenizer 111111111111, the training data with 000000000000"),
        ({"grid": (4, 5)}, "its grid is 4×5, the model's 4×4"),
        ({"classes": 3}, "its number of classes is 3, the model's 2"),
        ({"kind": "codes"}, "`dpar patchify`"),
    ],
)
def test_an_incompatible_held_out_artifact_is_refused_before_anything_is_written(
    patches: Path, tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    held_out = build(tmp_path / "other", **other)
    with pytest.raises(StageError, match=says) as refusal:
        run(patches, tmp_path / "a", validation=held_out)
    assert str(held_out) in str(refusal.value)
    assert not (tmp_path / "a").exists()


def test_codes_for_dpar_are_refused_with_the_command_to_make_patches(tmp_path: Path) -> None:
    codes = build(tmp_path / "codes", kind="codes")
    with pytest.raises(StageError, match=f"{codes} holds codes.*DPAR needs patches, as `dpar patchify` writes them"):
        run(codes, tmp_path / "a")


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(
    patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(StageError, match="--batch 4 is not divisible by the 3 processes"):
        run(patches, tmp_path / "a")
    assert not (tmp_path / "a").exists()


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


def test_held_out_data_with_other_classes_of_the_same_number_is_refused() -> None:
    with pytest.raises(StageError, match="class 1 is 'bee' in patches and 'boa' in held-out"):
        check_same_classes(("ape", "bee"), ("ape", "boa"), "patches", "held-out")


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


def test_override_accepts_other_settings_and_records_them_with_the_step(patches: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    run(patches, out, steps=2)
    run(patches, out, steps=4, lr=5e-4, ema=0.5, override=True)
    assert [(line["step"], line["lr"]) for line in metrics(out)] == [(1, 1e-3), (2, 1e-3), (3, 5e-4), (4, 5e-4)]
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["lr"] == 5e-4
    assert [start["step"] for start in record["history"]] == [0, 2]
    assert record["history"][1]["changed"] == {"ema": [0.0, 0.5], "lr": [0.001, 0.0005], "steps": [2, 4]}
    run(patches, out, steps=4, lr=5e-4, ema=0.5)  # the settings of the last run are recorded
    with pytest.raises(StageError, match=r"model was 'dpar-tiny' and is now 'llamagen-tiny'\. Name another output$"):
        run(patches, out, steps=4, lr=5e-4, ema=0.5, model="llamagen-tiny", override=True)


def test_a_run_starts_from_given_weights(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a", steps=2)
    run(patches, tmp_path / "b", steps=1, lr=0.0, init=str(tmp_path / "a"))
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0
    shutil.rmtree(tmp_path / "a")
    run(patches, tmp_path / "b", steps=1, lr=0.0, init=str(tmp_path / "a"))  # not needed to resume


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"classes": 3}, r"cls_embedding.embedding_table.weight is \(4, 192\), not \(3, 192\)"),
        ({"grid": (2, 8)}, "grid_height 2 is not 4; grid_width 8 is not 4"),
    ],
)
def test_incompatible_weights_are_refused_before_anything_is_written(
    patches: Path, tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    run(build(tmp_path / "other", **other), tmp_path / "a", steps=1)
    with pytest.raises((StageError, ModelError), match=says):
        run(patches, tmp_path / "b", init=str(tmp_path / "a"))
    assert not (tmp_path / "b").exists()


def test_a_damaged_shard_is_found_before_anything_is_written(patches: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "patches"
    shutil.copytree(patches, damaged)
    (shard, *_) = sorted(damaged.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match=shard.name):
        run(damaged, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_tracker_whose_package_is_missing_is_refused_before_anything_is_written(
    patches: Path, tmp_path: Path
) -> None:
    for name in ("tensorboard", "wandb"):
        if importlib.util.find_spec(name) is None:
            with pytest.raises(StageError, match=rf"--{name} needs .*: pip install 'dpar\[{name}\]'"):
                run(patches, tmp_path / "a", **{name: True})
    assert not (tmp_path / "a").exists()


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
def test_other_backends_and_precisions_give_nearly_the_same_losses(
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


def test_set_changes_fields_of_the_models_config(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "run", set=("width=64", "heads=2", "rope=2d"), steps=1)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["width"], config["heads"]) == (64, 2)
    assert config["rope"] == "2d"


def test_a_run_does_not_resume_under_other_set_fields(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "run", set=("width=64", "heads=2"), steps=1)
    with pytest.raises(StageError, match=r"set was \['width=64', 'heads=2'\] and is now \['width=32', 'heads=2'\]"):
        run(patches, tmp_path / "run", set=("width=32", "heads=2"), steps=1)


def test_runs_without_set_do_not_record_it(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "run", steps=1)
    assert "set" not in json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["settings"]


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("width", "is not field=value"),
        ("widht=64", "dpar-tiny has no field 'widht'; did you mean 'width'"),
        ("width=wide", "it must be a whole number"),
        ("rope=3d", "it must be one of dynamic, dynamic-compact, 2d"),
        ("classes=3", "classes follows from the data"),
        ("dropout=0.2", "use --dropout instead"),
        ("patch_layers=0", "patch_layers is 0; it must be at least 1"),
    ],
)
def test_a_field_that_cannot_be_set_is_one_message(patches: Path, tmp_path: Path, field: str, says: str) -> None:
    with pytest.raises((StageError, ModelError), match=says):
        run(patches, tmp_path / "run", set=(field,))
    assert not (tmp_path / "run").exists()
