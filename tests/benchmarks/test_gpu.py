"""benchmarks/gpu.py runs on the CPU at tiny sizes; its measurements need a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def gpu(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device=cpu", "--tiny", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "row"),
    [
        ("attention", "| sdpa | tiny |"),
        ("sampling", "| dpar-tiny, length"),
        ("nccl", "gloo, FSDP2: gradients differ"),
    ],
)
def test_a_part_prints_its_rows(part: str, row: str) -> None:
    assert row in gpu("--part", part).stdout


@pytest.mark.slow
def test_parts_stop_at_their_time_limits_and_all_are_in_the_report(tmp_path: Path) -> None:
    gpu("--minutes", "0.001", "--out", str(tmp_path))
    report = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert report.count("\n## ") == 6
    assert report.count("Stopped at its limit") == 6
