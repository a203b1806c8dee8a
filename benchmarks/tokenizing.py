"""What `dpar tokenize` costs beside its encoder, and what more cores give: `python benchmarks/tokenizing.py`.

Images are JPEGs of ImageNet's usual size, made on the fly. The first table compares the whole stage with the encoder
alone on the same crops already in memory; start-up is taken out by subtracting a short run from a long one. The
second gives the same images to one core, to one process with the whole machine, and to one process for each core.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dpar import VQConfig, VQTokenizer
from dpar.tokenizer import from_uint8
from pipeline.runs.weights import load_tokenizer
from pipeline.runtime.device import autocast, choose_device, precision_name
from pipeline.runtime.progress import Progress
from pipeline.settings.artifacts import TokenizeSettings
from pipeline.sources import open_indexed
from pipeline.sources.crops import n_views, views
from pipeline.tokenize import CodeEncoder, tokenize

QUIET = Progress(quiet=True)
# Dense TFLOP/s by the makers' data sheets: float32, TF32 (what cuDNN's float32 convolutions use by default), bfloat16.
PEAKS = {"H200": (67, 494, 989), "H100": (67, 494, 989), "A100": (19.5, 156, 312), "L40S": (91.6, 183, 362)}


def make_photos(folder: Path, count: int) -> Path:
    """JPEGs of 500×375 pixels and about 100 KB."""
    source = open_indexed("builtin:photos")
    rng = np.random.default_rng(0)
    for i in range(count):
        photo = source.load(i * 37 % len(source)).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(photo) + rng.normal(0, 9, (375, 500, 3))
        path = folder / str(i % 10) / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path, quality=95)
    return folder


def seconds_of_stage(photos: Path, out: Path, settings: TokenizeSettings) -> float:
    began = time.perf_counter()
    assert tokenize(str(photos), out, settings, QUIET) is not None
    return time.perf_counter() - began


def seconds_of_encoder(photos: Path, settings: TokenizeSettings) -> float:
    """The encoder alone on the stage's crops, decoded before."""
    source = open_indexed(str(photos))
    crops = [
        views(source.load(i), settings.image_size, settings.views, settings.crop_range) for i in range(len(source))
    ]
    with CodeEncoder(load_tokenizer(settings.tokenizer).to(choose_device(settings.device)), settings) as encoder:
        for image in crops[: settings.batch]:  # warm-up
            encoder.add(image)
        encoder.end_shard()
        began = time.perf_counter()
        for image in crops:
            encoder.add(image)
        encoder.end_shard()
        return time.perf_counter() - began


def flops_of_a_crop(settings: TokenizeSettings) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    device = choose_device(settings.device)
    tokenizer = load_tokenizer(settings.tokenizer).to(device)
    pixels = torch.zeros(1, settings.image_size, settings.image_size, 3, dtype=torch.uint8, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), autocast(device, settings.precision):
        tokenizer.encode(from_uint8(pixels))
    return int(counter.get_total_flops())


def peak(settings: TokenizeSettings) -> tuple[str, float] | None:
    """The name of the arithmetic and its peak in FLOP/s, where this GPU's is known."""
    device = choose_device(settings.device)
    known = [peaks for name, peaks in PEAKS.items() if name in torch.cuda.get_device_name(device)]
    if not known:
        return None
    bf16 = precision_name(device, settings.precision) == "bf16"
    kind = 2 if bf16 else 1 if torch.backends.cudnn.allow_tf32 else 0
    return ("float32", "TF32", "bfloat16")[kind], known[0][kind] * 1e12


