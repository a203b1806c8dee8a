"""How fast DPAR samples beside LlamaGen of the same size: `python benchmarks/sample.py --sizes b l --batches 1 8 32`.

Random weights: time does not depend on them, but for where patches begin. So the entropy model's head is drawn wide
enough for its entropies to differ, and the threshold is set for the wanted mean patch length; the
length that came out is in the table, with how much the number of patches differs between images. Guidance is on.
DPAR samples `--rounds` times as many images as are in flight (the batch), so that images which wait for each other come
apart as in a long run; LlamaGen, whose images march in step, one batch before and one after, and each ratio is to the
mean of these two, so that what else the machine does meets both. Of several `--repeats` the median counts. `predicted`
is the ratio of the multiply-accumulates of linear layers that `dpar flops` counts. A step is a token of every image in
flight.

Float32 on CPU, bfloat16 on CUDA. Memory: weights, and what sampling needs besides at its peak.
`--cpu-time` counts this process's processor time instead of the clock's, for a machine that others use (then with
OMP_NUM_THREADS=1, since threads that wait for others count as busy).
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from dpar import DPAR, DPARConfig, LlamaGen, LlamaGenConfig, patch_starts, preset, sample, token_entropy
from dpar.flops import count
from dpar.onednn import onednn
from dpar.sampling import uniforms, usual_gather

V = 16384
SEED = 0
LOGIT_STD = 2.5  # of the entropy model: a mean entropy of about ln V - LOGIT_STD² / 2


def rss(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


class Meter:
    """Seconds, and bytes beyond those held before, of a call."""

    def __init__(self, device: torch.device, cpu_time: bool) -> None:
        self.device, self.clock = device, time.process_time if cpu_time else time.perf_counter

    def __call__(self, call: Callable[[], tuple[Tensor, Tensor]]) -> tuple[float, int, Tensor]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = rss("VmRSS")
        began = self.clock()
        _, starts = call()
        if cuda:
            torch.cuda.synchronize()
        seconds = self.clock() - began
        peak = torch.cuda.max_memory_allocated() if cuda else rss("VmHWM")
        return seconds, peak - before, starts


def threshold_for(entropy_model: LlamaGen, images: int, length: float, max_length: int) -> float:
    """The threshold that gives the images of a run this mean patch length.

    A model with random weights has an output head of zeros, so it draws all codes alike, and they are known beforehand.
    """
    config = entropy_model.config
    codes = torch.from_numpy((uniforms(SEED, range(images), config.n_tokens) * V).astype("int64"))
    with torch.no_grad(), onednn(entropy_model):
        parts = codes.to(entropy_model.output.weight.device).split(8)
        entropy = torch.cat([token_entropy(entropy_model(part)).cpu() for part in parts])
    low, high = float(entropy.min()), float(entropy.max())
    for _ in range(30):
        middle = (low + high) / 2
        starts = patch_starts(entropy, middle, max_length, config.grid_width)
        low, high = (low, middle) if starts.numel() / int(starts.sum()) > length else (middle, high)
    return low


def llamagen(size: str, device: torch.device, **sizes: int) -> LlamaGen:
    config = preset(f"llamagen-{size}", **sizes)
    assert isinstance(config, LlamaGenConfig)
    return LlamaGen(config).to(device).eval()


def dpar(size: str, device: torch.device, **sizes: int) -> DPAR:
    config = preset(f"dpar-{size}", **sizes)
    assert isinstance(config, DPARConfig)
    return DPAR(config).to(device).eval()


def size_of(*models: torch.nn.Module | None) -> int:
    return sum(p.numel() * p.element_size() for model in models if model for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["b"])
    parser.add_argument("--entropy-models", nargs="+", default=["b", "s", "xs"], help="LlamaGen's sizes")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--patch-length", type=float, default=1.81)
    parser.add_argument("--max-length", type=int, default=4)
    parser.add_argument("--gather", nargs="+", type=float, help="0: all images march in step; default: as usual")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="LlamaGen without oneDNN too")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, side = torch.device(arguments.device), arguments.image_size // 16
    grid = {"grid_height": side, "grid_width": side}
    meter = Meter(device, arguments.cpu_time)
    half = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    torch.manual_seed(0)

    watchers: dict[str, LlamaGen] = {}
    for name in arguments.entropy_models:
        watcher = llamagen(name, device, classes=0, **grid)
        torch.nn.init.normal_(watcher.output.weight, std=LOGIT_STD / watcher.config.width**0.5)
        watchers[name] = watcher

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {arguments.image_size} px, guidance on\n")
    columns = "model, entropy model, batch, gather, images/s, ms a step, memory GiB, patch length, sd of patches"
    line(*columns.split(", "), "× LlamaGen", "predicted")
    line(*["---"] * 11)
    for size in arguments.sizes:
        baseline = llamagen(size, device, **grid)
        model = dpar(size, device, **grid)
        n = model.config.n_tokens
        for batch in arguments.batches:
            images = batch * arguments.rounds
            own = partial(sample, cfg_scale=2.0, seed=SEED, batch=batch)
            base: Callable[[], tuple[Tensor, Tensor]] = partial(own, baseline, None, torch.arange(batch) % 1000)
            calls: dict[tuple[str, float], Callable[[], tuple[Tensor, Tensor]]] = {}
            for watched, watcher in watchers.items():
                threshold = threshold_for(watcher, images, arguments.patch_length, arguments.max_length)
                rule = {"threshold": threshold, "max_length": arguments.max_length}
                for gather in arguments.gather or [usual_gather(model, watcher)]:
                    labels = torch.arange(images) % 1000
                    calls[watched, gather] = partial(own, model, watcher, labels, gather=gather, **rule)
            bases: list[tuple[float, int, Tensor]] = []
            plain: list[tuple[float, int, Tensor]] = []
            turns: dict[tuple[str, float], list[tuple[float, int, Tensor]]] = {key: [] for key in calls}
            ratios: dict[tuple[str, float], list[float]] = {key: [] for key in calls}
            with half:
                if device.type == "cuda":  # whose first calls choose and load kernels
                    for call in (base, *calls.values()):
                        call()
                for _ in range(arguments.repeats):
                    bases.append(meter(base))
                    if arguments.plain:
                        with mock.patch("dpar.onednn.available", return_value=False):
                            plain.append(meter(base))
                    for key, call in calls.items():
                        turns[key].append(meter(call))
                        bases.append(meter(base))
                        beside = (bases[-2][0] + bases[-1][0]) / 2
                        ratios[key].append(beside * arguments.rounds / turns[key][-1][0])

            line(f"llamagen-{size}", "", batch, "", *figures(bases, batch, size_of(baseline)), *[""] * 4)
            if plain:
                turns_of_base = bases[:: len(calls) + 1]
                slower = statistics.median(a[0] / b[0] for a, b in zip(turns_of_base, plain, strict=True))
                cells = figures(plain, batch, size_of(baseline))
                line(f"llamagen-{size}, plain products", "", batch, "", *cells, "", "", f"{slower:.2f}", "")
            for (watched, gather), found in turns.items():
                patches = found[0][2].sum(dim=1).float()
                length = n / float(patches.mean())
                macs = count(model.config, length).sampling(count(watchers[watched].config))
                line(
                    *(f"dpar-{size}", f"llamagen-{watched}", batch, f"{gather:g}"),
                    *figures(found, batch, size_of(model, watchers[watched])),
                    *(f"{length:.2f}", f"{float(patches.std()):.0f}"),
                    f"{statistics.median(ratios[watched, gather]):.2f}",
                    f"{count(baseline.config).sampling() / macs:.2f}",
                )


def figures(found: list[tuple[float, int, Tensor]], batch: int, held: int) -> tuple[str, str, str]:
    """images/s, ms a step, and GiB, of runs beside ``held`` bytes of weights."""
    images, n = found[0][2].shape
    seconds = statistics.median(turn[0] for turn in found) / images
    memory = held + max(turn[1] for turn in found)
    return f"{1 / seconds:.3f}", f"{seconds * batch / n * 1e3:.1f}", f"{memory / 2**30:.2f}"


def line(*cells: object) -> None:
    """A row of the table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
