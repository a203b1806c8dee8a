"""Settings of the commands that train: train-tokenizer, entropy and train."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pipeline.settings.fields import (
    DATA,
    HARDWARE,
    MODEL,
    OPTIM,
    OUTPUT,
    RUN_TIME,
    Attention,
    Classes,
    Compute,
    Device,
    Schedule,
    Seed,
    Split,
    at_least,
    require,
)
from shards.storage import Location


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerSettings:
    """Training a VQ tokenizer."""

    model: Annotated[str, "Preset: vq-16 and vq-8 are LlamaGen's; vq-8-tiny is small.", MODEL] = "vq-8-tiny"
    codebook_size: Annotated[int | None, "Number of codes, V. (default: the preset's)", MODEL] = None
    image_size: Annotated[int, "Pixels along a side of the training crops.", DATA] = 128
    split: Split = None
    classes: Classes = ()
    steps: Annotated[int, "Optimizer steps.", OPTIM] = 2000
    batch: Annotated[int, "Images per step.", OPTIM] = 16
    lr: Annotated[float, "Peak learning rate; a cosine schedule lowers it to a tenth.", OPTIM] = 1e-3
    warmup: Annotated[int, "Steps over which the learning rate rises from 0.", OPTIM] = 50
    commitment_weight: Annotated[float, "Weight of the commitment loss.", OPTIM] = 0.25
    entropy_weight: Annotated[float, "Weight of the codebook's entropy loss; 0 is off.", OPTIM] = 0.0
    perceptual_weight: Annotated[float, "Weight of LPIPS (extra vqgan); 0 is off.", OPTIM] = 0.0
    adversarial_weight: Annotated[float, "Weight of the PatchGAN discriminator; 0 is off.", OPTIM] = 0.0
    adversarial_start: Annotated[int, "First step of the discriminator.", OPTIM] = 1000
    restart_every: Annotated[int, "Steps between restarts of unused codes, in the first half; 0 is never.", OPTIM] = 50
    checkpoint_every: Annotated[int, "Steps between checkpoints.", OUTPUT, RUN_TIME] = 250
    weights_dtype: Annotated[Literal["fp32", "bf16"], "Format of the weights written at the end.", OUTPUT] = "fp32"
    workers: Annotated[int, "Threads that decode images.", HARDWARE, RUN_TIME] = 2
    seed: Annotated[Seed, OPTIM] = 0
    device: Device = "auto"
    precision: Compute = "auto"

    def __post_init__(self) -> None:
        at_least(self, 1, "codebook_size", "image_size", "steps", "batch", "checkpoint_every", "workers")
        at_least(self, 0, "lr", "warmup", "adversarial_start", "restart_every", "seed")
        at_least(self, 0, "commitment_weight", "entropy_weight", "perceptual_weight", "adversarial_weight")


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """How a model is trained; the defaults are the paper's recipe (section 4.1)."""

    steps: Annotated[int | None, "Optimizer steps. (default: --epochs)", OPTIM] = None
    epochs: Annotated[float, "Passes over the data, without --steps.", OPTIM] = 300.0
    batch: Annotated[int, "Images per step, over all processes.", OPTIM] = 256
    micro_batch: Annotated[
        int | None, "Images per forward pass of a process. (default: all of its share)", HARDWARE, RUN_TIME
    ] = None
    lr: Annotated[float, "Learning rate.", OPTIM] = 1e-4
    scale_lr: Annotated[bool, "Multiply the learning rate by batch / 256.", OPTIM] = False
    schedule: Annotated[Schedule, "Learning-rate schedule; cosine falls to a tenth.", OPTIM] = "constant"
    warmup: Annotated[int, "Steps over which the learning rate rises from 0.", OPTIM] = 0
    weight_decay: Annotated[float, "Weight decay, on matrices only.", OPTIM] = 0.05
    beta1: Annotated[float, "β1 of AdamW.", OPTIM] = 0.9
    beta2: Annotated[float, "β2 of AdamW.", OPTIM] = 0.95
    clip: Annotated[float, "Largest gradient norm; 0 is no limit.", OPTIM] = 1.0
    dropout: Annotated[float, "Dropout: in all of LlamaGen; in DPAR's patch transformer and on its input.", OPTIM] = 0.1
    ema: Annotated[float, "Decay of the weights' moving average, such as 0.9999; 0 is none.", OPTIM] = 0.0
    set: Annotated[
        tuple[str, ...],
        "Override a field of the preset's config, such as width=128; repeat for several.",
        MODEL,
    ] = ()
    init: Annotated[str | None, "Weights to start from: a directory, run, Hub name or LlamaGen's .pt file.", MODEL] = (
        None
    )
    validation: Annotated[Location | None, "Held-out artifact for bits per token. (default: none)", DATA, RUN_TIME] = (
        None
    )
    cache: Annotated[
        Path | None,
        "Folder on local disk for the shards of a URL, shared by this machine's processes. (default: a temporary one)",
        DATA,
        RUN_TIME,
    ] = None
    cache_size: Annotated[
        float, "Most GB of shards in --cache; the least recently used are removed.", DATA, RUN_TIME
    ] = 100.0
    eval_every: Annotated[
        int, "Steps between validations and sheets; the last step has them too.", OUTPUT, RUN_TIME
    ] = 2000
    sheet: Annotated[int, "Samples on each sheet; 0 draws none.", OUTPUT, RUN_TIME] = 8
    log_every: Annotated[int, "Steps between lines of metrics.", OUTPUT, RUN_TIME] = 50
    checkpoint_every: Annotated[int, "Steps between checkpoints.", OUTPUT, RUN_TIME] = 2000
    keep: Annotated[int, "Number of newest checkpoints to keep.", OUTPUT, RUN_TIME] = 2
    override: Annotated[bool, "Resume a run with other settings, and record the changes.", OUTPUT, RUN_TIME] = False
    verify: Annotated[bool, "Check the SHA-256 of every input shard before starting.", DATA, RUN_TIME] = True
    attention: Annotated[
        Attention,
        "Attention backend for packed patches; auto is the first of varlen, xformers and sdpa that runs here.",
        HARDWARE,
        RUN_TIME,
    ] = "auto"
    compile: Annotated[bool | None, "Compile the model's layers. (default: on CUDA)", HARDWARE, RUN_TIME] = None
    checkpoint_layers: Annotated[
        bool, "Recompute activations in the backward pass: less memory, a third more compute.", HARDWARE, RUN_TIME
    ] = False
    fsdp: Annotated[
        bool,
        "Shard weights and optimizer state over the processes (FSDP2), for models of XXL size.",
        HARDWARE,
        RUN_TIME,
    ] = False
    tensorboard: Annotated[bool, "Also write metrics to RUN/tensorboard (extra tensorboard).", OUTPUT, RUN_TIME] = False
    wandb: Annotated[bool, "Also send metrics to Weights & Biases (extra wandb).", OUTPUT, RUN_TIME] = False
    seed: Annotated[Seed, OPTIM] = 0
    device: Device = "auto"
    precision: Compute = "auto"

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch", "micro_batch", "eval_every", "log_every", "checkpoint_every", "keep")
        at_least(self, 0, "lr", "warmup", "weight_decay", "beta1", "beta2", "clip", "dropout", "ema", "sheet", "seed")
        require(self.cache_size > 0, f"--cache-size is {self.cache_size}; it must be above 0")
        require(self.epochs > 0, f"--epochs is {self.epochs}; it must be above 0")
        for name in ("beta1", "beta2", "dropout", "ema"):
            require(getattr(self, name) < 1, f"--{name} is {getattr(self, name)}; it must be below 1")


@dataclass(frozen=True, kw_only=True)
class EntropySettings(OptimSettings):
    """Training the entropy model."""

    model: Annotated[str, "LlamaGen preset, trained without classes.", MODEL] = "llamagen-b"
    from_llamagen: Annotated[
        str | None,
        "LlamaGen's c2i_*.pt or a directory of its weights, used without classes instead of training.",
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
            require(not given, f"--from-llamagen trains nothing; omit {', '.join(given)}")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(OptimSettings):
    """Training DPAR or the LlamaGen baseline."""

    model: Annotated[str, "Preset: dpar-… or llamagen-… with tiny, mini, b, l, xl, xxl.", MODEL] = "dpar-b"
    guidance_dropout: Annotated[float, "Probability of dropping the class, for classifier-free guidance.", OPTIM] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.guidance_dropout <= 1, f"--guidance-dropout is {self.guidance_dropout}; it must be in 0 to 1")
