"""``dpar demo``: all stages on twelve classes of the built-in emoji, and a report.

Every step is a ``dpar`` command, printed before it runs; only the sizes differ from the commands for ImageNet. The
report shows samples of the shipped models next to those of the demo's models, which are trained for fewer steps. A
stopped demo resumes when run again.

    demo(Path("demo"), run_command=lambda arguments: subprocess.run(["dpar", *arguments], check=True))
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dpar.bundle import Bundle
from dpar.locations import bundle_folder
from pipeline.export import training_cost
from pipeline.generation.generator import decode
from pipeline.reports.charts import histogram
from pipeline.reports.page import Picture, Section, Table, render
from pipeline.reports.pictures import data_uri, enlarge, patches_sheet, sheet
from pipeline.runs.run_folder import read_metrics, read_run
from pipeline.runs.weights import load_tokenizer
from pipeline.runtime.progress import Progress
from pipeline.runtime.provenance import made_by
from pipeline.scoring.records import DISTANCE, Results
from pipeline.sources.originals import load_originals
from shards.files import write_json
from shards.manifest import Manifest
from shards.reader import Artifact, open_artifact

RunCommand = Callable[[list[str]], None]
SHIPPED = "builtin:emoji"  # the data, and the models trained on all of it
SHIPPED_SAMPLING = ("--cfg-scale", "3", "--temperature", "0.9", "--top-p", "0.9")  # its clearest pictures, by eye
CLASSES = (
    "animal mammal",
    "face happy",
    "flag",
    "food fruit vegetable",
    "hand open",
    "heart",
    "letter number",
    "person sport",
    "place building",
    "shape",
    "sport equipment",
    "transport ground",
)
COLUMNS = 12  # classes side by side on a sheet


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the demo's data, training and sampling."""

    train_images: int  # over all classes; each is also mirrored
    validation_images: int
    steps: int  # of each of the three models
    samples: int
    guidance: tuple[float, ...] = (1.0, 2.0)


FULL = Size(train_images=640, validation_images=120, steps=40, samples=48)
TINY = Size(train_images=60, validation_images=30, steps=8, samples=12)


def demo(out: Path, *, run_command: RunCommand, tiny: bool = False, progress: Progress | None = None) -> Path:
    """Run all stages in ``out`` and return the path of its ``report.html``.

    Args:
        out: a directory for the demo only.
        run_command: runs one ``dpar`` command, given its arguments; raises if it fails.
        tiny: use the smallest size, to check that everything works.
        progress: where to report.
    """
    progress = progress or Progress()
    size = TINY if tiny else FULL
    timings: dict[str, float] = {}

    def run(*arguments: object) -> None:
        command = [str(argument) for argument in arguments]
        progress.say(f"$ dpar {shlex.join(command)}")
        began = time.monotonic()
        run_command(command)
        timings[f"dpar {shlex.join(command)}"] = time.monotonic() - began

    classes = [item for name in CLASSES for item in ("--classes", name)]
    encode = ("--tokenizer", SHIPPED, "--image-size", 128, *classes)
    training = ("--split", "train", "--views", "flip", "--limit", size.train_images)
    run("tokenize", SHIPPED, out / "codes", *encode, *training)
    validation = ("--split", "validation", "--limit", size.validation_images)
    run("tokenize", SHIPPED, out / "codes-validation", *encode, *validation)

    # no dropout: so few steps cannot overfit
    recipe = ["--steps", size.steps, "--batch", 32, "--lr", 2e-3, "--warmup", 10, "--schedule", "cosine"]
    recipe += ["--dropout", 0.0, "--micro-batch", 16]
    held_out = ("--validation", out / "codes-validation")
    run("entropy", out / "codes", out / "entropy", "--model", "llamagen-tiny", *recipe, *held_out)

    meter = ("--entropy-model", out / "entropy")
    run("patchify", out / "codes", out / "patches", *meter, "--target-length", 1.81, "--sample", 960)
    threshold = Manifest.read(out / "patches").settings["threshold"]
    run("patchify", out / "codes-validation", out / "patches-validation", *meter, "--threshold", threshold)

    held_out = ("--validation", out / "patches-validation")
    for model in ("dpar", "llamagen"):
        run("train", out / "patches", out / model, "--model", f"{model}-tiny", *recipe, *held_out)
    scales = [item for scale in size.guidance for item in ("--cfg-scale", scale)]
    for model in ("dpar", "llamagen"):
        reference = ("--reference", out / "patches-validation")
        run(
            "eval",
            out / model,
            out / f"eval-{model}",
            *reference,
            *scales,
            "--samples",
            size.samples,
            "--labels",
            "balanced",
        )
    per_class = size.samples // len(CLASSES)
    shipped_rule = _shipped().rule
    assert shipped_rule is not None  # it is a DPAR
    shipped = ("--entropy-model", SHIPPED, "--threshold", shipped_rule.threshold)
    run("patchify", out / "codes-validation", out / "shipped-patches", *shipped)
    run("sample", SHIPPED, out / "shipped", *classes, "--per-class", per_class, *SHIPPED_SAMPLING)
    run("inspect", out / "patches-validation", "--out", out / "inspect", "--images", 6)

    progress.say("writing the report")
    write_json(out / "timings.json", timings)
    return write_report(out, size, timings)


