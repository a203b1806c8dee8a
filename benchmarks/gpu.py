"""Test and measure DPAR on a GPU in ten minutes: `python benchmarks/gpu.py --minutes 9 --out results`.

Parts run in order of importance, each in a separate process that is killed when its share of the time is over; unused
time goes to the later parts. Each part writes OUT/PART.md line by line, so results before a time limit are kept.
OUT/gpu.md joins them at the end: Markdown with the GPU's name, for docs/performance.md.

    tests        the tests marked `gpu`
    attention    each backend of packed attention against sdpa, forward and backward; then its time at B, L, XL
    training     images/s, MFU, memory and the ratio to LlamaGen (benchmarks/train.py), with and without --compile
    sampling     images/s and ms per token of B and XL against LlamaGen, with and without CUDA graphs
    rates        VQ-16's encoder and the entropy models
    nccl         DistributedDataParallel and FSDP in one NCCL process

`--part NAME` runs one. `--device cpu --tiny` runs everything at tiny sizes, to check the script. Codes and weights are
random; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from dpar import DPAR, DPARConfig, LlamaGen, LlamaGenConfig, PatchRule, SamplingOptions, VQConfig, VQTokenizer, preset
from dpar.attention import PackedBackend, choose_backend, packed_attention
from dpar.flops import PAPER_PATCH_LENGTH, count
from dpar.packing import PatchLayout
from dpar.sampling import Sampler

ROOT = Path(__file__).parent.parent
SHARES = {"tests": 0.15, "attention": 0.1, "training": 0.3, "sampling": 0.3, "rates": 0.1, "nccl": 0.05}
V, TOKENS, GRID = 16384, 256, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--part", choices=sorted(SHARES), help="run and print only this part")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to check the script")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("this machine, or this PyTorch, has no CUDA; --device cpu --tiny checks the script without it")
    if arguments.part:
        for line in PART[arguments.part](device, arguments.tiny):
            print(line, flush=True)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    joined = [f"# {name}, torch {torch.__version__}\n"]
    for part in SHARES:
        shares = [share for other, share in SHARES.items() if list(SHARES).index(other) >= list(SHARES).index(part)]
        seconds = (end - time.monotonic()) * SHARES[part] / sum(shares)
        path = arguments.out / f"{part}.md"
        status = run_part(part, path, seconds, [f"--device={device}", *["--tiny"] * arguments.tiny])
        joined.append(f"## {part}\n\n{path.read_text(encoding='utf-8')}\n{status}\n")
        print(joined[-1], flush=True)
        (arguments.out / "gpu.md").write_text("\n".join(joined), encoding="utf-8")


def run_part(part: str, path: Path, seconds: float, options: list[str]) -> str:
    """Run a part with its output in a file, and return a sentence that says how it ended."""
    began = time.monotonic()
    with open(path, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, __file__, "--part", part, *options],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return f"Stopped at its limit of {seconds:.0f} s; results until then are above."
    spent = time.monotonic() - began
    if process.returncode:
        return f"FAILED after {spent:.0f} s:\n\n```\n{errors.strip()[-3000:]}\n```"
    return f"Done in {spent:.0f} s."


def tests(device: torch.device, tiny: bool) -> Iterator[str]:
    """Run the tests that need a GPU and print each test's outcome."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider"]
    command += ["tests/dpar/test_attention.py"] if tiny else []
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield "```"
    for line in process.stdout:
        yield line.rstrip()
    yield "```"
    if process.wait() not in (0, 5):  # 5: no tests were collected
        raise SystemExit("tests failed")


def attention(device: torch.device, tiny: bool) -> Iterator[str]:
    """Compare the outputs, gradients and times of each backend with sdpa."""
    yield "| backend | size | largest difference, forward | backward | ms, forward and backward | × sdpa |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for size, batch in [("tiny", 2)] if tiny else [("b", 64), ("l", 64), ("xl", 64)]:
        config = preset(f"dpar-{size}")
        layout = boundaries(batch, TOKENS, PAPER_PATCH_LENGTH[256]).to(device)
        shape = (layout.n_patches, config.heads, config.head_dim)
        q, k, v, grad = (torch.randn(shape, device=device) for _ in range(4))

        exact = passes("sdpa", [q, k, v], grad, layout)
        half = [x.to(dtype) for x in (q, k, v)]
        times: dict[str, float] = {}
        for backend in ("sdpa", *(name for name in get_args(PackedBackend) if name != "sdpa")):
            try:
                choose_backend(device, dtype, backend)
                measured = passes(backend, half, grad, layout)
            except Exception as error:  # show it in the backend's row
                yield f"| {backend} | {size} | {type(error).__name__}: {str(error).splitlines()[0][:120]} | | | |"
                continue
            differences = [float((a.float() - b).abs().max()) for a, b in zip(measured, exact, strict=True)]
            run = functools.partial(passes, backend, half, grad, layout)
            times[backend] = seconds_of(run, device, 2 if tiny else 20)
            yield (
                f"| {backend} | {size} | {differences[0]:.1e} | {max(differences[1:]):.1e} | "
                f"{1e3 * times[backend]:.2f} | {times['sdpa'] / times[backend]:.2f} |"
            )


