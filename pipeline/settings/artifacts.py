"""Settings of the commands that write and read artifacts: tokenize, patchify and inspect."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from dpar.patching import PatchRule, Strategy
from pipeline.runtime.errors import StageError
from pipeline.settings.engine import EngineSettings
from pipeline.settings.fields import (
    DATA,
    HARDWARE,
    MODEL,
    OUTPUT,
    PATCHES,
    RUN_TIME,
    Classes,
    Compute,
    Container,
    Device,
    FetchOriginals,
    Split,
    Views,
    at_least,
    require,
)


@dataclass(frozen=True, kw_only=True)
class TokenizeSettings(EngineSettings):
    """Images to codes."""

    tokenizer: Annotated[str, "Directory, LlamaGen .pt file or Hub name of the VQ tokenizer; or builtin:photos.", MODEL]
    image_size: Annotated[int, "Pixels along a side.", DATA] = 256
    views: Annotated[Views, "Crops per image: the centre; it and its mirror image; or ADM's ten.", DATA] = "center"
    crop_range: Annotated[
        tuple[float, ...], "Short side before the crop, as a multiple of the image size; repeat. (default: 1.0)", DATA
    ] = (1.0,)
    container: Annotated[Container, "Format of the shards.", OUTPUT] = "arrow"
    shard_size: Annotated[int, "Images per shard.", OUTPUT] = 4096
    split: Split = None
    classes: Classes = ()
    limit: Annotated[int | None, "Use at most this many images, spread over the classes. (default: all)", DATA] = None
    holdout: Annotated[
        float | None,
        "Write this share of the images, such as 0.05, to OUT-holdout instead. (default: none)",
        DATA,
        RUN_TIME,
    ] = None
    group_regex: Annotated[
        str | None,
        "Keep images of a group together when holding out; a group is what this matches in the key.",
        DATA,
        RUN_TIME,
    ] = None
    seed: Annotated[int, "Seed of the choice of held-out images.", DATA, RUN_TIME] = 0
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
    overwrite: Annotated[bool, "Replace an output made with other settings.", OUTPUT, RUN_TIME] = False
    device: Device = "auto"
    precision: Compute = "fp32"

    def __post_init__(self) -> None:
        self.check_engine()
        at_least(self, 1, "image_size", "shard_size", "limit", "batch", "workers")
        at_least(self, 0, "seed")
        if self.holdout is not None:
            require(0 < self.holdout < 1, f"--holdout is {self.holdout}; it must be above 0 and below 1, such as 0.05")
        if self.group_regex is not None:
            require(self.holdout is not None, "--group-regex needs --holdout")
            try:
                re.compile(self.group_regex)
            except re.error as error:
                raise StageError(f"--group-regex {self.group_regex!r} is not a regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True)
class PatchifySettings(EngineSettings):
    """Codes to patches."""

    entropy_model: Annotated[
        str | None, "Run or weights of the entropy model; not needed on a patches directory.", MODEL
    ] = None
    threshold: Annotated[
        float | None,
        "τ, nats: a token with entropy above it starts a patch. Entropies range from 0 to ln V (9.70 for 16384 codes, "
        "6.93 for 1024); the published 7.8 is 0.80·ln V of its tokenizer. For small codebooks use --target-length.",
        PATCHES,
    ] = None
    target_length: Annotated[float | None, "Find the threshold for this mean patch length, such as 1.81.", PATCHES] = (
        None
    )
    max_length: Annotated[int, "P: most tokens in a patch; 0 is no limit.", PATCHES] = 4
    row_reset: Annotated[bool, "Each row of the grid starts a patch.", PATCHES] = True
    strategy: Annotated[Strategy, "entropy: the paper's rule; static: one fixed length, --static-length.", PATCHES] = (
        "entropy"
    )
    static_length: Annotated[float | None, "Patch length of the static strategy; may be fractional.", PATCHES] = None
    container: Annotated[Container | None, "Format of the shards. (default: as the input's)", OUTPUT] = None
    sample: Annotated[int, "Images on which --target-length searches for its threshold.", PATCHES] = 4096
    batch: Annotated[int, "Sequences in one pass of the entropy model.", HARDWARE] = 32
    compare: Annotated[
        tuple[str, str] | None,
        "Two entropy models: report how similarly they patchify a sample of the images; write no patches.",
        MODEL,
    ] = None
    verify: Annotated[bool, "Check the SHA-256 of every input shard before starting.", DATA] = True
    overwrite: Annotated[bool, "Replace an output made with other settings.", OUTPUT] = False
    device: Device = "auto"
    precision: Compute = "auto"

    def __post_init__(self) -> None:
        self.check_engine()
        at_least(self, 1, "target_length", "static_length", "sample", "batch")
        at_least(self, 0, "max_length", "threshold")
        if self.compare is not None:
            require(self.entropy_model is None, "--compare names both entropy models; omit --entropy-model")
            require(self.strategy == "entropy", "--compare needs entropies; omit --strategy static")
        if self.strategy == "static":
            require(self.static_length is not None, "--strategy static needs --static-length")
            require(
                self.threshold is None and self.target_length is None,
                "--strategy static does not use --threshold or --target-length; give its length with --static-length",
            )
        else:
            require(self.static_length is None, "--static-length needs --strategy static")
            require(
                (self.threshold is None) != (self.target_length is None),
                "give one of --threshold (nats) and --target-length (tokens per patch)",
            )

    @property
    def rule(self) -> PatchRule:
        """The patch rule; its threshold is None if not known yet."""
        if self.static_length is not None:
            return PatchRule.static(self.static_length)
        return PatchRule(threshold=self.threshold, max_length=self.max_length or None, row_reset=self.row_reset)


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """Summary of an artifact."""

    images: Annotated[int, "Images to draw, spread over the classes; 0 draws none and needs no tokenizer.", DATA] = 8
    classes: Annotated[tuple[str, ...], "Draw images of this class; repeat for several. (default: all)", DATA] = ()
    keys: Annotated[tuple[str, ...], "Draw the image of this key; repeat for several.", DATA] = ()
    threshold: Annotated[
        tuple[float, ...], "τ, nats: also report patches at this threshold; repeat for several.", PATCHES
    ] = ()
    tokenizer: Annotated[str | None, "Weights to decode with. (default: those recorded in the artifact)", MODEL] = None
    fetch_originals: FetchOriginals = False
    verify: Annotated[bool, "Check the SHA-256 of every shard.", DATA] = False
    batch: Annotated[int, "Images decoded at once.", HARDWARE] = 32
    device: Device = "auto"

    def __post_init__(self) -> None:
        at_least(self, 0, "images")
        at_least(self, 1, "batch")
        for threshold in self.threshold:
            require(threshold >= 0, f"--threshold is {threshold}; it must be at least 0")
