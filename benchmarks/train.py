"""Cost of a training step of DPAR and of LlamaGen: `python benchmarks/train.py --size b --size l --dtype bf16`.

A step is forward, loss, backward and fused AdamW. The models take turns on the same batches, so that other load affects
all equally; the figures are medians. Codes are random; boundaries are drawn with the paper's mean patch length (141
patches for 256 tokens at 256 px) and vary between images. "plain" is a straightforward LlamaGen: SDPA, rotary
positions in one pass, RMSNorm in float32, cross-entropy of the full logits. Peak memory is measured in a new process
per model, without its imports, or by the GPU's allocator. Prints Markdown.
"""

import argparse
import dataclasses
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpar.attention import choose_backend
from dpar.flops import PAPER_PATCH_LENGTH, count
from dpar.layers import ffn_hidden
from dpar.llamagen import LlamaGen, LlamaGenConfig
from dpar.model import DPAR, DPARConfig
from dpar.packing import PatchLayout
from dpar.presets import preset
from dpar.rope import token_table, with_condition
from pipeline.training.throughput import peak_flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPREAD = 0.08  # standard deviation of an image's share of patches: 20 of 256 tokens
WARM_UP = 1
MATMUL = {"cpu": 2048, "cuda": 8192}

Batch = tuple[Tensor, Tensor, PatchLayout]


