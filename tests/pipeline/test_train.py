import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpar import DPAR, LlamaGen
from pipeline.errors import StageError
from pipeline.likelihood import same_classes
from pipeline.progress import Progress
from pipeline.settings import EntropySettings, TrainSettings
from pipeline.train import train, train_entropy
from shards.build import ArtifactBuild
from shards.manifest import Kind, Manifest, ShardInfo
from shards.rows import Rows

V, GRID, N, VIEWS = 16, (4, 4), 16, 2
QUIET = Progress(quiet=True)
SIZES = (9, 0, 8)  # images a shard
EXACT = {"dropout": 0.0, "guidance_dropout": 0.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(
    out: Path,
    kind: Kind = "patches",
    grid: tuple[int, int] = GRID,
    tokenizer: str = "0" * 64,
    classes: int = 2,
    seed: int = 0,
) -> Path:
    """Codes that count up by their class, a few of them wrong."""
    settings = {"strategy": "entropy", "threshold": 2.0, "max_length": 4, "row_reset": True, "static_length": None}
    maker = ArtifactBuild(out, settings=settings, n_shards=len(SIZES), container="arrow")
    rng = np.random.default_rng(seed)
    for index in maker.todo():
        shape = (SIZES[index], VIEWS, grid[0] * grid[1])
        labels = np.arange(SIZES[index]) % classes
        codes = (np.arange(shape[-1]) * (labels[:, None, None] + 1) + np.zeros(shape, int)) % V
        codes = np.where(rng.random(shape) < 0.1, rng.integers(0, V, shape), codes)
        starts = rng.random(shape) < 0.5
        starts[..., 0] = True
        rows = Rows(
            keys=[f"{index}/{i}" for i in range(shape[0])],
            labels=labels.astype(np.int32),
            codes=codes.astype(np.uint16),
            entropy=rng.random(shape).astype(np.float16) if kind == "patches" else None,
            starts=starts if kind == "patches" else None,
        )
        maker.add(index, rows)

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        return Manifest(
            kind=kind,
            container="arrow",
            grid=grid,
            codebook_size=V,
            views=VIEWS,
            class_names=("a", "b", "c")[:classes],
            rows=sum(SIZES),
            shards=shards,
            settings=settings,
            source={},
            tokenizer={"path": "vq", "fingerprint": tokenizer},
        )

    maker.finish(manifest)
    return out


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("made") / "patches")


def chosen(**values: Any) -> TrainSettings:
    defaults = {
        "model": "dpar-tiny",
        "batch": 4,
        "steps": 3,
        "lr": 1e-3,
        "log_every": 1,
        "seed": 1,
        "device": "cpu",
        "precision": "fp32",
    }
    return TrainSettings(**{**defaults, **values})


def run(patches: Path, out: Path, **values: Any) -> dict[str, Any]:
    return train(patches, out, chosen(**values), QUIET)


