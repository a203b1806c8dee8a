"""Speed of the patch rule on one core: `python benchmarks/patch_starts.py`.

Compares `dpar.patch_starts` with a plain loop over tokens in the same run, on float16 entropies as in artifacts.
"""

import argparse
import math
import statistics
import time

import numpy as np

from dpar.patching import patch_starts


def loop(entropy: np.ndarray, threshold: float, max_length: int, grid_width: int) -> np.ndarray:
    starts = np.zeros(entropy.shape, bool)
    for image, row in enumerate(entropy.astype(np.float32)):
        run = 0
        for i, h in enumerate(row):
            start = i == 0 or h >= threshold or run == max_length or i % grid_width == 0
            starts[image, i] = start
            run = 1 if start else run + 1
    return starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    entropy = rng.uniform(4, 9.7, (arguments.images, arguments.tokens)).astype(np.float16)
    width = math.isqrt(arguments.tokens)

    def measure(function, sample: np.ndarray) -> float:  # type: ignore[no-untyped-def]
        times = []
        for _ in range(arguments.repeats):
            began = time.perf_counter()
            function(sample, 7.8, 4, width)
            times.append(time.perf_counter() - began)
        return sample.size / statistics.median(times)

    few = entropy[:200]
    np.testing.assert_array_equal(patch_starts(few, 7.8, 4, width), loop(few, 7.8, 4, width))
    fast, slow = measure(patch_starts, entropy), measure(loop, few)
    print(
        f"patch_starts {fast / 1e6:,.1f} M tokens/s, a plain loop {slow / 1e6:,.2f} M tokens/s, "
        f"ratio {fast / slow:,.0f}"
    )


if __name__ == "__main__":
    main()