class PlainLlamaGen(nn.Module):
    """A straightforward LlamaGen, without this repository's optimisations."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.labels = nn.Embedding(config.classes + 1, config.width)
        self.tokens = nn.Embedding(config.codebook_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.layers))
        self.norm = PlainNorm(config.width)
        self.output = nn.Linear(config.width, config.codebook_size, bias=False)
        table = with_condition(token_table(config.grid_height, config.grid_width, config.head_dim))[:-1]
        self.register_buffer("table", table)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        x = self.dropout(torch.cat([self.labels(labels)[:, None], self.tokens(codes[:, :-1])], dim=1))
        for layer in self.layers:
            x = layer(x, self.table)
        return F.cross_entropy(self.output(self.norm(x)).float().flatten(0, 1), codes.flatten())


class PlainBlock(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        width, hidden = config.width, ffn_hidden(config.width)
        self.heads = config.heads
        self.wqkv, self.wo = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.attention_norm, self.ffn_norm = PlainNorm(width), PlainNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        q, k, v = self.wqkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = (y.transpose(1, 2) for y in (self.rotate(q, table), self.rotate(k, table), v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.dropout(self.wo(attended))
        y = self.ffn_norm(x)
        return x + self.dropout(self.w2(F.silu(self.w1(y)) * self.w3(y)))

    @staticmethod
    def rotate(x: Tensor, table: Tensor) -> Tensor:
        pairs, (cosine, sine) = x.float().unflatten(-1, (-1, 2)), table[:, None].unbind(-1)
        even, odd = pairs.unbind(-1)
        rotated = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
        return rotated.flatten(-2).to(x.dtype)


class PlainNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


@dataclasses.dataclass(frozen=True)
class Setting:
    """The settings of one table."""

    size: str
    image_size: int
    dtype: str
    batch: int
    backend: str
    compile: bool
    checkpoint: bool
    device: torch.device

    def config(self, name: str) -> DPARConfig | LlamaGenConfig:
        side = self.image_size // 16
        return preset(f"{name}-{self.size}", grid_height=side, grid_width=side)

    def batches(self, n: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(0)
        tokens = (self.image_size // 16) ** 2
        mean = (tokens / PAPER_PATCH_LENGTH[self.image_size] - 1) / (tokens - 1)  # of those after the first
        return [self.one_batch(tokens, mean, generator) for _ in range(n)]

    def one_batch(self, tokens: int, mean: float, generator: torch.Generator) -> Batch:
        shares = (mean + SPREAD * torch.randn(self.batch, 1, generator=generator)).clamp(0.1, 1.0)
        starts = torch.rand(self.batch, tokens, generator=generator) < shares
        starts[:, 0] = True
        codes = torch.randint(16384, (self.batch, tokens), generator=generator)
        labels = torch.randint(1001, (self.batch,), generator=generator)
        return codes.to(self.device), labels.to(self.device), PatchLayout.from_starts(starts).to(self.device)


class Trained:
    """A model with its optimizer."""

    def __init__(self, setting: Setting, name: str) -> None:
        torch.manual_seed(0)
        self.setting = setting
        config = setting.config("llamagen" if name == "plain" else name)
        with setting.device:
            if name == "plain":
                assert isinstance(config, LlamaGenConfig)
                self.model: nn.Module = PlainLlamaGen(config)
                if setting.compile:
                    self.model.compile()
            else:
                model = DPAR(config) if isinstance(config, DPARConfig) else LlamaGen(config)
                if isinstance(model, DPAR):
                    model.attention_backend = setting.backend  # type: ignore[assignment]
                model.checkpoint_layers = setting.checkpoint
                if setting.compile:
                    model.compile_layers()
                self.model = model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, batch: Batch) -> None:
        codes, labels, layout = batch
        dtype = DTYPES[self.setting.dtype]
        with torch.autocast(self.setting.device.type, torch.bfloat16, enabled=dtype != torch.float32):
            if isinstance(self.model, DPAR):
                loss = self.model(codes, labels, layout, loss=True)
            elif isinstance(self.model, LlamaGen):
                loss = self.model(codes, labels, loss=True)
            else:
                loss = self.model(codes, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def clock(setting: Setting, cpu_time: bool) -> float:
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if cpu_time else time.perf_counter()


def peak_memory(setting: Setting, name: str) -> float:
    """Return the peak memory of a few steps in MiB. Call it in a new process."""
    torch.mm(*torch.ones(2, 64, 64, device=setting.device))  # loads the library, whose memory is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trained = Trained(setting, name)
    for batch in setting.batches(2):
        trained.step(batch)
    if setting.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def table(setting: Setting, names: list[str], steps: int, cpu_time: bool, memory: dict[str, float]) -> str:
    batches = setting.batches(WARM_UP + steps)
    trained = {name: Trained(setting, name) for name in names}
    side, dtype = MATMUL[setting.device.type], DTYPES[setting.dtype]
    left, right = torch.randn(2, side, side, device=setting.device).to(dtype)
    times: dict[str, list[float]] = {name: [] for name in [*names, "matmul"]}
    for number, batch in enumerate(batches):
        for name in times:
            began = clock(setting, cpu_time)
            if name == "matmul":
                torch.mm(left, right)
            else:
                trained[name].step(batch)
            if number >= WARM_UP:
                times[name].append(clock(setting, cpu_time) - began)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    rate = 2 * side**3 / seconds["matmul"]
    mean = statistics.mean(layout.n_patches / setting.batch for _, _, layout in batches[WARM_UP:])
    tokens = batches[0][0].shape[1]
    flops = {
        name: count(setting.config("llamagen" if name == "plain" else name), tokens / mean).training_flops
        for name in names
    }
    gpu = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else ""
    peak = peak_flops(gpu, setting.dtype)
    lines = [
        f"### {setting.size.upper()}, {setting.image_size} px, {setting.dtype}, batch {setting.batch}, "
        f"{choose_backend(setting.device, dtype, setting.backend)[0]}"  # type: ignore[arg-type]
        f"{', compiled' if setting.compile else ''}{', layers checkpointed' if setting.checkpoint else ''}",
        "",
        f"{mean:.1f} patches per image. Median of {steps} steps{' of processor time' if cpu_time else ''}. "
        f"A {side}³ matrix product runs at {rate / 1e12:.3g} TFLOP/s{f' ({gpu})' if gpu else ''}.",
        "",
        "| model | images/s | TFLOP/s | of the matrix product's | MFU | peak MiB | × LlamaGen | by FLOPs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        images = setting.batch / seconds[name]
        achieved = images * flops[name]
        # ratios within a turn: other load slows both models of a turn
        ratios = [base / own for base, own in zip(times["llamagen"], times[name], strict=True)]
        lines.append(
            f"| {name}-{setting.size} | {images:.3g} | {achieved / 1e12:.3g} | {achieved / rate:.0%} | "
            f"{f'{achieved / peak:.0%}' if peak else '—'} | {f'{memory[name]:,.0f}' if memory else '—'} | "
            f"{statistics.median(ratios):.2f} | {flops['llamagen'] / flops[name]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=["tiny", "b", "l", "xl", "xxl"], help="may be repeated")
    parser.add_argument("--image-size", type=int, action="append", choices=sorted(PAPER_PATCH_LENGTH))
    parser.add_argument("--dtype", action="append", choices=sorted(DTYPES))
    parser.add_argument("--backend", action="append", help="of packed attention; may be repeated")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpoint", action="store_true", help="activation checkpointing by layer")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-plain", action="store_true", help="skip the plain LlamaGen")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine, with OMP_NUM_THREADS=1")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # the process that measures one model's memory
    arguments = parser.parse_args()
    names = ["llamagen", "dpar"] + ([] if arguments.no_plain else ["plain"])
    settings = [
        Setting(
            size,
            image_size,
            dtype,
            arguments.batch,
            backend,
            arguments.compile,
            arguments.checkpoint,
            torch.device(arguments.device),
        )
        for size in arguments.size or ["b"]
        for image_size in arguments.image_size or [256]
        for dtype in arguments.dtype or ["fp32"]
        for backend in arguments.backend or ["auto"]
    ]
    if arguments.memory_of:
        print(peak_memory(settings[0], arguments.memory_of))
        return
    for setting in settings:
        memory = {} if arguments.no_memory else {name: memory_of(setting, name) for name in names}
        print(table(setting, names, arguments.steps, arguments.cpu_time, memory), end="\n\n", flush=True)


def memory_of(setting: Setting, name: str) -> float:
    given = [f"--size={setting.size}", f"--image-size={setting.image_size}", f"--dtype={setting.dtype}"]
    given += [f"--batch={setting.batch}", f"--backend={setting.backend}", f"--device={setting.device}"]
    given += ["--compile"] * setting.compile + ["--checkpoint"] * setting.checkpoint
    done = subprocess.run(
        [sys.executable, __file__, *given, "--memory-of", name], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout)


if __name__ == "__main__":
    main()
