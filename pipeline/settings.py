"""Every stage's settings: one frozen dataclass each, checked once, and the one place where a default stands.

The command line makes its options from these fields, a ``--config FILE.toml`` uses their names, and manifests and
runs record them. The strings beside each type are its help and the heading under which ``--help`` lists it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dpar.patching import PatchRule, Strategy
from pipeline.runtime.errors import StageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# The headings, in the order of --help.
GROUPS = ("Data", "Model", "Patches", "Optimisation", "Sampling", "Hardware", "Output")
DATA, MODEL, PATCHES, OPTIM, SAMPLING, HARDWARE, OUTPUT = GROUPS


class RunTime:
    """Marks a field that may change when a stage resumes: it does not decide the result, or what it names does."""


RUN_TIME = RunTime()

Precision = Literal["auto", "bf16", "fp32"]
Views = Literal["center", "flip", "ten-crop"]
Container = Literal["arrow", "webdataset"]
Schedule = Literal["constant", "cosine"]
Attention = Literal["auto", "varlen", "xformers", "flex", "sdpa"]
Features = Literal["tokenizer", "inception"]
PatchRope = Literal["dynamic", "dynamic-compact", "2d"]
GuidanceSchedule = Literal["constant", "linear", "power-cosine"]
Labels = Literal["balanced", "random"]
Device = Annotated[str, "cpu, cuda, cuda:N or mps; auto is CUDA where there is one.", HARDWARE, RUN_TIME]
Compute = Annotated[Precision, "Of the arithmetic; auto is bf16 where the device is faster with it.", HARDWARE]
Seed = Annotated[int, "All randomness comes from it."]
Split = Annotated[
    str | None, "Part of the data: a subfolder such as train or val; train or validation of built-in data.", DATA
]
FetchOriginals = Annotated[
    bool,
    "Fetch originals over the network, where the artifact's manifest says that they are: trust who made it.",
    DATA,
    RUN_TIME,
]
Classes = Annotated[tuple[str, ...], "Only this class; repeat for several. (default: all)", DATA]


def run_time_fields(settings: object) -> frozenset[str]:
    """The names of a settings object's fields that are marked :data:`RUN_TIME`."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    return frozenset(name for name, hint in hints.items() if RUN_TIME in typing.get_args(hint))


def identity(settings: DataclassInstance) -> dict[str, Any]:
    """The fields that decide the result, JSON-able: a stage resumes only under equal ones."""
    free = run_time_fields(settings)
    chosen = {name: value for name, value in dataclasses.asdict(settings).items() if name not in free}
    values: dict[str, Any] = json.loads(json.dumps(chosen, default=str))
    return values


def require(condition: bool, message: str) -> None:
    """Raises StageError with ``message`` unless ``condition``."""
    if not condition:
        raise StageError(message)


LARGEST = 2**31 - 1  # of whole numbers: seeds times steps, and indices, stay below 64 bits
LARGEST_BATCH = 2**16  # of what is held in memory at the same time
BATCHES = ("batch", "micro_batch", "sheet", "workers", "image_size")


