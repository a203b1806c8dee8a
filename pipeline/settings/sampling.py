"""Settings of the commands that sample from a run: sample and eval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pipeline.settings.engine import EngineSettings
from pipeline.settings.fields import (
    DATA,
    HARDWARE,
    MODEL,
    OUTPUT,
    PATCHES,
    RUN_TIME,
    SAMPLING,
    Compute,
    Device,
    Features,
    FetchOriginals,
    GuidanceSchedule,
    Labels,
    Precision,
    Protocol,
    ScoredLabels,
    Seed,
    at_least,
    require,
)
from shards.storage import Location

SCORING_BATCH = 32
# Fixed by `dpar eval --protocol paper`: section 4 of the paper, and LlamaGen's evaluation, which it follows.
PAPER = {
    "features": "inception",
    "samples": 50_000,
    "labels": "random",
    "decode_precision": "fp32",
    "cfg_schedule": "constant",
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Settings shared by all commands that sample."""

    cfg_schedule: Annotated[
        GuidanceSchedule,
        "Guidance schedule over the tokens; linear and power-cosine rise from none to --cfg-scale.",
        SAMPLING,
    ] = "constant"
    cfg_power: Annotated[float, "Power of power-cosine; higher values guide later.", SAMPLING] = 1.0
    temperature: Annotated[float, "Temperature of the logits; 0 takes the likeliest token.", SAMPLING] = 1.0
    top_k: Annotated[int, "Sample from the k likeliest tokens; 0 is all.", SAMPLING] = 0
    top_p: Annotated[float, "Sample from the likeliest tokens that together have this probability.", SAMPLING] = 1.0
    row_reset: Annotated[bool | None, "Each row starts a patch. (default: as in the training data)", PATCHES] = None
    seed: Annotated[Seed, SAMPLING] = 0
    batch: Annotated[
        int | None,
        "Images sampled at once, at most a shard. (default: as many as fit in GPU memory, at most 256; 32 on CPU)",
        HARDWARE,
        RUN_TIME,
    ] = None
    shard_size: Annotated[int, "Images per shard of sampled codes: the most that a kill loses.", OUTPUT, RUN_TIME] = 128
    tokenizer: Annotated[
        str | None, "Weights of the tokenizer. (default: those recorded by the run)", MODEL, RUN_TIME
    ] = None
    entropy_model: Annotated[
        str | None, "Weights of the entropy model. (default: those recorded by the run)", MODEL, RUN_TIME
    ] = None
    device: Device = "auto"
    precision: Compute = "auto"
    decode_precision: Annotated[Precision, "Precision of decoding codes to pictures.", HARDWARE] = "fp32"

    @property
    def scoring_batch(self) -> int:
        """Images per forward pass of the networks that score them."""
        return self.batch or SCORING_BATCH

    def __post_init__(self) -> None:
        at_least(self, 0, "temperature", "top_k", "seed", "cfg_power")
        at_least(self, 1, "batch", "shard_size")
        require(0 < self.top_p <= 1, f"--top-p is {self.top_p}; it must be above 0 and at most 1")


def check_cfg_scale(scale: float) -> None:
    """Raise StageError unless the guidance scale is valid."""
    require(math.isfinite(scale) and scale >= 0, f"--cfg-scale is {scale}; it must be above 0")
    require(scale > 0, "--cfg-scale is 0, which ignores the class; 1 is no guidance")


