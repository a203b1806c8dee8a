import csv
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dpar
from dpar import DPAR, LlamaGen, PatchRule
from dpar.flops import count
from dpar.sampling import sample
from dpar.tokenizer import VQTokenizer, psnr
from pipeline.evaluate import evaluate
from pipeline.generation.generator import decode
from pipeline.patchify import patchify
from pipeline.runs.run_folder import FORMAT_VERSIONS
from pipeline.runtime.errors import StageError
from pipeline.scoring.features import (
    InceptionFeatures,
    Statistics,
    TokenizerFeatures,
    frechet_distance,
    inception_score,
    precision_recall,
)
from pipeline.scoring.likelihood import bits_per_token
from pipeline.scoring.reconstruction import ssim
from pipeline.scoring.records import HeldOutRow, Results
from pipeline.scoring.results import write_results
from pipeline.settings.artifacts import PatchifySettings, TokenizeSettings
from pipeline.settings.sampling import EvalSettings
from pipeline.settings.training import TrainSettings
from pipeline.sources.originals import load_originals
from pipeline.tokenize import tokenize
from pipeline.train import train
from shards.manifest import Manifest, ShardInfo
from shards.reader import open_artifact
from shards.rows import Rows
from shards.writer import ArtifactBuild
from tests.pipeline.sampled import (
    CPU,
    QUIET,
    RULE,
    SIDE,
    SIZE,
    VQ,
    N,
    V,
    everything,
    killed_again_and_again,
    save_home,
    save_inception,
    save_patches,
    save_photos,
    save_run,
    start,
)

