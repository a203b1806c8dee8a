"""The study: `python -m benchmarks.study main --work DIR --codes-train A --codes-validation B --entropy-model RUN`.

Parts: main, choices, thresholds, limits, probe, equal-flops, speed; then `tables --out DIR`. Every cell is a `dpar`
command with its own folder in `--work`. The same command resumes a stopped study: finished cells are skipped, and parts
share common cells. `--list` shows cells and their state. docs/study.md explains each part.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from benchmarks.study.cells import Study
from benchmarks.study.rows import PARTS, Size
from benchmarks.study.speed import measure_speed
from benchmarks.study.tables import write_tables
from dpar.errors import ModelError
from pipeline.runtime.errors import StageError
from shards.errors import ArtifactError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "tables"))
    parser.add_argument("--work", type=Path, required=True, help="the study's folder")
    parser.add_argument("--codes-train", type=Path, required=True, help="an artifact of `dpar tokenize`")
    parser.add_argument("--codes-validation", type=Path, required=True)
    parser.add_argument("--entropy-model", required=True, help="run or weights")
    parser.add_argument("--out", type=Path, help="folder for the tables (default: WORK/tables)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", nargs="+", help="only these rows of the part, by name")
    parser.add_argument("--list", action="store_true", help="only show the part's cells and their state")
    for field in dataclasses.fields(Size):
        kind = {"float": float, "str": str}.get(str(field.type), int)
        parser.add_argument("--" + field.name, type=kind, default=field.default)
    given = parser.parse_args()
    size = Size(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Size)})
    try:
        study = Study(
            given.work, given.codes_train, given.codes_validation, given.entropy_model, size, seeds=given.seeds
        )
        if given.part == "tables":
            print(write_tables(study, given.out or given.work / "tables"))
            return
        names = [row.name for row in study.rows(given.part)]
        if unknown := set(given.rows or ()) - set(names):
            parser.error(f"{given.part} has no rows {', '.join(sorted(unknown))}; it has {', '.join(names)}")
        cells = [cell for cell in study.cells(given.part) if given.rows is None or cell.row.name in given.rows]
        for cell in cells:
            if given.list:
                print(f"{cell.name}: {study.state(cell)}")
            else:
                study.run(cell)
        if given.part == "speed" and not given.list:
            measure_speed(study)
    except (StageError, ModelError, ArtifactError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
