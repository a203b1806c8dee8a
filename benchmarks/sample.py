"""How fast DPAR samples beside LlamaGen of the same size: `python benchmarks/sample.py --sizes b l --batches 1 8 32`.

Random weights: time does not depend on them, but for where patches begin. So the entropy model's head is drawn wide
enough for its entropies to differ, and the threshold is set for the wanted mean patch length; the
length that came out is in the table, with how much the number of patches differs between images. Guidance is on.
LlamaGen and DPAR, a process each, take a few steps in turn: whatever else the machine does meets both alike. With
`--repeats` the ratio of each is given, and the median of the others. `predicted` is the ratio of the
multiply-accumulates of linear layers that `dpar flops` counts. A step is a token of every image of the batch. Weights
are prepared for sampling once and beforehand, as in a long run.

Float32 on CPU, bfloat16 on CUDA. Memory: weights, and what sampling needs besides at its peak, each alone.
`--cpu-time` counts this process's processor time instead of the clock's, for a machine that others use (then with
OMP_NUM_THREADS=1, since threads that wait for others count as busy).
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
LOGIT_STD = 2.5  # of the entropy model: a mean entropy of about ln V - LOGIT_STD² / 2


def rss(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one process samples."""

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
    """A process that samples only while it is its turn."""

    STEPS = 16  # of a turn

    def __init__(self, run: Run) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(run, theirs), daemon=True)
        self.process.start()
        self.memory: int = self.pipe.recv()  # bytes: weights, and what sampling needs besides at its peak
        self.starts: Tensor | None = None  # of patches, when it is done
        self.seconds = 0.0

    def turn(self) -> bool:
        """Whether there is more to do after this turn."""
        self.pipe.send("go")
        seconds, starts = self.pipe.recv()
        self.seconds += seconds
        if starts is not None:
            self.starts = torch.from_numpy(starts)
            self.process.join()
        return starts is None


def serve(run: Run, pipe: Connection) -> None:
    """What a :class:`Sampler` runs."""
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
        # on CUDA, whose first calls choose and load kernels, this is where they do
        held = sum(p.numel() * p.element_size() for one in models for p in one.parameters())
        first = partial(sample, model, labels[: run.batch], entropy_model, run.rule, options)
        memory = held + memory_of(first, device)
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
    """Samples these, a few steps of each in turn, until all are done."""
    samplers = [Sampler(run) for run in runs]
    going = samplers
    while going:
        going = [sampler for sampler in going if sampler.turn()]
    return samplers


def memory_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of a call beyond those held before, at its peak."""
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
    """The threshold that gives the images of a run this mean patch length.

    A model with random weights has an output head of zeros, so it draws all codes alike, and they are known beforehand.
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
    torch.manual_seed(SEED)  # the same in every process
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
    parser.add_argument("--rounds", type=int, default=1, help="batches of a run")
    parser.add_argument("--plain", action="store_true", help="LlamaGen without oneDNN too")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, side = torch.device(arguments.device), arguments.image_size // 16
    grid = {"grid_height": side, "grid_width": side}
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{gpu}, torch {torch.__version__}, {arguments.image_size} px, guidance on\n")
    columns = "model, entropy model, batch, images/s, ms a step, memory GiB, patch length, sd of patches"
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
            found: list[list[Sampler]] = [[] for _ in runs]
            ratios: list[list[float]] = [[] for _ in runs]
            for _ in range(arguments.repeats):
                for i, run in enumerate(runs):
                    beside, sampler = in_turn(base, run)
                    bases.append(beside)
                    found[i].append(sampler)
                    ratios[i].append(beside.seconds / sampler.seconds)
                if arguments.plain:
                    plain += in_turn(dataclasses.replace(base, plain=True))

            line(f"llamagen-{size}", "", batch, *figures(bases, base), *[""] * 4)
            if plain:
                slower = statistics.median(x.seconds for x in bases) / statistics.median(x.seconds for x in plain)
                cells = figures(plain, base)
                line(f"llamagen-{size}, plain products", "", batch, *cells, "", "", f"{slower:.2f}", "")
            for run, samplers, of_each in zip(runs, found, ratios, strict=True):
                starts = samplers[0].starts
                assert starts is not None  # it is done
                assert run.entropy_model is not None
                patches = starts.sum(dim=1).float()
                length = config.n_tokens / float(patches.mean())
                entropy_cost = count(preset(f"llamagen-{run.entropy_model}", classes=0, start_token=False, **grid))
                cost = count(preset(base.model, **grid)).sampling() / count(config, length).sampling(entropy_cost)
                line(
                    *(run.model, f"llamagen-{run.entropy_model}", batch),
                    *figures(samplers, run),
                    *(f"{length:.2f}", f"{float(patches.std()):.0f}"),
                    " ".join(f"{ratio:.2f}" for ratio in sorted(of_each)),
                    f"{cost:.2f}",
                )


def figures(samplers: list[Sampler], run: Run) -> tuple[str, str, str]:
    """images/s, ms a step, and GiB, of runs."""
    each = statistics.median(sampler.seconds for sampler in samplers) / run.images
    step = each * run.batch / (run.grid["grid_height"] * run.grid["grid_width"])
    return f"{1 / each:.3f}", f"{step * 1e3:.1f}", f"{samplers[0].memory / 2**30:.2f}"


def line(*cells: object) -> None:
    """A row of the table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