CLASSES = ("bird", "cat")
TOKENIZER_DISTANCE = "tokenizer Fréchet distance"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a tokenizer, an entropy model, artifacts, and slightly trained runs of both families."""
    home = tmp_path_factory.mktemp("made")
    save_home(home, CLASSES, a_class=5)
    for model in ("dpar-tiny", "llamagen-tiny"):
        save_run(home / model, home / "patches", model, std=0.05)
    return home


def run(home: Path, out: Path, model: str = "dpar-tiny", **values: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"reference": home / "patches", "cfg_scale": (1.5,), "samples": 6}
    return evaluate(home / model, out, EvalSettings(**{**defaults, **CPU, **values}), QUIET).to_json()


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


def test_scores_are_written_as_numbers_tables_a_plot_and_sheets(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    found = run(home, out, cfg_scale=(1.0, 2.5), samples=7, shard_size=3)
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        *("results.json", "results.md", "results.csv", "eval.json", "reconstruction.json", "reference.npz"),
        *("likelihood", "cells", "quality-vs-guidance.png"),
    }
    for scale in ("1", "2.5"):
        held = {path.name for path in (out / "cells" / f"cfg-{scale}").iterdir() if not path.name.startswith(".")}
        assert held == {"cell.json", "codes", "samples.png", "patches.png", "nearest.png", "nearest.json"}
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == found
    assert Results.read(out / "results.json").to_json() == found
    assert [(cell["cfg_scale"], cell["samples"], cell["reference_images"]) for cell in found["cells"]] == [
        (1.0, 7, 10),
        (2.5, 7, 10),
    ]
    table = (out / "results.md").read_text(encoding="utf-8")
    assert f"| held-out bits per token | {found['bits_per_token']:.4f} (" in table
    with open(out / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for cell, row in zip(found["cells"], rows, strict=True):
        assert cell["distance"] == TOKENIZER_DISTANCE
        assert cell[TOKENIZER_DISTANCE] > 0
        assert float(row[TOKENIZER_DISTANCE]) == cell[TOKENIZER_DISTANCE]
        assert f"| {cell['cfg_scale']:g} |" in table
        assert f"| {cell[TOKENIZER_DISTANCE]:.3f} |" in table
        assert 0 <= cell["tokenizer_precision"] <= 1
        assert cell["images_per_second"] > 0
        assert cell["bits_per_token"] == found["bits_per_token"]
    assert found["held_out_images"] == 10
    assert found["patches_per_image"] == pytest.approx(
        open_artifact(home / "patches").manifest.statistics["patches_per_image"]
    )


def test_the_distance_of_a_cell_is_between_decoded_codes_and_originals(home: Path, tmp_path: Path) -> None:
    cell = run(home, tmp_path / "scores", samples=8)["cells"][0]
    tokenizer = VQTokenizer.from_pretrained(home / "vq")
    extract = TokenizerFeatures(tokenizer, "")
    drawn = open_artifact(tmp_path / "scores" / "cells" / "cfg-1.5" / "codes")
    artifact = open_artifact(home / "patches")
    rows = np.arange(10)
    originals = load_originals(artifact.manifest, artifact.keys(rows), np.zeros_like(rows))
    samples = decode(tokenizer, drawn.gather(np.arange(8), np.zeros(8, np.int64)).codes, (SIDE, SIDE))
    a, b = (extract(pixels)["pool"] for pixels in (samples, originals))
    assert cell[TOKENIZER_DISTANCE] == pytest.approx(frechet_distance(Statistics.of(a), Statistics.of(b)), rel=1e-4)
    assert (cell["tokenizer_precision"], cell["tokenizer_recall"]) == precision_recall(a, b)


def test_the_tokenizers_scores_are_those_of_its_reconstructions(home: Path, tmp_path: Path) -> None:
    artifact = open_artifact(home / "codes")
    rows = np.arange(len(artifact))
    codes = artifact.gather(rows, np.zeros_like(rows)).codes
    decoded = decode(VQTokenizer.from_pretrained(home / "vq"), codes, (SIDE, SIDE))
    originals = load_originals(artifact.manifest, artifact.keys(rows), np.zeros_like(rows))
    expected = float(psnr(torch.from_numpy(decoded), torch.from_numpy(originals)).mean())
    found = run(home, tmp_path / "scores", samples=0)
    assert found["originals"] == len(rows)
    assert found["reconstruction_psnr_db"] == pytest.approx(expected, abs=0.01)
    assert found["reconstruction_ssim"] == pytest.approx(float(ssim(decoded, originals).mean()), abs=1e-3)
    assert ssim(originals, originals).tolist() == [1.0] * len(rows)
    assert found["tokenizer reconstruction distance"] > 0


def test_llamagen_is_scored_on_codes_and_has_no_sheet_of_patches(home: Path, tmp_path: Path) -> None:
    found = run(home, tmp_path / "scores", "llamagen-tiny", reference=home / "codes")
    assert found["patches_per_image"] == N
    assert found["cells"][0]["mean_length"] == 1
    assert not list((tmp_path / "scores").rglob("patches.png"))


def test_a_finished_cell_is_not_sampled_again(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    first = run(home, out)
    sheet = out / "cells" / "cfg-1.5" / "samples.png"
    sheet.unlink()  # sampling the cell would write it again
    assert run(home, out) == first
    more = run(home, out, cfg_scale=(1.5, 2.0))
    assert not sheet.exists()
    assert (out / "cells" / "cfg-2" / "samples.png").exists()
    assert more["cells"][0] == first["cells"][0]
    assert [cell["cfg_scale"] for cell in more["cells"]] == [1.5, 2.0]


def test_thresholds_lengths_and_guidance_make_one_table(home: Path, tmp_path: Path) -> None:
    found = run(home, tmp_path / "scores", threshold=(3.0, 9.0), max_length=(2, 0), cfg_scale=(1.0, 3.0), samples=4)
    got = [(c["threshold"], c["max_length"], c["cfg_scale"], c["name"]) for c in found["cells"]]
    assert got == [
        (threshold, length, scale, f"threshold-{threshold:g}-max-length-{length or 0}-cfg-{scale:g}")
        for threshold in (3.0, 9.0)
        for length in (None, 2)
        for scale in (1.0, 3.0)
    ]
    longest = next(c for c in found["cells"] if c["threshold"] == 9.0 and c["max_length"] is None)
    assert longest["mean_length"] == N / (SIDE + 1)  # a patch per row, and one for token 1
    assert {path.name for path in (tmp_path / "scores").glob("*.png")} == {
        "quality-vs-guidance.png",
        "quality-vs-patch-length.png",
    }


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


def test_every_cell_and_table_records_sampling_and_feature_settings(home: Path, tmp_path: Path) -> None:
    found = run(home, tmp_path / "scores", samples=4, labels="balanced", decode_precision="bf16", cfg_scale=(1.0, 2.0))
    for cell in found["cells"]:
        assert (cell["samples"], cell["labels"], cell["features"]) == (4, "balanced", "tokenizer")
        assert (cell["cfg_schedule"], cell["decode_precision"]) == ("constant", "bf16")
    line = "Samples: 4 per row, balanced labels, guidance 1 or 2, constant guidance, decoded in bf16, features of"
    assert line in (tmp_path / "scores" / "results.md").read_text(encoding="utf-8")


def test_nan_weights_are_one_message(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dpar-tiny", tmp_path / "run")
    model = DPAR.from_pretrained(tmp_path / "run" / "model")
    nn.init.constant_(model.output.weight, float("nan"))
    model.save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(StageError, match=r"no finite bits per token on .*its weights hold NaN or infinity"):
        run(tmp_path, tmp_path / "scores", "run", reference=home / "patches", samples=0)
    assert not (tmp_path / "scores" / "likelihood" / "newest.json").exists()


def test_text_in_tables_has_no_formulas_and_no_escape_codes(tmp_path: Path) -> None:
    cell: dict[str, Any] = {
        "name": "=1+1",
        "checkpoint": "\x1b[31m|red",
        "step": None,
        "threshold": None,
        "max_length": -1,
    }
    cell |= {"cfg_scale": 1.0, "samples": 2, "labels": "random", "cfg_schedule": "constant", "features": "tokenizer"}
    (tmp_path / "cells" / "a").mkdir(parents=True)
    (tmp_path / "cells" / "a" / "cell.json").write_text(json.dumps(cell | {"decode_precision": "fp32"}))
    write_results(tmp_path, HeldOutRow(weights="", tokens_per_image=N), None, {})
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert r"| \u001b[31m\|red |" in table
    with open(tmp_path / "results.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["name"], row["checkpoint"], row["max_length"]) == ("'=1+1", r"\u001b[31m|red", "-1")


def test_checkpoints_make_a_table_against_training_flops(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dpar-tiny", tmp_path / "run")
    model = DPAR.from_pretrained(tmp_path / "run" / "model")
    for step in (10, 200):
        nn.init.normal_(model.output.weight, std=0.0003 * step)
        model.save_pretrained(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    metrics = [{"step": 10, "training_gflops_per_image": 3.0}, {"step": 200}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    names = ("step-00000200", "step-00000010")
    found = run(tmp_path, tmp_path / "scores", "run", reference=home / "patches", checkpoint=names, samples=4)
    cells = found["cells"]
    assert [(c["checkpoint"], c["step"]) for c in cells] == [(names[1], 10), (names[0], 200)]
    assert [c["training_flops"] for c in cells] == [3e9 * 2 * 10, 3e9 * 2 * 200]
    assert abs(cells[0]["bits_per_token"] - cells[1]["bits_per_token"]) > 1e-3
    assert (tmp_path / "scores" / "quality-vs-training-flops.png").is_file()
    nn.init.normal_(model.output.weight, std=0.1)
    model.save_pretrained(tmp_path / "run" / "checkpoints" / names[0])
    with pytest.raises(StageError, match="results of other weights called step-00000200"):
        run(tmp_path, tmp_path / "scores", "run", reference=home / "patches", checkpoint=names, samples=4)


def test_checkpoints_of_a_run_are_scored_like_their_weights(home: Path, tmp_path: Path) -> None:
    training = TrainSettings(model="dpar-tiny", steps=2, batch=4, lr=0.01, checkpoint_every=1, keep=2, **CPU)
    train(home / "patches", tmp_path / "run", training, QUIET)
    one: dict[str, Any] = {"reference": home / "patches", "samples": 2}
    kept = run(tmp_path, tmp_path / "kept", "run", checkpoint=("step-00000001", "step-00000002"), **one)["cells"]
    newest = run(tmp_path, tmp_path / "newest", "run", **one)["cells"][0]
    assert [cell["step"] for cell in (*kept, newest)] == [1, 2, 2]
    assert kept[1]["bits_per_token"] == newest["bits_per_token"]
    assert kept[1][TOKENIZER_DISTANCE] == newest[TOKENIZER_DISTANCE]
    assert kept[0]["bits_per_token"] != newest["bits_per_token"]
    assert newest["training_flops"] == 2 * kept[0]["training_flops"] > 0


@pytest.mark.slow
def test_kills_and_several_processes_do_not_change_the_scores(home: Path, tmp_path: Path) -> None:
    many: dict[str, Any] = {"cfg_scale": (1.0, 2.0), "shard_size": 2, "samples": 10}

    def numbers(out: Path) -> dict[str, Any]:
        found = json.loads((out / "results.json").read_text(encoding="utf-8"))
        for cell in found["cells"]:
            del cell["images_per_second"]
        return {"results": found, "files": {k for k in everything(out) if not k.startswith("results")}}

    run(home, tmp_path / "whole", **many)
    assert killed_again_and_again(lambda: run(home, tmp_path / "killed", **many), tmp_path / "killed", kills=6) == 6
    both = [start(lambda: run(home, tmp_path / "two", **many), rank, 2) for rank in (0, 1)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert numbers(tmp_path / "two") == numbers(tmp_path / "whole")


def test_results_of_other_weights_or_settings_are_refused_and_kept(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "dpar-tiny", tmp_path / "run")
    settings = EvalSettings(reference=home / "patches", samples=0, **CPU)
    out = tmp_path / "scores"
    evaluate(tmp_path / "run", out, settings, QUIET)
    before = (out / "results.json").read_bytes()
    model = DPAR.from_pretrained(tmp_path / "run" / "model")
    nn.init.normal_(model.output.weight, std=0.1)
    model.save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(StageError, match=f"{out} holds results of other weights or settings"):
        evaluate(tmp_path / "run", out, settings, QUIET)
    assert (out / "results.json").read_bytes() == before
    with pytest.raises(StageError, match="other weights or settings"):
        evaluate(home / "dpar-tiny", out, settings, QUIET)


def test_a_folder_with_other_files_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StageError, match="holds something else"):
        run(home, tmp_path)


def test_a_reference_of_another_tokenizer_is_refused_with_both(home: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    VQTokenizer(VQ).save_pretrained(tmp_path / "vq")
    shutil.copytree(home / "entropy", tmp_path / "entropy")
    save_patches(tmp_path, home / "photos", tmp_path / "codes", tmp_path / "patches")
    ours, theirs = (dpar.fingerprint(folder / "vq")[:12] for folder in (home, tmp_path))
    with pytest.raises(StageError, match=f"made with tokenizer {theirs}, the run's training data with {ours}"):
        run(home, tmp_path / "scores", reference=tmp_path / "patches")
    assert not (tmp_path / "scores").exists()


def test_without_originals_there_is_a_likelihood_but_no_distance(home: Path, tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", CLASSES, a_class=2)
    save_patches(home, tmp_path / "photos", tmp_path / "codes", tmp_path / "patches")
    shutil.rmtree(tmp_path / "photos")
    found = run(home, tmp_path / "scores", reference=tmp_path / "patches")
    assert found["originals"] == 0
    assert found["bits_per_token"] > 0
    assert "distance" not in found["cells"][0]
    assert (tmp_path / "scores" / "cells" / "cfg-1.5" / "samples.png").exists()


@pytest.mark.parametrize("kind", ["tokenizer", "entropy"])
def test_anything_but_a_run_of_train_is_refused(home: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(StageError, match=r"is not a run: it has no run\.json"):
        run(home, tmp_path / "a", "codes")
    (tmp_path / "run").mkdir()
    record = {"format_version": FORMAT_VERSIONS[kind], "kind": kind, "settings": {}, "inputs": {}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(StageError, match=f"a run of `dpar {kind}`; a run of `dpar train` is needed"):
        evaluate(tmp_path / "run", tmp_path / "a", EvalSettings(reference=home / "patches", **CPU), QUIET)


def features(seed: int, n: int = 400, d: int = 48) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found: np.ndarray = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    return found


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(Statistics.of(a), Statistics.of(b))


def test_the_distance_is_zero_for_equal_sets_and_the_square_of_a_shift() -> None:
    a = features(0)
    assert distance(a, a) == pytest.approx(0, abs=1e-6)
    assert distance(a, a[::-1]) == pytest.approx(0, abs=1e-6)
    assert distance(a, a + 3.0) == pytest.approx(9 * a.shape[1], rel=1e-9)


@pytest.mark.parametrize("d", [1, 48])
def test_the_distance_equals_torch_fidelitys(d: int) -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = features(0, d=d), features(1, n=300, d=d)
    statistics = [{"mu": x.mean(axis=0), "sigma": np.atleast_2d(np.cov(x, rowvar=False))} for x in (a, b)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    assert distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert distance(a, b) > 0.1


def test_the_distance_equals_that_of_the_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    a, b = features(2), features(3)
    one, other = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_features_of_the_tokenizer_do_not_depend_on_the_batch_size(home: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3)).astype(np.uint8)
    tokenizer = VQTokenizer.from_pretrained(home / "vq")
    one, other = (TokenizerFeatures(tokenizer, "", batch)(pixels)["pool"] for batch in (2, 5))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_larger_samples_are_resized_to_256_px_as_in_llamagens_script(home: Path, inception: Path) -> None:
    tokenizer = VQTokenizer.from_pretrained(home / "vq")
    codes = np.random.default_rng(0).integers(0, V, (2, N))
    with torch.no_grad():
        images = tokenizer.decode(torch.from_numpy(codes), (SIDE, SIDE))
    images = torch.nn.functional.interpolate(images, size=(6, 6), mode="bicubic")
    expected = torch.clamp(127.5 * images + 128.0, 0, 255).to(torch.uint8).movedim(1, -1).numpy()
    np.testing.assert_array_equal(decode(tokenizer, codes, (SIDE, SIDE), size=6), expected)
    extract = InceptionFeatures(inception, torch.device("cpu"))
    assert [extract.side(side) for side in (128, 256, 384)] == [128, 256, 256]


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inception(tmp_path_factory.mktemp("inception"))


def write_images(folder: Path, seed: int, count: int, brightest: int = 256, size: int = SIZE) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, brightest, (size, size, 3)).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return folder


@pytest.mark.slow
def test_the_four_scores_are_torch_fidelitys_own_on_the_same_folders_and_weights(
    home: Path, tmp_path: Path, inception: Path
) -> None:
    torch_fidelity = pytest.importorskip("torch_fidelity")
    reference = write_images(tmp_path / "reference", 0, 9, brightest=160)
    values: dict[str, Any] = {"features": "inception", "inception_weights": inception}
    found = run(home, tmp_path / "scores", reference=reference, samples=12, shard_size=5, **values)
    drawn = open_artifact(tmp_path / "scores" / "cells" / "cfg-1.5" / "codes")
    tokenizer = VQTokenizer.from_pretrained(home / "vq")
    pixels = decode(tokenizer, drawn.gather(np.arange(12), np.zeros(12, np.int64)).codes, (SIDE, SIDE))
    (tmp_path / "samples").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "samples" / f"{i:03d}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "samples"),
        input2=str(reference),
        cuda=False,
        fid=True,
        isc=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        cache=False,
        verbose=False,
        save_cpu_ram=True,  # no worker processes
        feature_extractor_weights_path=str(inception),
    )
    cell = found["cells"][0]
    assert theirs["frechet_inception_distance"] > 0
    assert cell["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert cell["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert cell["inception_score_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-2, abs=1e-6)
    assert (cell["precision"], cell["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]))
    assert cell["reference_images"] == 9


def test_scores_that_need_more_images_are_omitted() -> None:
    pytest.importorskip("torch_fidelity")
    few, more = features(0, n=3).astype(np.float32), features(1, n=9).astype(np.float32)
    assert precision_recall(few, more) is None
    assert inception_score(more) is None
    assert precision_recall(more, more) == (1.0, 1.0)


def test_a_folder_an_npz_its_statistics_and_saved_ones_are_the_same_reference(home: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "folder", 3, 8)
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    np.savez(tmp_path / "images.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", images)
    extract = TokenizerFeatures(VQTokenizer.from_pretrained(home / "vq"), "")
    held = Statistics.of(extract(images)["pool"])
    record = np.array(json.dumps({"features": "tokenizer", "images": 8}))
    np.savez(tmp_path / "statistics.npz", mu=held.mu, sigma=held.sigma, provenance=record)
    np.savez(tmp_path / "both.npz", images, mu=held.mu, sigma=held.sigma, provenance=record)
    saved: dict[str, Any] = {"save_reference": tmp_path / "saved.npz"}
    values: dict[str, Any] = {"held_out": home / "patches", "samples": 6}
    found = {}
    for name in ("folder", "images.npz", "packed.npz", "statistics.npz", "both.npz", "saved.npz"):
        more = saved if name == "folder" else {}
        found[name] = run(home, tmp_path / f"of-{name}", reference=tmp_path / name, **values, **more)["cells"][0]
    expected = found["folder"]
    assert expected["reference_images"] == 8
    for name, cell in found.items():
        assert cell[TOKENIZER_DISTANCE] == pytest.approx(expected[TOKENIZER_DISTANCE], rel=1e-5), name
        if name != "statistics.npz":
            assert cell["tokenizer_precision"] == expected["tokenizer_precision"]
            assert cell["tokenizer_recall"] == expected["tokenizer_recall"]
    assert "tokenizer_precision" not in found["statistics.npz"]


def test_a_reference_without_held_out_artifact_gives_no_bits_per_token(home: Path, tmp_path: Path) -> None:
    found = run(home, tmp_path / "scores", reference=write_images(tmp_path / "folder", 3, 8), samples=4)
    assert "bits_per_token" not in found
    assert found["cells"][0]["bits_per_token"] is None
    assert found["cells"][0][TOKENIZER_DISTANCE] > 0


def test_bad_references_are_one_message_before_anything_is_sampled(home: Path, tmp_path: Path) -> None:
    mixed = write_images(tmp_path / "mixed", 0, 3)
    Image.new("RGB", (SIZE, SIZE + 1)).save(mixed / "odd.png")
    grey = write_images(tmp_path / "grey", 0, 2)
    Image.new("L", (SIZE, SIZE)).save(grey / "grey.png")
    np.savez(tmp_path / "grey.npz", np.zeros((4, SIZE, SIZE, 1), np.uint8))
    np.savez(tmp_path / "floats.npz", np.zeros((4, SIZE, SIZE, 3), np.float32))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048), np.float16))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.savez(tmp_path / "objects.npz", mu=np.full(64, None, object), sigma=np.eye(64))
    np.savez(tmp_path / "one.npz", np.zeros((1, SIZE, SIZE, 3), np.uint8))
    mu, sigma, record = np.zeros(64), np.eye(64), np.array(json.dumps({"features": "tokenizer"}))
    skewed = sigma + np.triu(np.full((64, 64), 0.1))
    for name, (a, b) in {
        "nan": (mu * np.nan, sigma),
        "infinite": (mu, sigma + np.inf),
        "complex": (mu + 1j, sigma),
        "dates": (mu.astype("datetime64[s]"), sigma),
        "text": (mu.astype(str), sigma),
        "whole": (mu.astype(int), sigma),
        "objects": (np.full(64, None, object), sigma),
        "shape": (mu, np.eye(63)),
        "flat": (mu[0], sigma),
        "skewed": (mu, skewed),
        "huge": (mu, sigma * 1e200),
        "negative": (mu, -sigma),
    }.items():
        np.savez(tmp_path / f"{name}-statistics.npz", mu=a, sigma=b, provenance=record)
    np.savez(tmp_path / "provenance.npz", mu=mu, sigma=sigma, provenance=np.array('{"images": 1}'))
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    for name, says in {
        "mixed": r"odd.png is 8×9 pixels, .* 8×8; the images of a reference must have the same size",
        "grey": r"grey.png is not in colour \(mode L\)",
        "grey.npz": r"arr_0 is \(4, 8, 8, 1\) uint8; colour images",
        "floats.npz": r"arr_0 is \(4, 8, 8, 3\) float32; colour images",
        "wide.npz": r"statistics of 2048 inception features; --features tokenizer has 64",
        "other.npz": "has weights; a reference needs arr_0, or mu and sigma",
        "objects.npz": "statistics of 64 inception features",
        "one.npz": "holds 1 images; a reference needs at least 2",
        "nan-statistics.npz": "mu holds numbers that are not finite",
        "infinite-statistics.npz": "sigma holds numbers that are not finite",
        "complex-statistics.npz": "mu holds complex128; floating-point numbers are needed",
        "dates-statistics.npz": r"mu holds datetime64\[s\]; floating-point numbers are needed",
        "text-statistics.npz": r"mu holds <U\d+; floating-point numbers are needed",
        "whole-statistics.npz": "mu holds int64; floating-point numbers are needed",
        "objects-statistics.npz": "mu holds object; floating-point numbers are needed",
        "shape-statistics.npz": r"mu is \(64,\) and sigma \(63, 63\)",
        "flat-statistics.npz": r"mu is \(\) and sigma",
        "skewed-statistics.npz": "sigma is not a covariance: it is not symmetric",
        "huge-statistics.npz": "sigma is not a covariance",
        "negative-statistics.npz": "sigma is not a covariance: it has a negative number on its diagonal",
        "provenance.npz": "its provenance is damaged",
        "pipe.npz": "pipe.npz is not a regular file",
        "text.npz": "is not an .npz file",
        "empty": "holds 0 images",
        "gone": "does not exist",
    }.items():
        with pytest.raises(StageError, match=says):
            run(home, tmp_path / "scores", reference=tmp_path / name)
    assert not (tmp_path / "scores").exists()


def test_a_reference_of_one_image_gives_only_bits_per_token(home: Path, tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", CLASSES[:1], a_class=1)
    settings = TokenizeSettings(tokenizer=str(home / "vq"), image_size=SIZE, **CPU)
    tokenize(str(tmp_path / "photos"), tmp_path / "codes", settings, QUIET)
    save_run(tmp_path / "run", tmp_path / "codes", "llamagen-tiny")
    found = run(tmp_path, tmp_path / "bits", "run", reference=tmp_path / "codes", samples=0)
    assert found["held_out_images"] == found["originals"] == 1
    assert "tokenizer reconstruction distance" not in found
    with pytest.raises(StageError, match="codes holds 1 images; a reference needs at least 2"):
        run(tmp_path, tmp_path / "scores", "run", reference=tmp_path / "codes", samples=2)


@pytest.mark.parametrize("name", ["", "saved", "."])
def test_an_invalid_path_to_save_the_reference_is_wrong_usage(name: str) -> None:
    with pytest.raises(StageError, match=r"--save-reference is .*; it must be a file that ends in \.npz"):
        EvalSettings(reference=Path("r"), save_reference=Path(name))


def test_few_images_give_a_warning_about_bias(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = EvalSettings(reference=home / "patches", cfg_scale=(1.5,), samples=4, **CPU)
    evaluate(home / "dpar-tiny", tmp_path / "scores", settings)
    said = capsys.readouterr().err
    assert said.count("images are few for 64 features") == 1
    assert "10 reference and 4 samples images are few for 64 features" in said
    assert "are not FID" in said


class Trap:
    """Unpickling it without restrictions creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_code_in_a_weights_file_is_refused_not_executed(home: Path, tmp_path: Path, how: str) -> None:
    pytest.importorskip("torch_fidelity")
    held = {"Conv2d_1a_3x3.conv.weight": Trap(tmp_path / "sprung")}
    weights = tmp_path / "inception.pth"
    if how == "torch":
        torch.save(held, weights)
    else:
        weights.write_bytes(pickle.dumps(held, protocol=2))
    with pytest.raises(StageError, match=f"Inception's weights are unavailable in {weights}"):
        run(home, tmp_path / "scores", features="inception", inception_weights=weights)
    assert not (tmp_path / "sprung").exists()


def test_invalid_inception_weights_are_one_message(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("other.pth", "missing.pth"):
        with pytest.raises(StageError, match=f"are unavailable in {tmp_path / name}"):
            InceptionFeatures(tmp_path / name, torch.device("cpu"))
