"""Sampling speed of DPAR and LlamaGen of the same size: `python benchmarks/sample.py --sizes b l --batches 1 8 32`.

Weights are random: they affect the time only through the boundaries. So the entropy model's head is initialised with a
standard deviation that spreads its entropies, and the threshold is set for the requested mean patch length; the table
has the actual length, and the standard deviation of the number of patches between images. Guidance is on.
LlamaGen and DPAR run in separate processes and take turns of a few steps, so that other load affects both equally. With
`--repeats` the ratio of every repeat is printed, and the median of everything else. `predicted` is the ratio of the
multiply-accumulates of linear layers that `dpar flops` counts. A step samples one token of every image of the batch.
Weights are prepared for sampling once, before the measurement.

Float32 on CPU, bfloat16 on CUDA. Memory is weights plus the peak of sampling, measured for each model alone.
`--cpu-time` measures processor time instead of wall time, for a busy machine (use OMP_NUM_THREADS=1, because waiting
threads count as busy).
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dpar import (
    DPAR,
    DPARConfig,
    LlamaGen,
    LlamaGenConfig,
    PatchRule,
    SamplingOptions,
    patch_starts,
    preset,
    sample,
    sampling,
)
from dpar.cpu_kernels import prepare_forward
from dpar.flops import count
from dpar.guidance import uniforms

V = 16384
SEED = 0
LOGIT_STD = 2.5  # of the entropy model, for a mean entropy of about ln V - LOGIT_STD² / 2


def rss(field: str) -> int:
    """Return the memory of this process in bytes: now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The model and the settings of one process."""

    model: str  # a preset's name
    entropy_model: str | None
    rule: PatchRule | None
    images: int
    batch: int
    grid: dict[str, int]
    device: str
    cpu_time: bool
    plain: bool = False  # without oneDNN


class Sampler:
    """A process that samples only during its turn."""

    STEPS = 16  # of a turn

    def __init__(self, run: Run) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(run, theirs), daemon=True)
        self.process.start()
        self.memory: int = self.pipe.recv()  # bytes: weights plus the peak of sampling
        self.starts: Tensor | None = None  # patch starts, set at the end
        self.seconds = 0.0

    def turn(self) -> bool:
        """Take a turn and return whether images remain."""
        self.pipe.send("go")
        seconds, starts = self.pipe.recv()
        self.seconds += seconds
        if starts is not None:
            self.starts = torch.from_numpy(starts)
            self.process.join()
        return starts is None


def serve(run: Run, pipe: Connection) -> None:
    """Sample in the process of a :class:`Sampler`."""
    torch.manual_seed(SEED)
    device, clock = torch.device(run.device), time.process_time if run.cpu_time else time.perf_counter
    cuda = device.type == "cuda"
    family, size = run.model.split("-")
    model = dpar(size, device, **run.grid) if family == "dpar" else llamagen(size, device, **run.grid)
    entropy_model = None if run.entropy_model is None else entropy_model_of(run.entropy_model, device, run.grid)
    labels = torch.arange(run.images) % 1000
    models: list[DPAR | LlamaGen] = [model] if entropy_model is None else [model, entropy_model]
    options = SamplingOptions(cfg_scale=2.0, seed=SEED)
    half = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
    kernels = mock.patch("dpar.cpu_kernels.available", return_value=False) if run.plain else contextlib.nullcontext()
    with half, kernels:
        # also a warm-up: the first calls on CUDA choose and load kernels
        weights = sum(p.numel() * p.element_size() for one in models for p in one.parameters())
        first = partial(sample, model, labels[: run.batch], entropy_model, run.rule, options)
        memory = weights + memory_of(first, device)
        sampler = sampling.Sampler(model, entropy_model)
        sampler.sample(labels[: run.batch], run.rule, options)  # prepares weights; on CUDA captures graphs
        pipe.send(memory)
        pipe.recv()
        steps, began = 0, clock()

        def spent() -> float:
            if cuda:
                torch.cuda.synchronize()
            return clock() - began

        def observe(*_: object) -> None:
            nonlocal steps, began
            steps += 1
            if steps % Sampler.STEPS == 0:
                pipe.send((spent(), None))
                pipe.recv()
                began = clock()

        _, starts = sampler.sample(labels, run.rule, options, batch=run.batch, observe=observe)
        pipe.send((spent(), starts.cpu().numpy()))


def in_turn(*runs: Run) -> list[Sampler]:
    """Sample all runs, a few steps of each in turn."""
    samplers = [Sampler(run) for run in runs]
    unfinished = samplers
    while unfinished:
        unfinished = [sampler for sampler in unfinished if sampler.turn()]
    return samplers


def memory_of(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of a call in bytes, without the memory in use before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = rss("VmRSS")
    call()
    return rss("VmHWM") - before


def threshold_for(entropy_model: LlamaGen, images: int, length: float, max_length: int) -> float:
    """Return the threshold for which the sampled images have this mean patch length.

    A new generator has an output head of zeros, so its codes are uniform and known in advance.
    """
    config = entropy_model.config
    codes = torch.from_numpy((uniforms(SEED, range(images), config.n_tokens) * V).astype("int64"))
    parts = codes.to(entropy_model.output.weight.device).split(8)
    prepared = prepare_forward(entropy_model)
    entropy = torch.cat([prepared.entropy(part).cpu() for part in parts])
    low, high = float(entropy[:, 1:].min()), float(entropy[:, 1:].max())
    for _ in range(30):
        middle = (low + high) / 2
        starts = patch_starts(entropy, middle, max_length, config.grid_width)
        low, high = (low, middle) if starts.numel() / int(starts.sum()) > length else (middle, high)
    return low


def llamagen(size: str, device: torch.device, **sizes: Any) -> LlamaGen:
    config = preset(f"llamagen-{size}", **sizes)
    assert isinstance(config, LlamaGenConfig)
    return LlamaGen(config).to(device).eval()


def dpar(size: str, device: torch.device, **sizes: int) -> DPAR:
    config = preset(f"dpar-{size}", **sizes)
    assert isinstance(config, DPARConfig)
    return DPAR(config).to(device).eval()


def entropy_model_of(size: str, device: torch.device, grid: dict[str, int]) -> LlamaGen:
    torch.manual_seed(SEED)  # the same weights in every process
    model = llamagen(size, device, classes=0, start_token=False, **grid)
    torch.nn.init.normal_(model.output.weight, std=LOGIT_STD / model.config.width**0.5)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["b"])
    parser.add_argument("--entropy-models", nargs="+", default=["b", "s", "xs"], help="LlamaGen's sizes")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--patch-length", type=float, default=1.81)
    parser.add_argument("--max-length", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1, help="batches per run")
    parser.add_argument("--plain", action="store_true", help="also measure LlamaGen without oneDNN")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, side = torch.device(arguments.device), arguments.image_size // 16
    grid = {"grid_height": side, "grid_width": side}
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{gpu}, torch {torch.__version__}, {arguments.image_size} px, guidance on\n")
    columns = "model, entropy model, batch, images/s, ms per step, memory GiB, patch length, sd of patches"
    line(*columns.split(", "), "× LlamaGen", "predicted")
    line(*["---"] * 10)
    for size in arguments.sizes:
        config = preset(f"dpar-{size}", **grid)
        assert isinstance(config, DPARConfig)
        for batch in arguments.batches:
            images = batch * arguments.rounds
            same: dict[str, Any] = {"images": images, "batch": batch, "grid": grid, "device": arguments.device}
            same["cpu_time"] = arguments.cpu_time
            base = Run(model=f"llamagen-{size}", entropy_model=None, rule=None, **same)
            runs = []
            for name in arguments.entropy_models:
                entropy_model = entropy_model_of(name, device, grid)
                threshold = threshold_for(entropy_model, images, arguments.patch_length, arguments.max_length)
                rule = PatchRule(threshold=threshold, max_length=arguments.max_length)
                runs.append(Run(model=f"dpar-{size}", entropy_model=name, rule=rule, **same))
            bases: list[Sampler] = []
            plain: list[Sampler] = []
            finished: list[list[Sampler]] = [[] for _ in runs]
            ratios: list[list[float]] = [[] for _ in runs]
            for _ in range(arguments.repeats):
                for i, run in enumerate(runs):
                    baseline, sampler = in_turn(base, run)
                    bases.append(baseline)
                    finished[i].append(sampler)
                    ratios[i].append(baseline.seconds / sampler.seconds)
                if arguments.plain:
                    plain += in_turn(dataclasses.replace(base, plain=True))

            line(f"llamagen-{size}", "", batch, *figures(bases, base), *[""] * 4)
            if plain:
                slower = statistics.median(x.seconds for x in bases) / statistics.median(x.seconds for x in plain)
                cells = figures(plain, base)
                line(f"llamagen-{size}, plain products", "", batch, *cells, "", "", f"{slower:.2f}", "")
            for run, samplers, run_ratios in zip(runs, finished, ratios, strict=True):
                starts = samplers[0].starts
                assert starts is not None  # all images are sampled
                assert run.entropy_model is not None
                patches = starts.sum(dim=1).float()
                length = config.n_tokens / float(patches.mean())
                entropy_cost = count(preset(f"llamagen-{run.entropy_model}", classes=0, start_token=False, **grid))
                cost = count(preset(base.model, **grid)).sampling() / count(config, length).sampling(entropy_cost)
                line(
                    *(run.model, f"llamagen-{run.entropy_model}", batch),
                    *figures(samplers, run),
                    *(f"{length:.2f}", f"{float(patches.std()):.0f}"),
                    " ".join(f"{ratio:.2f}" for ratio in sorted(run_ratios)),
                    f"{cost:.2f}",
                )


def figures(samplers: list[Sampler], run: Run) -> tuple[str, str, str]:
    """Return images/s, ms per step and GiB of repeated runs."""
    each = statistics.median(sampler.seconds for sampler in samplers) / run.images
    step = each * run.batch / (run.grid["grid_height"] * run.grid["grid_width"])
    return f"{1 / each:.3f}", f"{step * 1e3:.1f}", f"{samplers[0].memory / 2**30:.2f}"


def line(*cells: object) -> None:
    """Print a row of the table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
