"""Shared by all settings: types of fields, help headings, checks, and which fields determine a result."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pipeline.runtime.errors import StageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# The headings, in the order of --help.
GROUPS = ("Data", "Model", "Patches", "Optimisation", "Sampling", "Hardware", "Output")
DATA, MODEL, PATCHES, OPTIM, SAMPLING, HARDWARE, OUTPUT = GROUPS


class RunTime:
    """Marks a field that may change when a stage resumes: its value does not determine the result.

    Paths are marked too, because fingerprints of the contents are compared instead.
    """


RUN_TIME = RunTime()

Precision = Literal["auto", "bf16", "fp32"]
Views = Literal["center", "flip", "ten-crop"]
Container = Literal["arrow", "webdataset"]
Schedule = Literal["constant", "cosine"]
Attention = Literal["auto", "varlen", "xformers", "flex", "sdpa"]
Features = Literal["tokenizer", "inception", "efficientnet"]
Network = Literal["tokenizer", "inception", "efficientnet", "dinov2"]  # that compute features
Protocol = Literal["paper"]
PatchRope = Literal["dynamic", "dynamic-compact", "2d"]
GuidanceSchedule = Literal["constant", "linear", "power-cosine"]
Labels = Literal["balanced", "random"]
ScoredLabels = Literal["random", "balanced", "reference"]
Device = Annotated[str, "cpu, cuda, cuda:N or mps; auto is CUDA if available.", HARDWARE, RUN_TIME]
Compute = Annotated[Precision, "Precision of the computation; auto is bf16 if the device is faster with it.", HARDWARE]
Seed = Annotated[int, "Seed of all randomness."]
Split = Annotated[
    str | None, "Part of the data: a subfolder such as train or val; train or validation of built-in data.", DATA
]
FetchOriginals = Annotated[
    bool,
    "Fetch originals over the network, from the address in the artifact's manifest; only for artifacts you trust.",
    DATA,
    RUN_TIME,
]
Classes = Annotated[tuple[str, ...], "Only this class; repeat for several. (default: all)", DATA]


def run_time_fields(settings: object) -> frozenset[str]:
    """Return the names of a settings object's fields that are marked :data:`RUN_TIME`."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    return frozenset(name for name, hint in hints.items() if RUN_TIME in typing.get_args(hint))


def identity(settings: DataclassInstance) -> dict[str, Any]:
    """Return the fields that determine the result, as JSON values: a stage resumes only if they are equal."""
    free = run_time_fields(settings)
    chosen = {name: value for name, value in dataclasses.asdict(settings).items() if name not in free}
    values: dict[str, Any] = json.loads(json.dumps(chosen, default=str))
    return values


def require(condition: bool, message: str) -> None:
    """Raise StageError with ``message`` unless ``condition``."""
    if not condition:
        raise StageError(message)


LARGEST = 2**31 - 1  # integer: seeds times steps, and indices, fit in 64 bits
LARGEST_BATCH = 2**16  # number of things in memory at the same time
BATCHES = ("batch", "micro_batch", "sheet", "workers", "image_size")


def at_least(settings: object, low: float, *names: str) -> None:
    """Raise StageError if one of the named numbers is below ``low``, not finite, or unreasonably large."""
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            option = "--" + name.replace("_", "-")
            text = value if isinstance(value, float) or abs(value) < 10**15 else "a number of too many digits"
            require(value >= low and value < math.inf, f"{option} is {text}; it must be at least {low:g}")
            high = LARGEST_BATCH if name in BATCHES else LARGEST
            require(value <= high or isinstance(value, float), f"{option} is {text}; it must be at most {high}")