def write_report(out: Path, size: Size, timings: dict[str, float]) -> Path:
    """Write ``report.html`` and its pictures from the outputs of the commands in ``out``."""
    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    training = Manifest.read(out / "patches")
    held_out = open_artifact(out / "patches-validation")
    scores = {name: Results.read(out / f"eval-{name}" / "results.json") for name in ("dpar", "llamagen")}
    chosen = one_per_class(held_out)
    sections = [
        _comparison(out, scores, training),
        _reconstructions(held_out, chosen, scores, pictures),
        _patches(open_artifact(out / "shipped-patches"), held_out, chosen[::3], pictures),
        _samples(out, size, pictures),
        _commands(timings),
    ]
    report = out / "report.html"
    render(
        "report.html",
        report,
        title="DPAR on emoji",
        subtitle=(
            f"{len(training.class_names)} classes of Microsoft's 3D Fluent emoji; {training.rows} images and their "
            f"mirror images to train on, {len(held_out)} held out, none of them a variant of a training image."
        ),
        sections=sections,
        made_by=made_by(),
    )
    return report


def one_per_class(artifact: Artifact) -> NDArray[np.int64]:
    """Return the first row of each class, in order of labels: (classes,) int64."""
    labels = artifact.gather(np.arange(len(artifact)), np.zeros(len(artifact), np.int64)).labels
    return np.array([int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)])


def _comparison(out: Path, scores: dict[str, Results], training: Manifest) -> Section:
    def seen(name: str) -> str:
        """Return the number of images that a run has trained on."""
        lines = [line for line in read_metrics(out / name) if "bits_per_token" in line]
        batch = read_run(out / name)["settings"]["batch"]
        return f"{lines[-1]['step'] * batch}"

    both = [scores[name].newest for name in ("dpar", "llamagen")]
    rows = [
        ["tokens per image", *(str(row.tokens_per_image) for row in both)],
        ["patches per image, held out", f"{both[0].patches_per_image:.1f}", "–"],
        ["GFLOPs per image (MACs, as the paper counts)", *(f"{row.gmacs_per_image:.3f}" for row in both)],
        ["parameters", *(f"{row.parameters / 1e6:.2f} M" for row in both if row.parameters)],
        ["images trained on", seen("dpar"), seen("llamagen")],
        ["bits per token, held-out images", *(f"{row.bits_per_token:.3f}" for row in both)],
    ]
    for pair in zip(scores["dpar"].cells, scores["llamagen"].cells, strict=True):
        name = f"{DISTANCE[pair[0].features]} at guidance {pair[0].cfg_scale:g} ({pair[0].samples} samples)"
        rows.append([name, *(f"{cell.scores.distance:.2f}" for cell in pair if cell.scores)])
    statistics = training.statistics
    lengths = {int(length): count for length, count in statistics["lengths"].items()}
    total = sum(lengths.values())
    return Section(
        title="DPAR next to LlamaGen",
        text=(
            "Both have six layers of the same width and saw the same images in the same order. DPAR's patch "
            f"transformer worked on {statistics['patches_per_image']:.1f} patches per image instead of 256 tokens: "
            f"mean length {statistics['mean_length']:.2f}, set by --target-length 1.81. Models trained for a minute "
            "show that the stages work, not how good the method is."
        ),
        tables=[
            Table(caption="Cost and likelihood", header=["", "dpar-tiny", "llamagen-tiny"], rows=rows),
            Table(
                caption="Patches of the training images by length",
                header=["tokens in the patch", "patches", "share"],
                rows=[[str(n), f"{count}", f"{count / total:.1%}"] for n, count in lengths.items()],
            ),
        ],
        chart=Picture(
            "Share of patches of each length",
            data_uri(histogram(list(lengths.values()), [str(length) for length in lengths], "tokens in a patch")),
            "Bars. " + ", ".join(f"{length}: {count / total:.1%}" for length, count in lengths.items()),
        ),
    )