def at_least(settings: object, low: float, *names: str) -> None:
    """Raise StageError if one of the named numbers is below ``low``, not finite, or larger than any use of it."""
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            option = "--" + name.replace("_", "-")
            shown = value if isinstance(value, float) or abs(value) < 10**15 else "a number of too many digits"
            require(value >= low and value < math.inf, f"{option} is {shown}; it must be at least {low:g}")
            high = LARGEST_BATCH if name in BATCHES else LARGEST
            require(value <= high or isinstance(value, float), f"{option} is {shown}; it must be at most {high}")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerSettings:
    """Training a VQ tokenizer."""

    model: Annotated[str, "Preset: vq-16 and vq-8 are LlamaGen's; vq-8-tiny is small.", MODEL] = "vq-8-tiny"
    codebook_size: Annotated[int | None, "Codes, V. (default: the preset's)", MODEL] = None
    image_size: Annotated[int, "Pixels along a side of the training crops.", DATA] = 128
    split: Split = None
    classes: Classes = ()
    steps: Annotated[int, "Optimizer steps.", OPTIM] = 2000
    batch: Annotated[int, "Images per step.", OPTIM] = 16
    lr: Annotated[float, "Learning rate; it falls to a tenth along a cosine.", OPTIM] = 1e-3
    warmup: Annotated[int, "Steps over which the learning rate rises from 0.", OPTIM] = 50
    commitment_weight: Annotated[float, "Of the commitment loss.", OPTIM] = 0.25
    entropy_weight: Annotated[float, "Of the codebook's entropy loss; 0 is off.", OPTIM] = 0.0
    perceptual_weight: Annotated[float, "Of LPIPS (extra vqgan); 0 is off.", OPTIM] = 0.0
    adversarial_weight: Annotated[float, "Of the PatchGAN discriminator; 0 is off.", OPTIM] = 0.0
    adversarial_start: Annotated[int, "First step of the discriminator.", OPTIM] = 1000
    restart_every: Annotated[int, "Steps between restarts of unused codes, in the first half; 0 is never.", OPTIM] = 50
    checkpoint_every: Annotated[int, "Steps between checkpoints.", OUTPUT, RUN_TIME] = 250
    weights_dtype: Annotated[Literal["fp32", "bf16"], "Of the weights written at the end.", OUTPUT] = "fp32"
    workers: Annotated[int, "Threads that decode images.", HARDWARE, RUN_TIME] = 2
    seed: Annotated[Seed, OPTIM] = 0
    device: Device = "auto"
    precision: Compute = "auto"

    def __post_init__(self) -> None:
        at_least(self, 1, "codebook_size", "image_size", "steps", "batch", "checkpoint_every", "workers")
        at_least(self, 0, "lr", "warmup", "adversarial_start", "restart_every", "seed")
        at_least(self, 0, "commitment_weight", "entropy_weight", "perceptual_weight", "adversarial_weight")


