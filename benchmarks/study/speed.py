"""Images per second of each row, in turn, so that whatever else the machine does meets all alike."""

from __future__ import annotations

import statistics
import time

import numpy as np

from benchmarks.study.cells import Study
from pipeline.generation.generator import Generator
from pipeline.settings.sampling import SampleSettings
from shards.files import write_json

ROUNDS, BATCH = 5, 16


def measure_speed(study: Study) -> None:
    """Write `speed.json`: the median images per second of each main row, guidance on, and all that were measured."""
    settings = SampleSettings(cfg_scale=study.size.guidance, batch=BATCH)
    generators = {
        row.name: Generator.load(study.work / "runs" / f"{row.name}-seed-0", settings) for row in study.rows("speed")
    }
    labels = np.arange(BATCH) % study.shape["classes"]
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    for turn in range(ROUNDS + 1):  # the first one prepares kernels, and does not count
        for name, generator in generators.items():
            began = time.perf_counter()
            generator.sample(labels, np.arange(BATCH), study.size.guidance)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    rates = {name: [BATCH / each for each in taken] for name, taken in seconds.items()}
    medians = {name: statistics.median(each) for name, each in rates.items()}
    write_json(study.work / "speed.json", {"images_per_second": medians, "measured": rates, "batch": BATCH})