def seconds_of_processes(photos: Path, out: Path, settings: TokenizeSettings, cores: list[set[int]]) -> float:
    """One process for each set of cores, all on one output; from their start signal to the end of the last."""
    line = [sys.executable, __file__, "--share", str(photos), str(out), *options(settings)]
    processes = [
        subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, own)), *line],
            env={**os.environ, "OMP_NUM_THREADS": str(len(own))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for own in cores
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    began = time.perf_counter()
    for process in processes:  # all of them, before any is waited for
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    return time.perf_counter() - began


def share(photos: Path, out: Path, settings: TokenizeSettings) -> None:
    """What each of several processes does: warms up, waits for the signal, takes its share of the work."""
    images = open_indexed(str(photos))
    with CodeEncoder(load_tokenizer(settings.tokenizer), settings) as encoder:
        encoder.add(views(images.load(0), settings.image_size, "center", (1.0,)))
        encoder.end_shard()
    print("ready", flush=True)
    sys.stdin.readline()
    tokenize(str(photos), out, settings, QUIET)


def options(settings: TokenizeSettings) -> list[str]:
    return [
        f"--tokenizer={settings.tokenizer}",
        f"--image-size={settings.image_size}",
        f"--views={settings.views}",
        f"--batch={settings.batch}",
        f"--shard-size={settings.shard_size}",
        f"--device={settings.device}",
        f"--precision={settings.precision}",
    ]


def compare_with_encoder(photos: Path, work: Path, settings: TokenizeSettings, images: int) -> None:
    few = make_photos(work / "few", max(1, min(settings.batch, images // 4)))
    n_few = len(open_indexed(str(few)))
    seconds_of_stage(few, work / "warm", settings)
    fixed = seconds_of_stage(few, work / "short", settings)
    stage = (seconds_of_stage(photos, work / "long", settings) - fixed) / (images - n_few)
    encoder = seconds_of_encoder(photos, settings) / images
    each = n_views(settings.views, settings.crop_range)
    device = choose_device(settings.device)
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )
    print(f"{images} images of 500×375, {each} views of {settings.image_size} px, {name}\n")
    print("| | images/s | crops/s |\n| --- | ---: | ---: |")
    print(f"| encoder alone | {1 / encoder:,.2f} | {each / encoder:,.2f} |")
    print(f"| dpar tokenize | {1 / stage:,.2f} | {each / stage:,.2f} |\n")
    print(f"Decoding, cropping and writing add {stage / encoder - 1:+.1%} to the encoder's time.")
    if device.type == "cuda":
        rate = flops_of_a_crop(settings) * each / encoder
        known = peak(settings)
        of_peak = "" if known is None else f", {rate / known[1]:.0%} of this GPU's {known[0]} peak"
        print(f"The encoder runs at {rate / 1e12:,.1f} TFLOP/s{of_peak}.")


def compare_cores(photos: Path, work: Path, settings: TokenizeSettings, images: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    ways = {
        "one process, one core": [{cores[0]}],
        f"one process, {len(cores)} cores": [set(cores)],
        f"{len(cores)} processes, one core each": [{core} for core in cores],
    }
    print("\n| CPU | images/s | × one core |\n| --- | ---: | ---: |")
    first = 0.0
    for i, (name, sets) in enumerate(ways.items()):
        rate = images / seconds_of_processes(photos, work / f"cores {i}", settings, sets)
        first = first or rate
        print(f"| {name} | {rate:,.2f} | {rate / first:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--views", choices=("center", "flip", "ten-crop"), default="center")
    parser.add_argument("--tokenizer", help="weights; the default is VQ-16 with random ones")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shard-size", type=int, help="images per shard; the default makes 8 shards")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="fp32")
    parser.add_argument("--share", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        settings = TokenizeSettings(
            tokenizer=arguments.tokenizer or str(VQTokenizer(VQConfig()).save_pretrained(work / "vq-16")),
            image_size=arguments.image_size,
            views=arguments.views,
            crop_range=(1.1, 1.05) if arguments.views == "ten-crop" else (1.0,),
            batch=arguments.batch,
            shard_size=arguments.shard_size or max(1, arguments.images // 8),
            device=arguments.device,
            precision=arguments.precision,
        )
        if arguments.share:
            photos, out = arguments.share
            share(photos, out, settings)
            return
        photos = make_photos(work / "photos", arguments.images)
        compare_with_encoder(photos, work, settings, arguments.images)
        if choose_device(settings.device).type == "cpu":
            compare_cores(photos, work, settings, arguments.images)


if __name__ == "__main__":
    main()