def _reconstructions(
    held_out: Artifact, rows: NDArray[np.int64], scores: dict[str, Results], pictures: Path
) -> Section:
    originals, decoded = _originals_and_decoded(held_out, rows)
    names = _names(held_out, rows)
    shown = []
    for first in range(0, len(rows), COLUMNS):
        part = slice(first, first + COLUMNS)
        picture = sheet(
            [[enlarge(image, 1) for image in images[part]] for images in (originals, decoded)],
            row_titles=("original", "from codes"),
            column_titles=names[part],
        )
        path = pictures / f"reconstructions-{first // COLUMNS + 1}.png"
        shown.append(_save(picture, path, "Held-out images, and their reconstructions by the tokenizer"))
    reconstruction = scores["dpar"].reconstruction
    assert reconstruction is not None  # the reference is an artifact
    return Section(
        title="Reconstructions",
        text=f"Held-out images above their reconstructions from 16×16 codes. PSNR over all held-out images: "
        f"{reconstruction.psnr_db:.2f} dB.",
        pictures=shown,
    )


def _patches(shipped: Artifact, own: Artifact, rows: NDArray[np.int64], pictures: Path) -> Section:
    originals, decoded = _originals_and_decoded(own, rows)
    shown = []
    for name, artifact in (("shipped", shipped), ("own", own)):
        batch = artifact.gather(rows, np.zeros_like(rows))
        assert batch.entropy is not None  # these are patches artifacts
        assert batch.starts is not None
        picture = patches_sheet(
            decoded,
            batch.entropy,
            {"patches": batch.starts},
            artifact.manifest.grid,
            _names(artifact, rows),
            originals=originals,
        )
        threshold = artifact.manifest.settings["threshold"]
        model = "the shipped entropy model" if name == "shipped" else "the entropy model of this demo"
        shown.append(_save(picture, pictures / f"patches-{name}.png", f"By {model}, threshold {threshold:.2f} nats"))
    return Section(
        title="Where the patches are",
        text=(
            "The entropy of each token of held-out images, in nats, and the resulting patches. A token starts "
            f"a patch if its entropy is above the threshold, if the open patch already has "
            f"{own.manifest.settings['max_length']} tokens, or if a new row begins."
        ),
        pictures=shown,
    )


def _shipped() -> Bundle:
    folder = bundle_folder(SHIPPED)
    assert folder is not None  # it is in the package
    return Bundle.read(folder)


def _samples(out: Path, size: Size, pictures: Path) -> Section:
    scale = size.guidance[-1]
    sheets = {
        "shipped": (f"dpar-mini, as shipped, sampled with {' '.join(SHIPPED_SAMPLING)}", out / "shipped" / "sheet.png"),
        **{
            name: (
                f"{name}-tiny of this demo, guidance {scale:g}",
                out / f"eval-{name}" / "cells" / f"cfg-{scale:g}" / "samples.png",
            )
            for name in ("dpar", "llamagen")
        },
    }
    shown = [
        _save(Image.open(path), pictures / f"{name}-samples.png", caption) for name, (caption, path) in sheets.items()
    ]
    costs = [cost for cost in (_shipped().training, training_cost(out / "dpar")) if cost is not None]
    rows = [
        ["model", *(cost.model for cost in costs)],
        ["steps × images per step", *(f"{cost.steps:,} × {cost.batch}" for cost in costs)],
        ["training GFLOPs per image", *(f"{cost.gflops_per_image:.2f}" for cost in costs)],
        ["total TFLOPs", *(f"{cost.steps * cost.batch * cost.gflops_per_image / 1000:,.0f}" for cost in costs)],
    ]
    return Section(
        title="Samples",
        text=(
            "One row per class. The shipped model was trained by the same commands, on all classes and for more steps. "
            "There are only about 3,000 training images, so a sample may be close to one of them: "
            "`dpar sample … --show-nearest` shows the nearest."
        ),
        pictures=shown,
        tables=[Table(caption="Training cost", header=["", "shipped", "this demo"], rows=rows)],
    )


def _commands(timings: dict[str, float]) -> Section:
    rows = [[command, f"{seconds:.1f} s"] for command, seconds in timings.items()]
    total = sum(timings.values())
    return Section(
        title="The commands",
        text=f"In the order in which they ran; {total:.0f} s in total on this machine.",
        tables=[Table(caption="Commands and their times", header=["command", "time"], rows=rows)],
    )


def _names(artifact: Artifact, rows: NDArray[np.int64]) -> list[str]:
    labels = artifact.gather(rows, np.zeros_like(rows)).labels
    return [artifact.manifest.class_names[label] for label in labels]


def _originals_and_decoded(artifact: Artifact, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    first = np.zeros_like(rows)
    originals = load_originals(artifact.manifest, artifact.keys(rows), first)
    codes = artifact.gather(rows, first).codes
    return originals, decode(load_tokenizer(SHIPPED), codes, artifact.manifest.grid)


def _save(picture: Image.Image, path: Path, caption: str) -> Picture:
    """Save a picture and return it for the report."""
    picture.save(path)
    return Picture(caption, data_uri(picture), caption, wide=True)
