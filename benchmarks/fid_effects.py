"""Effects of the evaluation protocol on the Fréchet distance: `python -m benchmarks.fid_effects`.

Prints the tables of docs/fid.md, with EfficientNet-Lite0's features, whose weights come in a package. The default needs
no generator: it scores reconstructions of emoji by `builtin:emoji` against the originals of other emoji. `--run RUN`
uses a trained generator, to measure guidance and the drawing of labels too.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from dpar.tokenizer import VQTokenizer, from_uint8
from pipeline.generation.generator import Generator, decode
from pipeline.generation.sampled_artifact import labels_like, labels_of
from pipeline.scoring.bootstrap import Bootstrap
from pipeline.scoring.efficientnet import EfficientNetFeatures
from pipeline.scoring.features import Statistics, frechet_distance
from pipeline.scoring.kernel_distance import kernel_distance
from pipeline.settings.sampling import SampleSettings
from pipeline.sources import open_indexed
from pipeline.sources.crops import views
from pipeline.sources.source import IndexedSource
from shards.files import write_json

SIDE, GRID = 128, (16, 16)
SMALL = 96  # px, to which pictures are resized from SIDE
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
Pixels = NDArray[np.uint8]  # (n, SIDE, SIDE, 3)


class Measuring:
    """A table of distances from a reference."""

    def __init__(self, reference: NDArray[np.float32], seed: int) -> None:
        self.reference, self.bootstrap = reference, Bootstrap(seed=seed)
        self.lines: list[dict[str, object]] = []

    def add(
        self, effect: str, setting: str, features: NDArray[np.float32], reference: NDArray[np.float32] | None = None
    ) -> None:
        """Measure features (n, 1280) against the reference, or another one, and print the line."""
        reference = self.reference if reference is None else reference
        kernel, _ = kernel_distance(features, reference)
        samples, references = on_their_span(features, reference)
        statistics = Statistics.of(references)
        distance = frechet_distance(Statistics.of(samples), statistics)
        interval = self.bootstrap.frechet(samples, statistics, distance)
        assert interval is not None  # there are at least 10 images
        line = {"effect": effect, "setting": setting, "samples": len(features), "references": len(reference)}
        self.lines.append(line | {"fd": distance, "low": interval.low, "high": interval.high, "kid": kernel})
        print(
            f"| {effect} | {setting} | {len(features)} | {len(reference)} | {distance:.2f} "
            f"({interval.low:.2f} to {interval.high:.2f}) | {1000 * kernel:.3f} |",
            flush=True,
        )


def on_their_span(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Project both sets onto their common span: distances are unchanged, and few images need few dimensions.

    Args:
        a: (n, d).
        b: (m, d).
    """
    basis, _ = np.linalg.qr(np.concatenate([a, b]).T.astype(np.float64))  # (d, n + m)
    return a @ basis, b @ basis


def load(source: IndexedSource, rows: NDArray[np.int64]) -> Pixels:
    """Load images of a source, cropped as by `dpar tokenize`."""
    return np.concatenate([views(source.load(int(row)), SIDE, "center", (1.0,)) for row in rows])


