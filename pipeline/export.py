"""``dpar export RUN DIR``: a run with all that sampling from it needs, as one directory (:mod:`dpar.bundle`).

exported = export(Path("run"), Path("bundle"), ExportSettings(push_to="you/dpar-emoji"))
pipe = DPARPipeline.from_pretrained("bundle")
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dpar.bundle import BUNDLE, Bundle, Part, PartOrigin
from dpar.model import DPAR
from dpar.pretrained import CARD, bundle_folder, fingerprint
from pipeline.generation.generator import Generator, run_of
from pipeline.generation.hub import push
from pipeline.reports.pictures import draw_patches, enlarge, sheet
from pipeline.runs.run_folder import read_metrics, read_run
from pipeline.runtime.errors import StageError
from pipeline.runtime.progress import Progress
from pipeline.settings import ExportSettings

SAMPLES = "samples.webp"  # the pictures of the model card
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
        run: a run of ``dpar train``; its moving average is taken where it has one, unless ``settings.ema`` is off.
        out: a new directory, or the bundle of this run, which is written again.
        settings: see :class:`ExportSettings`.
        progress: where to report.

    Raises:
        StageError, ModelError: run, output or repository cannot be used.
    """
    progress = progress or Progress()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / BUNDLE).is_file())):
        raise StageError(f"{out} holds something else; name a new directory")
    if run_of(run) != run or bundle_folder(run) is not None:
        raise StageError(f"{run} is not a run of `dpar train`; name one")
    averaged = settings.ema and (run / EMA).is_dir()
    generator = Generator.load(run, settings, weights=str(run / EMA) if averaged else None)
    dtype = DTYPES[settings.weights_dtype]

    (out / BUNDLE).unlink(missing_ok=True)  # last to be written, so that no half of a bundle is taken for one
    models = {"generator": generator.model, "entropy_model": generator.entropy_model, "tokenizer": generator.tokenizer}
    parts: dict[Part, PartOrigin] = {}
    for part, model in models.items():
        name = part  # type: Part  # type: ignore[assignment]
        if model is None:
            continue
        if settings.share_with is not None and (shared := _shared(settings.share_with, name, generator)) is not None:
            parts[name] = shared
            shutil.rmtree(out / part, ignore_errors=True)
            continue
        model.save_pretrained(out / part, dtype=dtype)
        parts[name] = PartOrigin(path=part, fingerprint=fingerprint(out / part))
    bundle = Bundle(class_names=generator.class_names, parts=parts, rule=generator.trained_rule)

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