def passes(backend: PackedBackend, qkv: list[Tensor], grad: Tensor, layout: PatchLayout) -> list[Tensor]:
    """Return output and gradients of packed attention, with ``grad`` the gradient of the output."""
    q, k, v = (x.detach().requires_grad_() for x in qkv)
    out = packed_attention(q, k, v, layout.cu_seqlens, layout.longest, backend, layout.host_cu_seqlens)
    return [out, *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))]


def training(device: torch.device, tiny: bool) -> Iterator[str]:
    """Run benchmarks/train.py, the most important settings first."""
    if tiny:
        settings = [["--size=tiny", "--batch=2", "--steps=1", "--no-memory"]]
    else:
        xl, b = ["--size=xl", "--batch=64", "--dtype=bf16"], ["--size=b", "--size=l", "--batch=128", "--dtype=bf16"]
        settings = [[*xl, "--compile"], xl, [*b, "--compile"], [*xl, "--image-size=384", "--compile"], b]
        settings += [["--size=b", "--image-size=384", "--batch=128", "--dtype=bf16", "--compile"]]
    for setting in settings:
        command = [sys.executable, str(ROOT / "benchmarks" / "train.py"), f"--device={device}", "--no-plain", *setting]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = process.stdout.strip().splitlines()
        if process.returncode:  # such as out of memory on a smaller GPU
            lines += [f"`{' '.join(setting)}`: {process.stderr.strip().splitlines()[-1]}"]
        yield "\n".join(lines) + "\n"


def sampling(device: torch.device, tiny: bool) -> Iterator[str]:
    """Sample complete images with guidance by DPAR and LlamaGen of one size, in turn."""
    yield "| model | entropy model | batch | graphs | images/s | ms per token | × LlamaGen | by FLOPs |"
    yield "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |"
    cases: list[tuple[str, int, str, bool]]
    if tiny:
        cases = [("tiny", 2, "xs", True)]
    else:
        cases = [("b", 8, "xs", True), ("xl", 1, "xs", True), ("xl", 256, "xs", True), ("b", 8, "xs", False)]
        cases += [("xl", 64, "xs", True), ("xl", 8, "xs", True), ("b", 64, "xs", True), ("b", 1, "xs", True)]
        cases += [("b", 8, "b", True), ("xl", 8, "b", True), ("b", 256, "xs", True), ("xl", 8, "xs", False)]
    grid = {"grid_height": 4, "grid_width": 4} if tiny else {}
    options = SamplingOptions(cfg_scale=2.0)
    half = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    for size, batch, entropy_size, graphs in cases:
        torch.manual_seed(0)
        baseline = built(f"llamagen-{size}", device, **grid)
        model = built(f"dpar-{size}", device, **grid)
        entropy_model = built(f"llamagen-{entropy_size}", device, classes=0, start_token=False, **grid)
        assert isinstance(entropy_model, LlamaGen)
        torch.nn.init.normal_(entropy_model.output.weight, std=2.5 / entropy_model.config.width**0.5)
        n = model.config.n_tokens
        labels = torch.arange(batch) % 1000
        with half, torch.no_grad():
            codes = torch.randint(V, (min(batch, 8), n), device=device)
            entropy = torch.cat([entropy_model.entropy(row[None]) for row in codes]).float()
            rule = PatchRule(threshold=float(entropy[:, 1:].quantile(1 - 0.48)))  # near the paper's 1.81 with rows
            samplers = [Sampler(baseline, graphs=graphs), Sampler(model, entropy_model, graphs=graphs)]
            starts = torch.empty(0)
            seconds: list[list[float]] = [[], []]
            for turn in range(2 if tiny else 3):  # the first compiles, captures and warms up
                for i, (sampler, own_rule) in enumerate(zip(samplers, (None, rule), strict=True)):
                    synchronize(device)
                    began = time.perf_counter()
                    _, sampled_starts = sampler.sample(labels, own_rule, options, batch=batch)
                    synchronize(device)
                    if turn:
                        seconds[i].append(time.perf_counter() - began)
                    starts = sampled_starts
        base, own = (statistics.median(each) for each in seconds)
        length = starts.numel() / float(starts.sum())
        cost = count(model.config, length).sampling(count(entropy_model.config))
        predicted = count(baseline.config).sampling() / cost
        how = "on" if graphs else "off"
        yield f"| llamagen-{size} | | {batch} | {how} | {batch / base:.2f} | {1e3 * base / n:.3f} | 1 | 1 |"
        yield (
            f"| dpar-{size}, length {length:.2f} | llamagen-{entropy_size} | {batch} | {how} | {batch / own:.2f} | "
            f"{1e3 * own / n:.3f} | {base / own:.2f} | {predicted:.2f} |"
        )
        del samplers, baseline, model, entropy_model


