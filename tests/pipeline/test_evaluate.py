"""`dpar eval`: its cells, tables and files, runs that are interrupted or shared, and refusals."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dpar import DPAR
from dpar.tokenizer import VQTokenizer, psnr
from pipeline.evaluate import evaluate
from pipeline.generation.generator import decode
from pipeline.runs.run_folder import FORMAT_VERSIONS
from pipeline.runtime.errors import StageError
from pipeline.scoring.features import Statistics, TokenizerFeatures, frechet_distance, precision_recall
from pipeline.scoring.reconstruction import ssim
from pipeline.scoring.records import HeldOutRow, Results
from pipeline.scoring.results import write_results
from pipeline.settings.sampling import EvalSettings
from pipeline.settings.training import TrainSettings
from pipeline.sources.originals import load_originals
from pipeline.train import train
from shards.reader import open_artifact
from tests.pipeline.evaluated import TOKENIZER_DISTANCE, run, save_runs
from tests.pipeline.sampled import CPU, QUIET, SIDE, N, everything, killed_again_and_again, start

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tmp_path_factory.mktemp("made"))


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


def test_every_cell_and_table_records_sampling_and_feature_settings(home: Path, tmp_path: Path) -> None:
    found = run(home, tmp_path / "scores", samples=4, labels="balanced", decode_precision="bf16", cfg_scale=(1.0, 2.0))
    for cell in found["cells"]:
        assert (cell["samples"], cell["labels"], cell["features"]) == (4, "balanced", "tokenizer")
        assert (cell["cfg_schedule"], cell["decode_precision"]) == ("constant", "bf16")
    line = "Samples: 4 per row, balanced labels, guidance 1 or 2, constant guidance, decoded in bf16, features of"
    assert line in (tmp_path / "scores" / "results.md").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("kind", ["tokenizer", "entropy"])
def test_anything_but_a_run_of_train_is_refused(home: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(StageError, match=r"is not a run: it has no run\.json"):
        run(home, tmp_path / "a", "codes")
    (tmp_path / "run").mkdir()
    record = {"format_version": FORMAT_VERSIONS[kind], "kind": kind, "settings": {}, "inputs": {}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(StageError, match=f"a run of `dpar {kind}`; a run of `dpar train` is needed"):
        evaluate(tmp_path / "run", tmp_path / "a", EvalSettings(reference=home / "patches", **CPU), QUIET)
