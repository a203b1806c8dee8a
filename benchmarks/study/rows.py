"""The models that the study compares: sizes, patch rules, and the rows of each part."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dpar.flops import count
from dpar.presets import preset

LENGTHS = (1.81, 1.92, 2.03, 2.16)  # mean lengths at inference, the paper's Table 6
TRAINED_LENGTHS = (1.5, 2.2)  # in addition to 1.81; after Table 4
LIMITS = (2, 8, 16)  # in addition to 1 and 4; Table 5
DEPTHS = ((1, 4, 4), (2, 4, 3), (3, 4, 2))  # encoder, patch transformer, decoder; in addition to 1+5+3; Table 10
ROPES = ("dynamic-compact", "2d")  # in addition to dynamic; Table 9
PARTS = ("main", "choices", "thresholds", "limits", "probe", "equal-flops", "speed")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Settings that all rows share."""

    steps: int = 500
    batch: int = 16  # images per step
    width: int = 128
    length: float = 1.81  # mean tokens per patch of DPAR's training data
    samples: int | None = None  # per row; None: the number of held-out images
    guidance: float = 2.0
    precision: str = "bf16"

    @property
    def heads(self) -> int:
        return max(1, self.width // 64)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model: its patch rule and its differences from the preset."""

    name: str
    title: str
    rule: str = "dpar"  # a key of :func:`rule_options`
    llamagen: bool = False
    overrides: tuple[tuple[str, object], ...] = ()
    seeds: int | None = None  # None: the study's number of seeds

    @property
    def preset(self) -> str:
        return "llamagen-mini" if self.llamagen else "dpar-mini"


LLAMAGEN = Row(name="llamagen", title="LlamaGen", llamagen=True)
DPAR = Row(name="dpar", title="DPAR as published")
STATIC = Row(name="static", title="static patches of the same mean length", rule="static")
P1 = Row(name="p1", title="P = 1", rule="limit-1")
MAIN = (
    LLAMAGEN,
    DPAR,
    STATIC,
    Row(name="no-limit", title="entropy without length limit", rule="no-limit"),
    Row(name="no-row-reset", title="without row reset", rule="no-row-reset"),
    P1,
)
CHOICES = (Row(name="class-start", title="class as the decoder's start", overrides=(("decoder_start", "class"),)),)


def limits() -> tuple[Row, ...]:
    """Return the rows of thresholds, length limits, depths and rotary variants, with one seed each."""
    lengths = [Row(name=f"length-{x:g}", title=f"mean length {x:g}", rule=f"length-{x:g}") for x in TRAINED_LENGTHS]
    longest = [Row(name=f"limit-{p}", title=f"P = {p}", rule=f"limit-{p}") for p in LIMITS]
    names = ("encoder_layers", "patch_layers", "decoder_layers")
    depths = [
        Row(
            name="depth-" + "-".join(map(str, depth)),
            title="layers " + "+".join(map(str, depth)),
            overrides=tuple(zip(names, depth, strict=True)),
        )
        for depth in DEPTHS
    ]
    ropes = [Row(name=f"rope-{rope}", title=f"rotary {rope}", overrides=(("rope", rope),)) for rope in ROPES]
    return tuple(dataclasses.replace(row, seeds=1) for row in (*lengths, *longest, *depths, *ropes))


def equal_flops(size: Size, codes: dict[str, int]) -> Row:
    """Return DPAR with the depth whose training step costs closest to LlamaGen's.

    Args:
        size: the study's size.
        codes: grid, codebook size and number of classes, as arguments of a preset.
    """
    shape = codes | {"width": size.width, "heads": size.heads}
    wanted = count(preset("llamagen-mini", **shape)).linear
    costs = {layers: count(preset("dpar-mini", **shape, patch_layers=layers), size.length).linear for layers in (5, 6)}
    layers = max(5, 5 + round((wanted - costs[5]) / (costs[6] - costs[5])))
    overrides = (("patch_layers", layers),)
    return Row(name="equal-flops", title=f"DPAR with {layers} patch layers", overrides=overrides)


def rule_options(rule: str, threshold: float, mean_length: float) -> tuple[str, ...]:
    """Return options of `dpar patchify` that apply another rule to DPAR's patches.

    Args:
        rule: its name.
        threshold: nats, of DPAR's patches.
        mean_length: tokens per patch, of DPAR's patches.
    """
    kind, _, value = rule.rpartition("-")
    if rule == "static":
        return ("--strategy", "static", "--static-length", f"{mean_length!r}")
    if kind == "length":
        return ("--target-length", value)
    if rule == "no-row-reset":
        return ("--threshold", f"{threshold!r}", "--no-row-reset")
    return ("--threshold", f"{threshold!r}", "--max-length", "0" if rule == "no-limit" else value)