@dataclass(frozen=True, kw_only=True)
class TokenizeSettings:
    """Images to codes."""

    tokenizer: Annotated[
        str, "Directory, LlamaGen .pt file or Hub name of the VQ tokenizer; builtin:photos ships.", MODEL
    ]
    image_size: Annotated[int, "Pixels along a side.", DATA] = 256
    views: Annotated[Views, "Crops of each image: the centre, it and its mirror image, or ADM's ten.", DATA] = "center"
    crop_range: Annotated[
        tuple[float, ...], "Short side before the crop, as a multiple of the image size; repeat. (default: 1.0)", DATA
    ] = (1.0,)
    container: Annotated[Container, "Format of the shards.", OUTPUT] = "arrow"
    shard_size: Annotated[int, "Images per shard.", OUTPUT] = 4096
    split: Split = None
    classes: Classes = ()
    limit: Annotated[int | None, "At most so many images, spread over the classes. (default: all)", DATA] = None
    holdout: Annotated[
        float | None,
        "Write this share of the images, such as 0.05, to OUT-holdout instead. (default: none)",
        DATA,
        RUN_TIME,
    ] = None
    group_regex: Annotated[
        str | None,
        "Hold out groups of images as a whole: what this matches in a key, or its first group, names the group.",
        DATA,
        RUN_TIME,
    ] = None
    seed: Annotated[int, "Of the choice of held-out images.", DATA, RUN_TIME] = 0
    image_column: Annotated[
        str | None, "Column of the images in Parquet, Arrow and Hub datasets. (default: the only one that fits)", DATA
    ] = None
    label_column: Annotated[
        str | None, "Column of the labels in Parquet, Arrow and Hub datasets. (default: the only one that fits)", DATA
    ] = None
    strict: Annotated[bool, "Stop at the first image that cannot be used.", DATA, RUN_TIME] = False
    batch: Annotated[int, "Crops encoded at once.", HARDWARE] = 32
    workers: Annotated[
        int | None,
        "Threads that decode images. (default: this process's share of the cores, at most 16)",
        HARDWARE,
        RUN_TIME,
    ] = None
    overwrite: Annotated[bool, "Replace an output that other settings made.", OUTPUT, RUN_TIME] = False
    device: Device = "auto"
    precision: Compute = "fp32"

    def __post_init__(self) -> None:
        at_least(self, 1, "image_size", "shard_size", "limit", "batch", "workers")
        at_least(self, 0, "seed")
        if self.holdout is not None:
            require(0 < self.holdout < 1, f"--holdout is {self.holdout}; it must be above 0 and below 1, such as 0.05")
        if self.group_regex is not None:
            require(self.holdout is not None, "--group-regex belongs to --holdout")
            try:
                re.compile(self.group_regex)
            except re.error as error:
                raise StageError(f"--group-regex {self.group_regex!r} is not a regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """How a model is trained; the defaults are the paper's recipe (section 4.1)."""

    steps: Annotated[int | None, "Optimizer steps. (default: --epochs)", OPTIM] = None
    epochs: Annotated[float, "Passes over the data, where --steps is not given.", OPTIM] = 300.0
    batch: Annotated[int, "Images per step, over all processes.", OPTIM] = 256
    micro_batch: Annotated[
        int | None, "Images computed at once in a process. (default: all of its share)", HARDWARE, RUN_TIME
    ] = None
    lr: Annotated[float, "Learning rate.", OPTIM] = 1e-4
    scale_lr: Annotated[bool, "Multiply the learning rate by batch / 256.", OPTIM] = False
    schedule: Annotated[Schedule, "Of the learning rate; cosine falls to a tenth.", OPTIM] = "constant"
    warmup: Annotated[int, "Steps over which the learning rate rises from 0.", OPTIM] = 0
    weight_decay: Annotated[float, "On matrices only.", OPTIM] = 0.05
    beta1: Annotated[float, "AdamW.", OPTIM] = 0.9
    beta2: Annotated[float, "AdamW.", OPTIM] = 0.95
    clip: Annotated[float, "Largest gradient norm; 0 is no limit.", OPTIM] = 1.0
    dropout: Annotated[float, "In LlamaGen everywhere, in DPAR in the patch transformer and on its input.", OPTIM] = 0.1
    ema: Annotated[float, "Decay of the weights' moving average, such as 0.9999; 0 keeps none.", OPTIM] = 0.0
    init: Annotated[str | None, "Weights to start from: a directory, run, Hub name or LlamaGen's .pt file.", MODEL] = (
        None
    )
    validation: Annotated[Path | None, "Held-out artifact for bits per token. (default: none)", DATA, RUN_TIME] = None
    eval_every: Annotated[int, "Steps between validations and sheets; one more comes at the end.", OUTPUT, RUN_TIME] = (
        2000
    )
    sheet: Annotated[int, "Samples on each sheet; 0 draws none.", OUTPUT, RUN_TIME] = 8
    log_every: Annotated[int, "Steps between lines of metrics.", OUTPUT, RUN_TIME] = 50
    checkpoint_every: Annotated[int, "Steps between checkpoints.", OUTPUT, RUN_TIME] = 2000
    keep: Annotated[int, "Newest checkpoints kept.", OUTPUT, RUN_TIME] = 2
    override: Annotated[bool, "Go on with a run under other settings, and record which.", OUTPUT, RUN_TIME] = False
    verify: Annotated[bool, "Check the SHA-256 of every input shard before starting.", DATA, RUN_TIME] = True
    attention: Annotated[
        Attention,
        "How packed patches attend; auto is the first of varlen, xformers and sdpa that runs here.",
        HARDWARE,
        RUN_TIME,
    ] = "auto"
    compile: Annotated[bool | None, "Compile the model's layers. (default: on CUDA)", HARDWARE, RUN_TIME] = None
    checkpoint_layers: Annotated[
        bool, "Keep no activations inside layers: less memory, a third more compute.", HARDWARE, RUN_TIME
    ] = False
    fsdp: Annotated[
        bool, "Share weights and optimizer over the processes (FSDP2), for models of XXL size.", HARDWARE, RUN_TIME
    ] = False
    tensorboard: Annotated[bool, "Metrics to RUN/tensorboard, too (extra tensorboard).", OUTPUT, RUN_TIME] = False
    wandb: Annotated[bool, "Metrics to Weights & Biases, too (extra wandb).", OUTPUT, RUN_TIME] = False
    seed: Annotated[Seed, OPTIM] = 0
    device: Device = "auto"
    precision: Compute = "auto"

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch", "micro_batch", "eval_every", "log_every", "checkpoint_every", "keep")
        at_least(self, 0, "lr", "warmup", "weight_decay", "beta1", "beta2", "clip", "dropout", "ema", "sheet", "seed")
        require(self.epochs > 0, f"--epochs is {self.epochs}; it must be above 0")
        for name in ("beta1", "beta2", "dropout", "ema"):
            require(getattr(self, name) < 1, f"--{name} is {getattr(self, name)}; it must be under 1")


@dataclass(frozen=True, kw_only=True)
class EntropySettings(OptimSettings):
    """Training the entropy model."""

    model: Annotated[str, "Preset of LlamaGen's family, trained without classes.", MODEL] = "llamagen-b"
    from_llamagen: Annotated[
        str | None,
        "LlamaGen's c2i_*.pt (or a directory of it), read without classes in place of training.",
        MODEL,
        RUN_TIME,
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.from_llamagen is not None:
            given = [
                "--" + field.name.replace("_", "-")
                for field in dataclasses.fields(self)
                if field.name not in ("from_llamagen", "device", "precision")
                and getattr(self, field.name) != field.default
            ]
            require(not given, f"--from-llamagen trains nothing; leave out {', '.join(given)}")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(OptimSettings):
    """Training DPAR or the LlamaGen baseline."""

    model: Annotated[str, "Preset: dpar-… or llamagen-… with tiny, mini, b, l, xl, xxl.", MODEL] = "dpar-b"
    guidance_dropout: Annotated[float, "How often the class is left out, for classifier-free guidance.", OPTIM] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.guidance_dropout <= 1, f"--guidance-dropout is {self.guidance_dropout}; it must be in 0 to 1")


@dataclass(frozen=True, kw_only=True)
class PatchifySettings:
    """Codes to patches."""

    entropy_model: Annotated[
        str | None, "Run or weights of the entropy model; not needed on a patches directory.", MODEL
    ] = None
    threshold: Annotated[
        float | None,
        "τ, nats: a token with entropy above it starts a patch. Entropies reach from 0 to ln V (9.70 for 16384 codes, "
        "6.93 for 1024); the published 7.8 is 0.80·ln V of its tokenizer. Small codebooks need --target-length.",
        PATCHES,
    ] = None
    target_length: Annotated[float | None, "Mean patch length wanted, such as 1.81; finds the threshold.", PATCHES] = (
        None
    )
    max_length: Annotated[int, "P: most tokens in a patch; 0 is no limit.", PATCHES] = 4
    row_reset: Annotated[bool, "Each row of the grid starts a patch.", PATCHES] = True
    strategy: Annotated[Strategy, "entropy: the paper's rule; static: one fixed length, --static-length.", PATCHES] = (
        "entropy"
    )
    static_length: Annotated[float | None, "Patch length of the static strategy; may be fractional.", PATCHES] = None
    container: Annotated[Container | None, "Format of the shards. (default: as the input's)", OUTPUT] = None
    sample: Annotated[int, "Images on which --target-length looks for its threshold.", PATCHES] = 4096
    batch: Annotated[int, "Sequences in one pass of the entropy model.", HARDWARE] = 32
    compare: Annotated[
        tuple[str, str] | None,
        "Two entropy models: say how alike they cut a sample of the images; write no patches.",
        MODEL,
    ] = None
    verify: Annotated[bool, "Check the SHA-256 of every input shard before starting.", DATA] = True
    overwrite: Annotated[bool, "Replace an output that other settings made.", OUTPUT] = False
    device: Device = "auto"
    precision: Compute = "auto"

    def __post_init__(self) -> None:
        at_least(self, 1, "target_length", "static_length", "sample", "batch")
        at_least(self, 0, "max_length", "threshold")
        if self.compare is not None:
            require(self.entropy_model is None, "--compare names both entropy models; leave --entropy-model out")
            require(self.strategy == "entropy", "--compare is of entropies; leave --strategy static out")
        if self.strategy == "static":
            require(self.static_length is not None, "--strategy static needs --static-length")
            require(
                self.threshold is None and self.target_length is None,
                "--strategy static takes no --threshold or --target-length; its length is --static-length",
            )
        else:
            require(self.static_length is None, "--static-length belongs to --strategy static")
            require(
                (self.threshold is None) != (self.target_length is None),
                "give one of --threshold (nats) and --target-length (tokens per patch)",
            )

    @property
    def rule(self) -> PatchRule:
        """The patch rule; without a threshold if that is still to be found."""
        if self.static_length is not None:
            return PatchRule.static(self.static_length)
        return PatchRule(threshold=self.threshold, max_length=self.max_length or None, row_reset=self.row_reset)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """What sampling needs wherever it happens."""

    cfg_schedule: Annotated[
        GuidanceSchedule,
        "Of the guidance over the tokens; linear and power-cosine rise from none to --cfg-scale.",
        SAMPLING,
    ] = "constant"
    cfg_power: Annotated[float, "Of power-cosine; higher guides later.", SAMPLING] = 1.0
    temperature: Annotated[float, "Of the logits; 0 takes the likeliest token.", SAMPLING] = 1.0
    top_k: Annotated[int, "Only the k likeliest tokens; 0 is all.", SAMPLING] = 0
    top_p: Annotated[float, "Only the likeliest tokens that together have this probability.", SAMPLING] = 1.0
    labels: Annotated[Labels, "Classes of a number of images: all alike, or drawn at random (seeded).", SAMPLING] = (
        "balanced"
    )
    row_reset: Annotated[bool | None, "Each row starts a patch. (default: as in the training data)", PATCHES] = None
    seed: Annotated[Seed, SAMPLING] = 0
    batch: Annotated[int, "Images sampled at once; at most a shard.", HARDWARE, RUN_TIME] = 32
    shard_size: Annotated[int, "Images a shard of the sampled codes: what a kill can lose.", OUTPUT, RUN_TIME] = 128
    tokenizer: Annotated[str | None, "Its weights. (default: those that made the codes)", MODEL, RUN_TIME] = None
    entropy_model: Annotated[str | None, "Its weights. (default: those that made the patches)", MODEL, RUN_TIME] = None
    device: Device = "auto"
    precision: Compute = "auto"
    decode_precision: Annotated[Precision, "Of decoding codes to pictures.", HARDWARE] = "fp32"

    def __post_init__(self) -> None:
        at_least(self, 0, "temperature", "top_k", "seed", "cfg_power")
        at_least(self, 1, "batch", "shard_size")
        require(0 < self.top_p <= 1, f"--top-p is {self.top_p}; it must be above 0 and at most 1")


def check_cfg_scale(scale: float) -> None:
    """Raises StageError unless guidance of this scale means something."""
    require(math.isfinite(scale) and scale >= 0, f"--cfg-scale is {scale}; it must be above 0")
    require(scale > 0, "--cfg-scale is 0, which leaves the class out altogether; 1 is no guidance")


@dataclass(frozen=True, kw_only=True)
class SampleSettings(SamplingSettings):
    """Sampling pictures."""

    cfg_scale: Annotated[float, "Classifier-free guidance s: logits = u + s·(c - u); 1 is none.", SAMPLING] = 2.0
    threshold: Annotated[float | None, "τ, nats. (default: the training data's)", PATCHES] = None
    max_length: Annotated[int | None, "P; 0 is no limit. (default: the training data's)", PATCHES] = None
    classes: Annotated[
        tuple[str, ...], "Only this class, by name or number; repeat for several. (default: all)", SAMPLING
    ] = ()
    per_class: Annotated[int | None, "Images of each class. (default: 4)", SAMPLING] = None
    count: Annotated[
        int | None, "Images in all, in place of --per-class; --labels says of which classes.", SAMPLING
    ] = None
    image: Annotated[
        Path | None, "Keep a part of this image and sample the rest, with --mask or --keep-rows.", SAMPLING
    ] = None
    mask: Annotated[Path | None, "Image of the same size: white is sampled anew.", SAMPLING] = None
    keep_rows: Annotated[int | None, "Rows of tokens kept, from the top.", SAMPLING] = None
    show_patches: Annotated[bool, "Draw the patches on the images of the sheet.", OUTPUT] = False
    png: Annotated[bool, "Write each picture as a PNG file.", OUTPUT] = True
    npz: Annotated[bool, "Write samples.npz as ADM's evaluation suite reads it.", OUTPUT] = False
    overwrite: Annotated[bool, "Replace an output that other settings made.", OUTPUT] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cfg_scale(self.cfg_scale)
        at_least(self, 0, "threshold", "max_length")
        at_least(self, 1, "per_class", "count", "keep_rows")
        require(self.count is None or self.per_class is None, "give one of --per-class and --count")
        require(self.labels == "balanced" or self.count is not None, "--labels random needs --count")
        kept = (self.mask is not None) + (self.keep_rows is not None)
        if self.image is None:
            require(kept == 0, "--mask and --keep-rows belong to --image")
        else:
            require(kept == 1, "--image needs one of --mask and --keep-rows")
            require(len(self.classes) == 1, "--image needs one --classes: the class of what is sampled")


@dataclass(frozen=True, kw_only=True)
class EvalSettings(SamplingSettings):
    """Scoring a run."""

    reference: Annotated[
        Path,
        "What samples are held against: an artifact, a folder of images, or an .npz of images or statistics.",
        DATA,
        RUN_TIME,
    ]
    held_out: Annotated[
        Path | None,
        "Held-out artifact for bits per token: patches for DPAR; codes will do for LlamaGen. "
        "(default: the reference, where it is one)",
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
        tuple[float, ...], "Guidance to sample at; repeat for a table. (default: 1.0 and 2.0)", SAMPLING, RUN_TIME
    ] = (
        1.0,
        2.0,
    )
    threshold: Annotated[
        tuple[float, ...], "τ, nats; repeat for a table. (default: the training data's)", PATCHES, RUN_TIME
    ] = ()
    max_length: Annotated[
        tuple[int, ...], "P, 0 is no limit; repeat for a table. (default: the training data's)", PATCHES, RUN_TIME
    ] = ()
    labels: Annotated[
        Labels, "Classes of the samples: drawn at random (seeded), as in the paper, or all alike.", SAMPLING
    ] = "random"
    samples: Annotated[int, "Images sampled for each cell of the table; 0 samples none.", SAMPLING] = 1000
    features: Annotated[
        Features,
        "Of the distance between samples and reference: inception is FID and needs torch-fidelity (extra eval).",
        OUTPUT,
    ] = "tokenizer"
    inception_weights: Annotated[
        Path | None, "File of Inception's weights. (default: torch-fidelity fetches them)", OUTPUT, RUN_TIME
    ] = None
    save_reference: Annotated[
        Path | None, "Write the reference's statistics to this .npz, to be a --reference.", OUTPUT, RUN_TIME
    ] = None
    sheet_per_class: Annotated[int, "Samples of each class on the sheets.", OUTPUT, RUN_TIME] = 4
    fetch_originals: FetchOriginals = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for scale in self.cfg_scale:
            check_cfg_scale(scale)
        for threshold in self.threshold:
            require(math.isfinite(threshold) and threshold >= 0, f"--threshold is {threshold}; it must be at least 0")
        for length in self.max_length:
            require(length >= 0, f"--max-length is {length}; it must be at least 0 (0 is no limit)")
        at_least(self, 0, "samples")
        at_least(self, 1, "sheet_per_class")
        require(self.samples != 1, "--samples is 1; a distance needs at least 2 images (0 samples none)")
        if self.save_reference is not None:
            require(
                self.save_reference.suffix == ".npz" and not self.save_reference.is_dir(),
                f"--save-reference is '{self.save_reference}'; it must be a file that ends in .npz",
            )


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """A linear classifier on a frozen model's features."""

    train: Annotated[Path, "Artifact to fit the classifier on: patches for DPAR; codes will do for LlamaGen.", DATA]
    test: Annotated[Path, "Artifact to count its hits on.", DATA]
    layer: Annotated[int | None, "Layer whose outputs are the features, from 1. (default: the last)", MODEL] = None
    weight_decay: Annotated[float, "Of the classifier's matrix: added to the loss as half of it times |W|².", OPTIM] = (
        1e-4
    )
    iterations: Annotated[int, "Of L-BFGS, at most.", OPTIM] = 200
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
    codebook_size: Annotated[int, "Codes, V.", MODEL] = 16384
    classes: Annotated[int, "Classes.", MODEL] = 1000

    def __post_init__(self) -> None:
        require(
            self.entropy_model.startswith("llamagen-"),
            f"--entropy-model is {self.entropy_model!r}; the entropy model is of LlamaGen's family: llamagen-…",
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

    heads: Annotated[int | None, "Attention heads, if SRC does not say.", MODEL] = None
    grid: Annotated[tuple[int, int] | None, "Rows and columns of tokens, if SRC does not say.", MODEL] = None
    rope: Annotated[
        PatchRope | None, "Rotary positions of DPAR's patches, if SRC does not say. (default: dynamic)", MODEL
    ] = None

    push_to: Annotated[str | None, "Upload DST to this repository of the Hugging Face Hub, owner/name.", OUTPUT] = None


@dataclass(frozen=True, kw_only=True)
class ExportSettings(SamplingSettings):
    """Writing a bundle."""

    cfg_scale: Annotated[float, "Guidance of the sample pictures.", SAMPLING] = 2.0
    samples: Annotated[int, "Sample pictures on the model card; 0 draws none.", OUTPUT] = 8
    ema: Annotated[bool, "Take the moving average of the weights, where the run has one.", MODEL] = True
    weights_dtype: Annotated[Literal["fp32", "bf16"], "Of the weights written.", OUTPUT] = "fp32"
    title: Annotated[str | None, "Of the model card. (default: the run's name)", OUTPUT] = None
    note: Annotated[str, "A paragraph for the model card.", OUTPUT] = ""
    share_with: Annotated[
        str | None, "A bundle that ships, builtin:…: parts that are the same are named there, not copied.", OUTPUT
    ] = None
    push_to: Annotated[str | None, "Upload to this repository of the Hugging Face Hub, owner/name.", OUTPUT] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cfg_scale(self.cfg_scale)
        at_least(self, 0, "samples")


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """Looking into an artifact."""

    images: Annotated[int, "Images drawn, spread over the classes; 0 draws none and needs no tokenizer.", DATA] = 8
    classes: Annotated[tuple[str, ...], "Draw images of this class; repeat for several. (default: all)", DATA] = ()
    keys: Annotated[tuple[str, ...], "Draw the image of this key; repeat for several.", DATA] = ()
    threshold: Annotated[tuple[float, ...], "τ, nats: patches at this threshold too; repeat for several.", PATCHES] = ()
    tokenizer: Annotated[str | None, "Weights to decode with. (default: those that made the codes)", MODEL] = None
    fetch_originals: FetchOriginals = False
    verify: Annotated[bool, "Check the SHA-256 of every shard.", DATA] = False
    batch: Annotated[int, "Images decoded at once.", HARDWARE] = 32
    device: Device = "auto"

    def __post_init__(self) -> None:
        at_least(self, 0, "images")
        at_least(self, 1, "batch")
        for threshold in self.threshold:
            require(threshold >= 0, f"--threshold is {threshold}; it must be at least 0")