def rates(device: torch.device, tiny: bool) -> Iterator[str]:
    """Measure views per second of `tokenize`'s encoder and of `patchify`'s entropy models."""
    yield "| model | precision | batch | images/s |"
    yield "| --- | --- | ---: | ---: |"
    batch, side = (2, 32) if tiny else (64, 256)
    config = VQConfig(channels=32, channel_multipliers=(1, 1), residual_blocks=1) if tiny else VQConfig()
    tokenizer = VQTokenizer(config).to(device).eval()
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    for dtype in (torch.bfloat16, torch.float32):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            seconds = seconds_of(lambda: tokenizer.encode(images), device, 1 if tiny else 5)
        yield f"| VQ-16 encoder, {side} px | {str(dtype)[6:]} | {batch} | {batch / seconds:,.0f} |"
    for size in ["tiny"] if tiny else ["xs", "b"]:
        model = built(f"llamagen-{size}", device, classes=0, start_token=False)
        assert isinstance(model, LlamaGen)
        codes = torch.randint(V, (batch, TOKENS), device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            seconds = seconds_of(functools.partial(model.entropy, codes), device, 1 if tiny else 5)
        yield f"| entropies by llamagen-{size} | bfloat16 | {batch} | {batch / seconds:,.0f} |"


def nccl(device: torch.device, tiny: bool) -> Iterator[str]:
    """Compare gradients of DDP and FSDP2 with the plain model's, in one NCCL process (gloo on CPU)."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        codes = torch.randint(V, (2, TOKENS), device=device)
        labels = torch.zeros(2, dtype=torch.long, device=device)
        layout = boundaries(2, TOKENS, PAPER_PATCH_LENGTH[256]).to(device)

        def gradient(wrap: Callable[[DPAR], Any]) -> Tensor:
            torch.manual_seed(0)
            model = built("dpar-tiny" if tiny else "dpar-b", device)
            assert isinstance(model, DPAR)
            torch.nn.init.normal_(model.output.weight, std=0.02)
            wrap(model)(codes, labels, layout, loss=True).backward()
            gradient = model.tok_embeddings.weight.grad
            assert gradient is not None
            return getattr(gradient, "full_tensor", lambda: gradient)()

        def sharded(model: DPAR) -> DPAR:
            mesh = init_device_mesh(device.type, (1,))
            for layer in itertools.chain(model.encoder, model.layers, model.decoder):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return model

        plain = gradient(lambda model: model)
        ways: dict[str, Callable[[DPAR], Any]] = {"DDP": torch.nn.parallel.DistributedDataParallel, "FSDP2": sharded}
        for name, wrap in ways.items():
            difference = float((gradient(wrap) - plain).abs().max() / plain.abs().max())
            yield f"{backend}, {name}: gradients differ from the plain model's by {difference:.1e} of the largest.\n"
        dist.destroy_process_group()


PART = {f.__name__: f for f in (tests, attention, training, sampling, rates, nccl)}


def built(name: str, device: torch.device, **sizes: Any) -> DPAR | LlamaGen:
    """Build a model with random weights, in evaluation mode."""
    config = preset(name, **sizes)
    with device:
        if isinstance(config, DPARConfig):
            return DPAR(config).eval()
        assert isinstance(config, LlamaGenConfig)
        return LlamaGen(config).eval()


def boundaries(batch: int, tokens: int, length: float) -> PatchLayout:
    """Draw boundaries with a mean patch length, on the CPU."""
    starts = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(0)) < 1 / length
    starts[:, 0] = True
    return PatchLayout.from_starts(starts)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median seconds of a call, after a warm-up call."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
