import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpar import DPAR, LlamaGen
from pipeline.patchify import patchify
from pipeline.probe import accuracies, features, fit_linear, probe
from pipeline.runtime.errors import StageError
from pipeline.settings.artifacts import PatchifySettings
from pipeline.settings.models import ProbeSettings
from shards.reader import open_artifact
from tests.pipeline.sampled import CPU, QUIET, SIDE, N, everything, killed_again_and_again, save_home, save_run

CLASSES = ("bird", "cat")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("made")
    save_home(home, CLASSES, a_class=6)
    for model in ("dpar-tiny", "llamagen-tiny"):
        save_run(home / model, home / "patches", model)
    return home


def run(home: Path, out: Path, model: str = "dpar-tiny", **values: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"train": home / "patches", "test": home / "patches"}
    return probe(home / model, out, ProbeSettings(**{**defaults, **CPU, **values}), QUIET)


def load(home: Path, model: str) -> DPAR | LlamaGen:
    kind: Any = DPAR if model.startswith("dpar") else LlamaGen
    found: DPAR | LlamaGen = kind.from_pretrained(home / model / "model")
    return found


@pytest.mark.parametrize("model", ["dpar-tiny", "llamagen-tiny"])
def test_features_do_not_depend_on_the_label(home: Path, model: str) -> None:
    rows = np.arange(6)
    batch = open_artifact(home / "patches").gather(rows, np.zeros_like(rows))
    other = dataclasses.replace(batch, labels=1 - batch.labels)
    loaded = load(home, model)
    one, two = (features(loaded, b, 2, "fp32") for b in (batch, other))
    np.testing.assert_array_equal(one, two)
    assert one.std(axis=0).max() > 1e-3  # features depend on the image


def test_llamagens_features_are_a_layers_outputs_averaged_over_tokens(home: Path) -> None:
    model = load(home, "llamagen-tiny")
    assert isinstance(model, LlamaGen)
    rows = np.arange(3)
    batch = open_artifact(home / "codes").gather(rows, np.zeros_like(rows))
    found = features(model, batch, len(model.layers), "fp32")
    for i in rows:
        alone = dataclasses.replace(batch, codes=batch.codes[i : i + 1], labels=batch.labels[i : i + 1])
        np.testing.assert_allclose(features(model, alone, len(model.layers), "fp32")[0], found[i], atol=1e-5)
    seen: list[torch.Tensor] = []
    hook = model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))  # takes the last layer's
    with torch.no_grad():
        model(torch.from_numpy(batch.codes))
    hook.remove()
    np.testing.assert_allclose(found, seen[0].mean(dim=1).numpy(), atol=1e-6)


def test_dpars_features_are_averaged_over_the_patches_of_each_image(home: Path) -> None:
    model = load(home, "dpar-tiny")
    rows = np.arange(4)
    batch = open_artifact(home / "patches").gather(rows, np.zeros_like(rows))
    starts = np.random.default_rng(0).random((4, N)) < [[0.1], [0.3], [0.6], [0.9]]  # of different lengths, in one row
    starts[:, 0] = True
    batch = dataclasses.replace(batch, starts=starts)
    found = features(model, batch, 1, "fp32")
    for i in rows:
        alone = dataclasses.replace(
            batch, codes=batch.codes[i : i + 1], labels=batch.labels[i : i + 1], starts=starts[i : i + 1]
        )
        np.testing.assert_allclose(features(model, alone, 1, "fp32")[0], found[i], atol=1e-5)
    assert np.abs(features(model, batch, 2, "fp32") - found).max() > 1e-3


def test_the_classifier_separates_only_linearly_separable_classes() -> None:
    rng = np.random.default_rng(0)
    labels = torch.arange(600) % 6
    centres = rng.normal(size=(6, 5)) * 6
    x = torch.from_numpy(centres[labels] + rng.normal(size=(600, 5))).float()
    x = (x - x.mean(0)) / x.std(0)
    head = fit_linear(x[:300], labels[:300], 6, 1e-4, 200)
    assert accuracies(head, x[300:], labels[300:])["top1"] > 0.97
    noise = torch.from_numpy(rng.normal(size=(600, 5))).float()
    head = fit_linear(noise[:300], labels[:300], 6, 1e-4, 200)
    found = accuracies(head, noise[300:], labels[300:])
    assert found["top1"] < 0.35
    assert 0.6 < found["top5"] < 1.0


def test_accuracies_are_top_1_and_top_5() -> None:
    head = torch.nn.Linear(7, 7, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(7))
    x = torch.arange(7.0).expand(4, 7)  # classes 6, 5, 4, 3, 2 are the five likeliest, in this order
    assert accuracies(head, x, torch.tensor([6, 2, 1, 0])) == {"top1": 0.25, "top5": 0.5}


@pytest.mark.parametrize("model", ["dpar-tiny", "llamagen-tiny"])
def test_a_probe_writes_accuracies_and_settings(home: Path, tmp_path: Path, model: str) -> None:
    found = run(home, tmp_path / "probe", model)
    assert json.loads((tmp_path / "probe" / "probe.json").read_text(encoding="utf-8")) == found
    assert found["test"] == found["train"]  # the same artifact is both
    assert found["train"]["top1"] > 0.9  # 12 images in many dimensions: a line separates any labels
    assert (found["train_images"], found["test_images"]) == (12, 12)
    assert run(home, tmp_path / "probe", model) == found


def test_a_killed_probe_resumes_to_the_same_numbers(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "whole")
    killed_again_and_again(partial(run, home, tmp_path / "killed"), tmp_path / "killed", kills=3, fresh=True)
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


def test_other_settings_and_incompatible_artifacts_are_refused(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "probe")
    with pytest.raises(StageError, match="holds features of other weights, images or settings"):
        run(home, tmp_path / "probe", layer=1)
    with pytest.raises(StageError, match="--layer is 40; this model has"):
        run(home, tmp_path / "other", layer=40)
    with pytest.raises(StageError, match="DPAR needs patches"):
        run(home, tmp_path / "other", train=home / "codes")
    with pytest.raises(StageError, match="a model without classes"):
        run(home, tmp_path / "other", "entropy")
    static = PatchifySettings(strategy="static", static_length=float(N // SIDE), **CPU)
    patchify(home / "codes", tmp_path / "static", static, QUIET)
    assert run(home, tmp_path / "other", test=tmp_path / "static")["test_images"] == 12
