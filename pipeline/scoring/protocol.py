"""``dpar eval --protocol paper``: differences between an evaluation and the paper's.

for line in deviations(settings, generator, comparisons[0].source):
    progress.say(f"not as in the paper: {line}")
"""

from __future__ import annotations

from pipeline.generation.generator import Generator
from pipeline.scoring.reference import ReferenceSource
from pipeline.settings.sampling import PAPER, EvalSettings

CLASSES = 1000  # of ImageNet
SIDES = (256, 384)  # px, of the paper's images


def deviations(settings: EvalSettings, generator: Generator, source: ReferenceSource) -> list[str]:
    """Return a line for each difference between an evaluation and the paper's.

    Args:
        settings: of the evaluation.
        generator: the model.
        source: the reference of the first network.
    """
    s = settings
    lines = [
        f"--{name.replace('_', '-')} is {getattr(s, name)}; the paper's is {value}"
        for name, value in PAPER.items()
        if getattr(s, name) != value
    ]
    changed = [name for name in ("threshold", "max_length", "row_reset") if getattr(s, name) not in ((), None)]
    lines += [f"--{name.replace('_', '-')} changes the patches; the paper's are those of training" for name in changed]
    if source.measured is None:
        what = "an artifact" if source.artifact is not None else "images"
        lines.append(
            f"--reference {s.reference} is {what}; the paper's is ADM's VIRTUAL_imagenet256_labeled.npz with the "
            "statistics stored in it"
        )
    elif source.images is None:
        lines.append(f"--reference {s.reference} has no images; ADM's file has 10,000, for precision and recall")
    if s.network == "inception" and s.inception_weights is not None:
        lines.append(f"Inception's weights are those in {s.inception_weights}; they must be torch-fidelity's published")
    if len(generator.class_names) != CLASSES:
        lines.append(f"the model has {len(generator.class_names)} classes; the paper's have ImageNet's {CLASSES}")
    if generator.image_size not in [(side, side) for side in SIDES]:
        lines.append(f"images have {generator.image_size[0]} px; the paper's have 256 or 384")
    return lines