def command(patches: Path, out: Path, environment: dict[str, str] | None = None, **values: Any) -> Any:
    """``dpar train`` in a process of its own, with the settings of ``chosen(**values)``."""
    settings = chosen(**values)
    names = ("model", "batch", "steps", "lr", "log_every", "seed", "device", "precision", "checkpoint_every", "dropout")
    options = [
        part
        for name in (*names, "guidance_dropout")
        for part in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "cli", "train", str(patches), str(out), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "500", **(environment or {})},
        cwd=patches.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def results(out: Path) -> list[tuple[Any, ...]]:
    return [tuple(line.get(name) for name in ("step", "loss", "lr", "patches_per_image")) for line in metrics(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def digests(out: Path) -> dict[str, str]:
    """Of every safetensors file of a run: weights and checkpoints."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob("*.safetensors")
    }


def largest_difference(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def lines_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


@pytest.mark.slow
def test_a_run_killed_at_any_time_goes_on_to_the_same_bytes(patches: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 24, "checkpoint_every": 8, "dropout": 0.1, "guidance_dropout": 0.3}
    out = tmp_path / "killed"
    first = out / "checkpoints" / "step-00000008.safetensors"

    def killed_when(seen: Any, delay: float) -> None:
        process = command(patches, out, **settings)
        while process.poll() is None and not seen():
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"

    killed_when(first.exists, 0)
    published, saved = weights(out), load_file(first)
    assert all(torch.equal(published[name], saved[f"model.{name}"]) for name in published)
    killed_when(lambda: lines_of(out) >= 11, random.Random(0).random() * 0.1)
    run(patches, out, **settings)
    run(patches, tmp_path / "undisturbed", **settings)
    assert digests(out) == digests(tmp_path / "undisturbed")
    assert results(out) == results(tmp_path / "undisturbed")
    assert [line["step"] for line in metrics(out)] == list(range(1, 25))


@pytest.mark.slow
def test_ctrl_c_saves_the_step_ends_with_130_and_says_how_to_go_on(patches: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    settings: dict[str, Any] = {"steps": 60, "checkpoint_every": 1000, "dropout": 0.1, "guidance_dropout": 0.3}
    process = command(patches, out, **settings)
    while process.poll() is None and lines_of(out) < 6:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    (saved,) = (out / "checkpoints").iterdir()
    step = int(saved.stem.removeprefix("step-"))
    assert f"Stopped. Step {step} is saved in {out}; run the same command again to go on." in said
    assert "Traceback" not in said
    run(patches, out, **settings)
    run(patches, tmp_path / "undisturbed", **settings)
    assert largest_difference(out, tmp_path / "undisturbed") == 0
    losses = [[line["loss"] for line in metrics(folder)] for folder in (out, tmp_path / "undisturbed")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_two_processes_with_half_the_batch_each_give_the_weights_of_one(patches: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 4, "batch": 8, "checkpoint_every": 2, "lr": 1e-4, **EXACT}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        command(patches, tmp_path / "two", {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **settings)
        for rank in range(2)
    ]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    run(patches, tmp_path / "one", **settings)
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 2


def test_going_on_from_a_checkpoint_gives_the_same_bytes(patches: Path, tmp_path: Path) -> None:
    settings = {"steps": 6, "checkpoint_every": 2}
    run(patches, tmp_path / "a", **settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "checkpoints" / "step-00000006.safetensors").unlink()
    run(patches, tmp_path / "b", **settings)
    assert digests(tmp_path / "b") == digests(tmp_path / "a")
    assert results(tmp_path / "b") == results(tmp_path / "a")


@pytest.mark.parametrize("left", [0, 7, 1000, -1000])
def test_a_checkpoint_that_is_cut_short_gives_way_to_the_one_before(patches: Path, tmp_path: Path, left: int) -> None:
    settings = {"steps": 4, "checkpoint_every": 2}
    run(patches, tmp_path / "a", **settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    newest = tmp_path / "b" / "checkpoints" / "step-00000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:left])
    run(patches, tmp_path / "b", **settings)
    assert digests(tmp_path / "b") == digests(tmp_path / "a")
    assert results(tmp_path / "b") == results(tmp_path / "a")


def test_a_run_stopped_before_its_first_checkpoint_begins_anew_in_its_metrics_too(
    patches: Path, tmp_path: Path
) -> None:
    run(patches, tmp_path / "a")
    before, whole = digests(tmp_path / "a"), results(tmp_path / "a")
    for path in (tmp_path / "a" / "checkpoints").iterdir():
        path.unlink()
    run(patches, tmp_path / "a")
    assert digests(tmp_path / "a") == before
    assert results(tmp_path / "a") == whole


def test_a_line_of_metrics_that_a_kill_cut_short_is_forgotten(patches: Path, tmp_path: Path) -> None:
    settings = {"steps": 4, "checkpoint_every": 2}
    run(patches, tmp_path / "a", **settings)
    whole = results(tmp_path / "a")
    (tmp_path / "a" / "checkpoints" / "step-00000004.safetensors").unlink()
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
    names = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == ["step-00000006.safetensors", "step-00000007.safetensors"]


def test_other_settings_or_data_over_a_run_are_refused_with_both_values(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a", steps=1)
    before = digests(tmp_path / "a")
    with pytest.raises(StageError) as refusal:
        run(patches, tmp_path / "a", steps=2, lr=5e-4)
    assert "lr was 0.001 and is now 0.0005" in str(refusal.value)
    assert "steps was 1 and is now 2" in str(refusal.value)
    build(tmp_path / "other", seed=7)
    with pytest.raises(StageError, match="artifact was"):
        run(tmp_path / "other", tmp_path / "a", steps=1)
    assert digests(tmp_path / "a") == before


def test_settings_that_do_not_decide_the_result_may_change(patches: Path, tmp_path: Path) -> None:
    run(patches, tmp_path / "a", steps=1)
    run(patches, tmp_path / "a", steps=1, log_every=3, micro_batch=2, checkpoint_every=9, eval_every=5)


def test_a_folder_with_something_else_is_refused_and_untouched(patches: Path, tmp_path: Path) -> None:
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
    with pytest.raises(StageError, match="the entropy model is of LlamaGen's family"):
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
def test_micro_batches_give_the_step_of_the_whole_batch(patches: Path, tmp_path: Path, micro: int, model: str) -> None:
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
        ({"tokenizer": "1" * 64}, "was made by tokenizer 111111111111, the training data by 000000000000"),
        ({"grid": (4, 5)}, "its grid is 4×5, the model's 4×4"),
        ({"classes": 3}, "its number of classes is 3, the model's 2"),
        ({"kind": "codes"}, "`dpar patchify`"),
    ],
)
def test_a_held_out_artifact_that_does_not_fit_is_refused_before_anything_is_written(
    patches: Path, tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    held_out = build(tmp_path / "other", **other)
    with pytest.raises(StageError, match=says) as refusal:
        run(patches, tmp_path / "a", validation=held_out)
    assert str(held_out) in str(refusal.value)
    assert not (tmp_path / "a").exists()


def test_codes_where_dpar_needs_patches_are_refused_with_the_command_that_makes_them(tmp_path: Path) -> None:
    codes = build(tmp_path / "codes", kind="codes")
    with pytest.raises(StageError, match=f"{codes} holds codes.*DPAR needs patches, which `dpar patchify` makes"):
        run(codes, tmp_path / "a")


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(
    patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(StageError, match="--batch 4 does not divide by the 3 processes"):
        run(patches, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_only_sound_checkpoints(
    patches: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    settings = {"steps": 200, "lr": 1e6, "checkpoint_every": 1, "weight_decay": 0.5}
    for _ in range(2):  # the second goes on from the newest checkpoint, to the same end
        with pytest.raises(
            StageError,
            match=rf"not finite at step \d+; begin a new run with a lower --lr \(it is 1e\+06\).*{out}/checkpoints",
        ):
            run(patches, out, **settings)
        for path in out.rglob("*.safetensors"):
            assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


def test_held_out_data_with_other_classes_of_the_same_number_is_refused() -> None:
    with pytest.raises(StageError, match="class 1 is 'bee' in patches and 'boa' in held-out"):
        same_classes(("ape", "bee"), ("ape", "boa"), "patches", "held-out")
