"""``dpar export RUN DIR``: a run and everything needed to sample from it, as one directory (:mod:`dpar.bundle`).

exported = export(Path("run"), Path("bundle"), ExportSettings(push_to="you/dpar-emoji"))
pipe = DPARPipeline.from_pretrained("bundle")
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dpar.bundle import BUNDLE, Bundle, Part, TrainingCost
from dpar.locations import CARD, bundle_folder
from dpar.model import DPAR
from dpar.pretrained import fingerprint
from pipeline.generation.generator import Generator, run_of
from pipeline.generation.hub import SAMPLES, push
from pipeline.reports.pictures import draw_patches, enlarge, sheet
from pipeline.runs.run_folder import read_metrics, read_run
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.settings.sampling import ExportSettings

EMA = "model-ema"  # in a run: the moving average of its weights
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    folder: Path
    bytes: int  # of all files
    parts: tuple[str, ...]
    pushed_to: str | None  # address on the Hub


def export(run: Path, out: Path, settings: ExportSettings, progress: Progress | None = None) -> Exported:
    """Write a run as a bundle, with a model card and sample pictures.

    Args:
        run: a run of ``dpar train``; its moving average is used if it has one, unless ``settings.ema`` is off.
        out: a new directory, or a bundle, which is overwritten.
        settings: see :class:`ExportSettings`.
        progress: where to report.

    Raises:
        StageError, ModelError: run, output or repository cannot be used.
    """
    progress = progress or Progress()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / BUNDLE).is_file())):
        raise StageError(f"{out} holds something else; name a new directory")
    if run_of(run) != run or bundle_folder(run) is not None:
        raise StageError(f"{run} is not a run of `dpar train`")
    averaged = settings.ema and (run / EMA).is_dir()
    generator = Generator.load(run, settings, weights=str(run / EMA) if averaged else None)
    dtype = DTYPES[settings.weights_dtype]

    (out / BUNDLE).unlink(missing_ok=True)  # written last: an incomplete directory is not a bundle
    models: dict[Part, Any] = {"generator": generator.model, "tokenizer": generator.tokenizer}
    if generator.entropy_model is not None:
        models["entropy_model"] = generator.entropy_model
    parts = {part: fingerprint(model.save_pretrained(out / part, dtype=dtype)) for part, model in models.items()}
    bundle = Bundle(
        class_names=generator.class_names, parts=parts, rule=generator.trained_rule, training=training_cost(run)
    )

    if settings.samples:
        progress.say(f"sampling {settings.samples} pictures for the model card")
    picture = _sample_sheet(generator, settings)
    if picture is not None:
        picture.save(out / SAMPLES, "WEBP", quality=85)
    (out / CARD).write_text(_card(run, generator, settings, averaged, picture is not None), encoding="utf-8")
    bundle.write(out)
    return Exported(
        folder=out,
        bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        parts=tuple(parts),
        pushed_to=None if settings.push_to is None else push(out, settings.push_to),
    )


def training_cost(run: Path) -> TrainingCost | None:
    """Return what a run has cost so far; None if it has not measured the cost of an image yet."""
    lines = read_metrics(run)
    costs = [line["training_gflops_per_image"] for line in lines if "training_gflops_per_image" in line]
    if not costs:
        return None
    settings = read_run(run)["settings"]
    return TrainingCost(
        model=settings["model"],
        steps=max(line["step"] for line in lines),
        batch=settings["batch"],
        gflops_per_image=costs[-1],
    )


def _sample_sheet(generator: Generator, settings: ExportSettings) -> Image.Image | None:
    """Return samples of evenly spread classes, with and without their patches drawn; None without samples."""
    if settings.samples == 0:
        return None
    labels = np.linspace(0, len(generator.class_names) - 1, settings.samples).astype(np.int64)
    drawn = generator.sample(labels, np.arange(len(labels)), settings.cfg_scale)
    pixels = generator.decode(drawn.codes)
    scale = max(1, round(128 / pixels.shape[1]))
    rows = [[enlarge(image, scale) for image in pixels]]
    if generator.rule is not None:
        pairs = zip(pixels, drawn.starts, strict=True)
        rows.append([draw_patches(image, starts, generator.grid, scale) for image, starts in pairs])
    return sheet(rows, column_titles=[generator.class_names[label] for label in labels])


def _card(run: Path, generator: Generator, settings: ExportSettings, averaged: bool, pictured: bool) -> str:
    """Return the model card in Markdown: description, usage, training and score."""
    record = read_run(run)
    is_dpar = isinstance(generator.model, DPAR)
    name = settings.title or run.absolute().name
    trained = record["settings"]
    metrics = read_metrics(run)
    lines = ["---", "library_name: dpar", "pipeline_tag: unconditional-image-generation"]
    lines += [f"tags: [{'dpar' if is_dpar else 'llamagen'}, image-generation]", "---", "", f"# {name}", ""]
    height, width = generator.image_size
    lines += [
        f"{'DPAR, dynamic patchification for' if is_dpar else 'LlamaGen,'} autoregressive image generation: "
        f"{len(generator.class_names)} classes, {height} × {width} pixels, "
        f"{generator.grid[0]} × {generator.grid[1]} tokens of {generator.model.config.codebook_size} codes.",
        "",
    ]
    lines += [settings.note, ""] if settings.note else []
    lines += [f"![Samples]({SAMPLES})", ""] if pictured else []
    lines += ["```python", "from dpar import DPARPipeline", "", f'pipe = DPARPipeline.from_pretrained("{name}")']
    lines += [f'pipe(["{generator.class_names[0]}"], cfg_scale={settings.cfg_scale:g}, seed=0).images', "```", ""]
    rows = {
        "parameters": f"{sum(p.numel() for p in generator.model.parameters()):,}",
        "weights": f"{'moving average' if averaged else 'last step'}, {settings.weights_dtype}",
        "command": _command(record["history"]),
        "steps × batch": f"{metrics[-1]['step'] if metrics else '–'} × {trained['batch']}",
        "patch rule": "–" if generator.trained_rule is None else str(generator.trained_rule.to_dict()),
    }
    figure = "ema_validation_bits_per_token" if averaged else "validation_bits_per_token"
    held_out = [line[figure] for line in metrics if line.get(figure) is not None]
    rows |= {"held-out bits per token": f"{held_out[-1]:.3f}"} if held_out else {}
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    return "\n".join(lines)


def _command(history: Sequence[dict[str, Any]]) -> str:
    """Return the command that last started a run, in Markdown; a dash if it was not the command line."""
    program, *words = history[-1].get("command", ["–"]) if history else ["–"]
    return f"`{shlex.join(['dpar', *words])}`" if Path(program).stem in ("dpar", "__main__") else "–"
