"""Bits per token, of a model's own samples and of held-out images under each patch rule."""

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dpar import DPAR, LlamaGen, PatchRule
from dpar.flops import count
from dpar.sampling import sample
from pipeline.evaluate import evaluate
from pipeline.patchify import patchify
from pipeline.runtime.errors import StageError
from pipeline.scoring.likelihood import bits_per_token, check_same_classes
from pipeline.settings.artifacts import PatchifySettings
from pipeline.settings.sampling import EvalSettings
from shards.manifest import Manifest, ShardInfo
from shards.reader import open_artifact
from shards.rows import Rows
from shards.writer import ArtifactBuild
from tests.pipeline.evaluated import CLASSES, run, save_runs
from tests.pipeline.sampled import CPU, QUIET, RULE, SIDE, V, save_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("made"))


def build_patches(out: Path, codes: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> Path:
    """Write a patches artifact of these sequences, (n, N) each."""
    build = ArtifactBuild(out, settings={}, n_shards=1, container="arrow")
    rows = Rows(
        keys=[str(i) for i in range(len(codes))],
        labels=labels.astype(np.int32),
        codes=codes[:, None].astype(np.uint16),
        entropy=np.zeros(codes[:, None].shape, np.float16),
        starts=starts[:, None],
    )
    build.add(0, rows)

    def manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        return Manifest(
            kind="patches",
            container="arrow",
            grid=(SIDE, SIDE),
            codebook_size=V,
            views=1,
            class_names=CLASSES,
            rows=len(codes),
            shards=shards,
            settings={},
            source={},
            tokenizer={},
        )

    build.finish(manifest)
    return out


@pytest.mark.parametrize("model", ["dpar-tiny", "llamagen-tiny"])
def test_bits_per_token_of_an_untrained_model_are_log2_of_the_codebook_size(
    home: Path, tmp_path: Path, model: str
) -> None:
    save_run(tmp_path / model, home / "patches", model, std=0.0)
    found = run(tmp_path, tmp_path / "scores", model, reference=home / "patches", samples=0)
    assert found["bits_per_token"] == pytest.approx(5.0, abs=1e-6)
    assert found["bits_by_class"] == pytest.approx({"bird": 5.0, "cat": 5.0}, abs=1e-6)
    assert found["cells"] == []


@pytest.mark.parametrize("family", ["dpar-tiny", "llamagen-tiny"])
def test_bits_per_token_of_a_sample_equal_its_sampling_likelihood(home: Path, tmp_path: Path, family: str) -> None:
    kind: Any = DPAR if family.startswith("dpar") else LlamaGen
    model = kind.from_pretrained(home / family / "model")
    torch.manual_seed(1)
    nn.init.normal_(model.output.weight, std=0.2)
    labels = torch.tensor([0, 1, 1, 0, 1])
    seen = torch.zeros(len(labels), model.config.n_tokens, model.config.codebook_size)

    def see(images: slice, position: int, logits: torch.Tensor) -> None:
        seen[images, position] = logits

    codes, starts = sample(
        model,
        labels,
        LlamaGen.from_pretrained(home / "entropy") if kind is DPAR else None,
        PatchRule(**RULE) if kind is DPAR else None,
        observe=see,
    )
    chosen = seen.log_softmax(dim=-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    cost = -chosen.double() / np.log(2)
    artifact = open_artifact(build_patches(tmp_path / "a", codes.numpy(), labels.numpy(), starts.numpy()))
    found = bits_per_token(model, artifact, batch=2, precision="fp32")
    assert found.bits_per_token == pytest.approx(float(cost.mean()), abs=1e-4)
    assert cost.std() > 0.5
    for label in (0, 1):
        assert found.bits_by_class[label] == pytest.approx(float(cost[labels == label].mean()), abs=1e-4)
    assert found.patches == pytest.approx(float(starts.sum()) / 5)


def test_bits_per_token_do_not_depend_on_the_batch_size(home: Path) -> None:
    artifact = open_artifact(home / "patches")
    model = DPAR.from_pretrained(home / "dpar-tiny" / "model")
    one, other = (bits_per_token(model, artifact, batch=size, precision="fp32") for size in (1, 7))
    assert one.bits_per_token == pytest.approx(other.bits_per_token, abs=1e-5)


def test_bits_per_token_of_a_row_are_by_its_own_rule(home: Path, tmp_path: Path) -> None:
    model = DPAR.from_pretrained(home / "dpar-tiny" / "model")
    entropies = open_artifact(home / "patches").gather(np.arange(10), np.zeros(10, np.int64)).entropy
    assert entropies is not None
    low, high = (float(np.quantile(entropies[:, 2:], q)) for q in (0.2, 0.7))
    found = run(home, tmp_path / "scores", threshold=(low, high), max_length=(3, 0), row_reset=False, samples=0)
    assert found["cells"] == []
    assert [(row["threshold"], row["max_length"]) for row in found["held_out"]] == [
        (threshold, length) for threshold in (low, high) for length in (None, 3)
    ]
    for row in found["held_out"]:
        rule = {"threshold": row["threshold"], "max_length": row["max_length"] or 0, "row_reset": False}
        moved = tmp_path / row["name"]
        manifest = patchify(home / "patches", moved, PatchifySettings(**rule, **CPU), QUIET)
        assert manifest is not None
        expected = bits_per_token(model, open_artifact(moved), batch=32, precision="fp32")
        assert row["bits_per_token"] == pytest.approx(expected.bits_per_token, abs=1e-6)
        assert row["patches_per_image"] == manifest.statistics["patches_per_image"]
        assert row["mean_length"] == pytest.approx(manifest.statistics["mean_length"])
        macs = count(model.config, manifest.statistics["mean_length"]).linear
        assert row["gmacs_per_image"] == pytest.approx(macs / 1e9)
    assert len({row["bits_per_token"] for row in found["held_out"]}) == 4
    table = (tmp_path / "scores" / "results.md").read_text(encoding="utf-8")
    with open(tmp_path / "scores" / "results.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for row, line in zip(found["held_out"], lines, strict=True):
        assert f"| {row['bits_per_token']:.4f} (" in table
        assert float(line["bits_per_token"]) == row["bits_per_token"]


def test_cells_have_the_bits_of_their_row_and_more_rows_are_added_to_the_table(home: Path, tmp_path: Path) -> None:
    one: dict[str, Any] = {"samples": 2}
    run(home, tmp_path / "scores", threshold=(2.9,), **one)
    written = tmp_path / "scores" / "likelihood" / "threshold-2.9.json"
    before = written.stat().st_mtime_ns
    found = run(home, tmp_path / "scores", threshold=(2.9, 9.0), **one)
    assert written.stat().st_mtime_ns == before
    rows = {row["name"]: row for row in found["held_out"]}
    assert list(rows) == ["threshold-2.9", "threshold-9"]
    assert rows["threshold-2.9"]["bits_per_token"] != rows["threshold-9"]["bits_per_token"]
    for cell in found["cells"]:
        row = rows[cell["name"].removesuffix("-cfg-1.5")]
        assert cell["bits_per_token"] == row["bits_per_token"]
        assert cell["held_out_mean_length"] == row["mean_length"]
        assert cell["held_out_patches_per_image"] == row["patches_per_image"]
        assert cell["gmacs_per_image"] == row["gmacs_per_image"]


def test_thresholds_that_differ_in_the_seventh_digit_are_two_rows(home: Path, tmp_path: Path) -> None:
    found = run(home, tmp_path / "scores", threshold=(3.0, 3.0000001), samples=0)
    assert [row["threshold"] for row in found["held_out"]] == [3.0, 3.0000001]


def test_held_out_images_are_patchified_with_the_runs_threshold(home: Path, tmp_path: Path) -> None:
    patchify(home / "patches", tmp_path / "moved", PatchifySettings(threshold=9.0, max_length=0, **CPU), QUIET)
    same, moved = (
        run(home, tmp_path / f"of-{name}", reference=folder, samples=0)
        for name, folder in (("same", home / "patches"), ("moved", tmp_path / "moved"))
    )
    assert moved["bits_per_token"] == same["bits_per_token"]
    assert moved["held_out"][0]["threshold"] == RULE["threshold"]


def test_without_entropies_of_the_runs_entropy_model_a_threshold_is_one_message(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    static = PatchifySettings(strategy="static", static_length=2.0, **CPU)
    patchify(home / "codes", tmp_path / "static", static, QUIET)
    model = LlamaGen.from_pretrained(home / "entropy")
    nn.init.normal_(model.output.weight, std=0.2)
    model.save_pretrained(tmp_path / "other")
    patchify(
        home / "codes",
        tmp_path / "foreign",
        PatchifySettings(entropy_model=str(tmp_path / "other"), **RULE, **CPU),
        QUIET,
    )
    for name, why in (("static", "it holds no entropies"), ("foreign", r"its entropies are of .*other \(\w{12}\)")):
        for given in ({"threshold": (3.0,)}, {"max_length": (2,)}, {"row_reset": False}):
            with pytest.raises(
                StageError, match=f"{name} cannot be patchified with --threshold, .*{why}, and the run's"
            ):
                run(home, tmp_path / "scores", reference=tmp_path / name, samples=0, **given)
        settings = EvalSettings(reference=tmp_path / name, samples=0, **CPU)
        found = evaluate(home / "dpar-tiny", tmp_path / f"of-{name}", settings)
        assert "bits per token use the boundaries stored in" in capsys.readouterr().err.replace("\n", " ")
        expected = bits_per_token(
            DPAR.from_pretrained(home / "dpar-tiny" / "model"),
            open_artifact(tmp_path / name),
            batch=32,
            precision="fp32",
        )
        assert found.newest.bits_per_token == pytest.approx(expected.bits_per_token, abs=1e-6)
    assert not (tmp_path / "scores").exists()


def test_a_static_run_has_one_row_of_its_length_for_any_held_out_boundaries(home: Path, tmp_path: Path) -> None:
    static = PatchifySettings(strategy="static", static_length=1.8, **CPU)
    patchify(home / "patches", tmp_path / "static", static, QUIET)
    save_run(tmp_path / "run", tmp_path / "static", "dpar-tiny", std=0.05)
    found = run(tmp_path, tmp_path / "scores", "run", reference=home / "patches", samples=0)
    expected = bits_per_token(
        DPAR.from_pretrained(tmp_path / "run" / "model"), open_artifact(tmp_path / "static"), batch=32, precision="fp32"
    )
    assert [row["static_length"] for row in found["held_out"]] == [1.8]
    assert found["bits_per_token"] == pytest.approx(expected.bits_per_token, abs=1e-6)


def test_nan_weights_are_one_message(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dpar-tiny", tmp_path / "run")
    model = DPAR.from_pretrained(tmp_path / "run" / "model")
    nn.init.constant_(model.output.weight, float("nan"))
    model.save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(StageError, match=r"no finite bits per token on .*its weights hold NaN or infinity"):
        run(tmp_path, tmp_path / "scores", "run", reference=home / "patches", samples=0)
    assert not (tmp_path / "scores" / "likelihood" / "newest.json").exists()


def test_held_out_data_with_other_classes_of_the_same_number_is_refused() -> None:
    with pytest.raises(StageError, match="class 1 is 'bee' in patches and 'boa' in held-out"):
        check_same_classes(("ape", "bee"), ("ape", "boa"), "patches", "held-out")
