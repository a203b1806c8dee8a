"""Images per second of each row, measured in turn, so that other load affects all equally."""

from __future__ import annotations

import statistics
import time

import numpy as np

from benchmarks.study.cells import Study
from dpar.locations import RUN_WEIGHTS
from pipeline.generation.generator import Generator
from pipeline.settings.sampling import SampleSettings
from shards.files import write_json

ROUNDS, BATCH = 5, 16


def measure_speed(study: Study) -> None:
    """Write `speed.json`: images per second of each main row with guidance, all measurements and their medians.

    Rows whose first run has no weights in the study's folder are left out.
    """
    settings = SampleSettings(cfg_scale=study.size.guidance, batch=BATCH)
    runs = {row.name: study.work / "runs" / f"{row.name}-seed-0" for row in study.rows("speed")}
    generators = {name: Generator.load(run, settings) for name, run in runs.items() if (run / RUN_WEIGHTS).is_dir()}
    labels = np.arange(BATCH) % study.shape["classes"]
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    for turn in range(ROUNDS + 1):  # the first one is a warm-up
        for name, generator in generators.items():
            began = time.perf_counter()
            generator.sample(labels, np.arange(BATCH), study.size.guidance)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    rates = {name: [BATCH / value for value in values] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    write_json(study.work / "speed.json", {"images_per_second": medians, "measured": rates, "batch": BATCH})