@dataclass(frozen=True, kw_only=True)
class SampleSettings(SamplingSettings, EngineSettings):
    """Sampling pictures."""

    cfg_scale: Annotated[float, "Classifier-free guidance s: logits = u + s·(c - u); 1 is none.", SAMPLING] = 2.0
    threshold: Annotated[float | None, "τ, nats. (default: as in the training data)", PATCHES] = None
    max_length: Annotated[int | None, "P; 0 is no limit. (default: as in the training data)", PATCHES] = None
    classes: Annotated[
        tuple[str, ...], "Only this class, by name or number; repeat for several. (default: all)", SAMPLING
    ] = ()
    per_class: Annotated[int | None, "Images of each class. (default: 4)", SAMPLING] = None
    count: Annotated[
        int | None, "Total number of images, instead of --per-class; --labels chooses their classes.", SAMPLING
    ] = None
    labels: Annotated[Labels, "Classes for --count: equal numbers, or drawn at random (seeded).", SAMPLING] = "balanced"
    image: Annotated[
        Path | None, "Keep a part of this image and sample the rest, with --mask or --keep-rows.", SAMPLING
    ] = None
    mask: Annotated[Path | None, "Image of the same size; white parts are sampled.", SAMPLING] = None
    keep_rows: Annotated[int | None, "Rows of tokens to keep, from the top.", SAMPLING] = None
    show_patches: Annotated[bool, "Draw the patches on the images of the sheet.", OUTPUT] = False
    show_nearest: Annotated[
        Location | None, "Training artifact: put the nearest training image below each sample, in nearest.png.", OUTPUT
    ] = None
    png: Annotated[bool, "Write each picture as a PNG file.", OUTPUT] = True
    npz: Annotated[bool, "Write samples.npz in the format of ADM's evaluation suite.", OUTPUT] = False
    overwrite: Annotated[bool, "Replace an output made with other settings.", OUTPUT] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_engine()
        check_cfg_scale(self.cfg_scale)
        at_least(self, 0, "threshold", "max_length")
        at_least(self, 1, "per_class", "count", "keep_rows")
        require(self.count is None or self.per_class is None, "give one of --per-class and --count")
        require(self.labels == "balanced" or self.count is not None, "--labels random needs --count")
        kept = (self.mask is not None) + (self.keep_rows is not None)
        if self.image is None:
            require(kept == 0, "--mask and --keep-rows need --image")
        else:
            require(kept == 1, "--image needs one of --mask and --keep-rows")
            require(len(self.classes) == 1, "--image needs one --classes: the class of the sampled part")