@torch.no_grad()
def encode(tokenizer: VQTokenizer, pixels: Pixels) -> NDArray[np.int64]:
    """Return the codes (n, 256) of images."""
    parts = [tokenizer.encode(from_uint8(torch.from_numpy(part))) for part in np.array_split(pixels, len(pixels) // 16)]
    return torch.cat(parts).numpy()


def resized(pixels: Pixels, size: int, mode: str, antialias: bool = False) -> Pixels:
    """Resize images and round them to integers."""
    images = torch.from_numpy(pixels).movedim(-1, 1).float()
    images = F.interpolate(images, size=(size, size), mode=mode, antialias=antialias)
    return images.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()


def as_file(pixels: Pixels, **options: Any) -> Pixels:
    """Encode images as files and read them again."""
    read = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, **options)
        read.append(np.asarray(Image.open(file)))
    return np.stack(read)


def without_generator(args: argparse.Namespace, extract: Callable[[Pixels], NDArray[np.float32]]) -> Measuring:
    """Measure the effects of decoding, file format, resize and reference on reconstructions."""
    tokenizer = VQTokenizer.from_pretrained("builtin:emoji")
    training, held_out = (open_indexed("builtin:emoji", split=split) for split in ("train", "validation"))
    rows = np.random.default_rng(args.seed).permutation(len(training))[: args.samples + args.references]
    samples, originals = np.split(load(training, rows), [args.samples])
    codes = encode(tokenizer, samples)
    pixels, half = (decode(tokenizer, codes, GRID, precision=precision) for precision in ("fp32", "bf16"))
    measured, reference = extract(pixels), extract(originals)
    table = Measuring(reference, args.seed)
    table.add("baseline", "decoded in float32, all references", measured)
    table.add("decoding", "bfloat16", extract(half))
    assert np.array_equal(as_file(pixels, format="PNG"), pixels)  # so the distance is that of an .npz, the baseline
    for quality in (95, 75):
        table.add("file", f"JPEG, quality {quality}", extract(as_file(pixels, format="JPEG", quality=quality)))
    small = extract(resized(originals, SMALL, "bicubic", antialias=True))
    for name, mode, antialias in (
        ("bicubic, antialiased", "bicubic", True),
        ("bicubic, not antialiased", "bicubic", False),
        ("bilinear, not antialiased", "bilinear", False),
        ("nearest", "nearest", False),
    ):
        setting = f"{SIDE} to {SMALL} px: {name}; references: bicubic, antialiased"
        table.add("resize", setting, extract(resized(pixels, SMALL, mode, antialias)), small)
    for part in (2, 4):
        table.add("references", "fewer, of the same images", measured, reference[: len(reference) // part])
    for part in (2, 4):
        table.add("samples", "fewer", measured[: len(measured) // part])
    validation = extract(load(held_out, np.arange(len(held_out))))
    table.add("reference set", "validation images", measured, validation)
    table.add("reference set", "as many training images", measured, reference[: len(held_out)])
    table.add("reference set", "the originals of the samples", measured, extract(samples))
    return table


def with_generator(args: argparse.Namespace, extract: Callable[[Pixels], NDArray[np.float32]]) -> Measuring:
    """Measure the effects of guidance, labels and decoding on samples of a trained generator."""
    generator = Generator.load(Path(args.run), SampleSettings(seed=args.seed)).with_rule(None, None)
    source = open_indexed("builtin:emoji", split="train", classes=generator.class_names)
    rows = np.random.default_rng(args.seed).permutation(len(source))[: args.references]
    table = Measuring(extract(load(source, rows)), args.seed)
    classes = list(range(len(generator.class_names)))
    every = np.asarray([source.label(int(row)) for row in rows])
    drawn = {how: labels_of(classes, args.samples, how, args.seed) for how in ("random", "balanced")}
    drawn["in the reference's proportions"] = labels_like(every, args.samples)

    def sample(labels: NDArray[np.int64], scale: float) -> NDArray[np.int64]:
        return generator.sample(labels, np.arange(len(labels)), scale).codes

    for scale in GUIDANCE:
        codes = sample(drawn["random"], scale)
        table.add("guidance", f"{scale:g}, random labels", extract(generator.decode(codes)))
        if scale == 2.0:
            half = decode(generator.tokenizer, codes, generator.grid, precision="bf16")
            table.add("decoding", "bfloat16, guidance 2", extract(half))
    for how in ("balanced", "in the reference's proportions"):
        table.add("labels", f"{how}, guidance 2", extract(generator.decode(sample(drawn[how], 2.0))))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run of `dpar train` on builtin:emoji, or a bundle of one")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--references", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    network = EfficientNetFeatures(torch.device("cpu"))
    print("| effect | setting | samples | references | FD (EfficientNet-Lite0) | KID × 1000 |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    measure = with_generator if args.run else without_generator
    table = measure(args, lambda pixels: network(pixels)["pool"])
    if args.json is not None:
        write_json(args.json, table.lines)


if __name__ == "__main__":
    main()
