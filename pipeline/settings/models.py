"""Settings of the commands that only concern a model: probe, flops and convert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pipeline.settings.fields import (
    DATA,
    HARDWARE,
    MODEL,
    OPTIM,
    OUTPUT,
    Compute,
    Device,
    PatchRope,
    at_least,
    require,
)
from shards.storage import Location


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """A linear classifier on a frozen model's features."""

    train: Annotated[
        Location, "Artifact to fit the classifier on: patches for DPAR; codes or patches for LlamaGen.", DATA
    ]
    test: Annotated[Location, "Artifact to measure its accuracy on.", DATA]
    layer: Annotated[int | None, "Layer whose outputs are the features, from 1. (default: the last)", MODEL] = None
    weight_decay: Annotated[
        float, "Weight decay of the classifier: adds weight_decay / 2 · |W|² to the loss.", OPTIM
    ] = 1e-4
    iterations: Annotated[int, "Most iterations of L-BFGS.", OPTIM] = 200
    batch: Annotated[int, "Images in one pass of the model.", HARDWARE] = 32
    device: Device = "auto"
    precision: Compute = "auto"

    def __post_init__(self) -> None:
        at_least(self, 1, "layer", "iterations", "batch")
        at_least(self, 0, "weight_decay")


@dataclass(frozen=True, kw_only=True)
class FlopsSettings:
    """The cost table."""

    model: Annotated[tuple[str, ...], "Preset; repeat for several. (default: all but tiny)", MODEL] = ()
    image_size: Annotated[tuple[int, ...], "Pixels along a side; repeat. (default: 256 and 384)", DATA] = (256, 384)
    patch_length: Annotated[
        float | None, "Mean tokens per patch. (default: the paper's, 1.81 at 256 and 2.06 at 384)", DATA
    ] = None
    entropy_model: Annotated[str, "Preset of the entropy model that DPAR samples with.", MODEL] = "llamagen-b"
    downsampling: Annotated[int, "Pixels along a side of a token.", MODEL] = 16
    codebook_size: Annotated[int, "Number of codes, V.", MODEL] = 16384
    classes: Annotated[int, "Number of classes.", MODEL] = 1000

    def __post_init__(self) -> None:
        require(
            self.entropy_model.startswith("llamagen-"),
            f"--entropy-model is {self.entropy_model!r}; the entropy model must be a LlamaGen: llamagen-…",
        )
        at_least(self, 1, "patch_length", "downsampling", "codebook_size")
        at_least(self, 0, "classes")
        for size in self.image_size:
            require(
                size > 0 and size % self.downsampling == 0,
                f"--image-size is {size}; it must be a multiple of --downsampling, {self.downsampling}",
            )


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Converting weights."""

    heads: Annotated[int | None, "Attention heads, if not recorded in SRC.", MODEL] = None
    grid: Annotated[tuple[int, int] | None, "Rows and columns of tokens, if not recorded in SRC.", MODEL] = None
    rope: Annotated[
        PatchRope | None, "Rotary positions of DPAR's patches, if not recorded in SRC. (default: dynamic)", MODEL
    ] = None

    push_to: Annotated[str | None, "Upload DST to this repository of the Hugging Face Hub, owner/name.", OUTPUT] = None