@dataclass(frozen=True, kw_only=True)
class EvalSettings(SamplingSettings, EngineSettings):
    """Scoring a run."""

    reference: Annotated[
        Location,
        "What samples are compared with: an artifact, a folder of images, or an .npz of images or statistics.",
        DATA,
        RUN_TIME,
    ]
    held_out: Annotated[
        Location | None,
        "Held-out artifact for bits per token: patches for DPAR; codes or patches for LlamaGen. "
        "(default: the reference, if it is an artifact)",
        DATA,
        RUN_TIME,
    ] = None
    checkpoint: Annotated[
        tuple[str, ...],
        "One of the run's checkpoints, step-00001234, or other weights; repeat. (default: the newest)",
        MODEL,
        RUN_TIME,
    ] = ()
    cfg_scale: Annotated[
        tuple[float, ...], "Guidance scale; repeat for a table. (default: 1.0 and 2.0)", SAMPLING, RUN_TIME
    ] = (
        1.0,
        2.0,
    )
    threshold: Annotated[
        tuple[float, ...], "τ, nats; repeat for a table. (default: as in the training data)", PATCHES, RUN_TIME
    ] = ()
    max_length: Annotated[
        tuple[int, ...], "P, 0 is no limit; repeat for a table. (default: as in the training data)", PATCHES, RUN_TIME
    ] = ()
    labels: Annotated[
        ScoredLabels,
        "Classes of the samples: drawn at random (seeded), as in the paper; balanced; or in the proportions of the "
        "reference's images.",
        SAMPLING,
    ] = "random"
    samples: Annotated[
        int | None,
        "Images sampled for each cell of the table; 0 samples none. (default: 1000; 50000 with --protocol paper)",
        SAMPLING,
    ] = None
    features: Annotated[
        Features | None,
        "Features for the distance between samples and reference: inception gives FID; efficientnet is "
        "EfficientNet-Lite0, whose weights are in a package (both need extra eval). "
        "(default: tokenizer; inception with --protocol paper)",
        OUTPUT,
    ] = None
    protocol: Annotated[
        Protocol | None,
        "paper: number of samples, features, labels and decoding as in the paper; every deviation is printed.",
        OUTPUT,
        RUN_TIME,
    ] = None
    dinov2_weights: Annotated[
        Path | None,
        "File of DINOv2's weights, dinov2_vitl14_pretrain.pth: adds FD-DINOv2 to the scores (extra eval).",
        OUTPUT,
        RUN_TIME,
    ] = None
    bootstrap: Annotated[
        int | None,
        "Resamples for confidence intervals; 0 is none. (default: 1000 for bits per token; 100 for distances, 20 with "
        "more than 10000 images)",
        OUTPUT,
    ] = None
    training: Annotated[
        Location | None,
        "Training artifact for the sheet of nearest training images. (default: the one recorded by the run)",
        DATA,
        RUN_TIME,
    ] = None
    inception_weights: Annotated[
        Path | None, "File of Inception's weights. (default: torch-fidelity downloads them)", OUTPUT, RUN_TIME
    ] = None
    floor: Annotated[
        Location | None,
        "A second set of real images, an artifact or a folder, such as training images. Its distance to the reference "
        "is the best that samples can be expected to reach. As many images as --samples, evenly spread.",
        DATA,
        RUN_TIME,
    ] = None
    save_reference: Annotated[
        Path | None, "Write the reference's statistics to this .npz, for use as --reference.", OUTPUT, RUN_TIME
    ] = None
    sheet_per_class: Annotated[int, "Samples of each class on the sheets.", OUTPUT, RUN_TIME] = 4
    fetch_originals: FetchOriginals = False

    @property
    def images(self) -> int:
        """``samples``, which is not None after validation."""
        assert self.samples is not None
        return self.samples

    @property
    def network(self) -> Features:
        """``features``, which is not None after validation."""
        assert self.features is not None
        return self.features

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_engine()
        paper = self.protocol == "paper"
        for name, other in (("samples", 1000), ("features", "tokenizer")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, PAPER[name] if paper else other)
        for scale in self.cfg_scale:
            check_cfg_scale(scale)
        for threshold in self.threshold:
            require(math.isfinite(threshold) and threshold >= 0, f"--threshold is {threshold}; it must be at least 0")
        for length in self.max_length:
            require(length >= 0, f"--max-length is {length}; it must be at least 0 (0 is no limit)")
        at_least(self, 0, "samples", "bootstrap")
        at_least(self, 1, "sheet_per_class")
        require(self.bootstrap != 1, "--bootstrap is 1; intervals need at least 2 resamples (0: no intervals)")
        require(self.samples != 1, "--samples is 1; a distance needs at least 2 images (0 samples none)")
        if self.save_reference is not None:
            require(
                self.save_reference.suffix == ".npz" and not self.save_reference.is_dir(),
                f"--save-reference is '{self.save_reference}'; it must be a file that ends in .npz",
            )


@dataclass(frozen=True, kw_only=True)
class ExportSettings(SamplingSettings):
    """Writing a bundle."""

    cfg_scale: Annotated[float, "Guidance of the sample pictures.", SAMPLING] = 2.0
    samples: Annotated[int, "Sample pictures on the model card; 0 draws none.", OUTPUT] = 8
    ema: Annotated[bool, "Use the moving average of the weights, if the run has one.", MODEL] = True
    weights_dtype: Annotated[Literal["fp32", "bf16"], "Format of the written weights.", OUTPUT] = "fp32"
    title: Annotated[str | None, "Title of the model card. (default: the run's name)", OUTPUT] = None
    note: Annotated[str, "A paragraph for the model card.", OUTPUT] = ""
    push_to: Annotated[str | None, "Upload to this repository of the Hugging Face Hub, owner/name.", OUTPUT] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cfg_scale(self.cfg_scale)
        at_least(self, 0, "samples")
