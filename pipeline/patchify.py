"""``dpar patchify CODES OUT --entropy-model E``: entropies and patch boundaries.

    manifest = patchify(Path("codes"), Path("patches"), PatchifySettings(entropy_model="entropy", target_length=1.81))

On a patches directory it moves the boundaries by the entropies that are stored there, without a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpar.llamagen import LlamaGen
from dpar.patching import PatchRule
from pipeline.runs.weights import check_same_tokenizer, fingerprint_of, load_entropy_model
from pipeline.runtime.device import choose_device, precision_name, rank, world_size
from pipeline.runtime.errors import StageError
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import Progress, Task, stops_with
from pipeline.runtime.provenance import made_by
from pipeline.runtime.threshold_warning import warn_if_out_of_reach
from pipeline.scoring.likelihood import check_compatible, entropies, prepared
from pipeline.settings import PatchifySettings
from shards.manifest import BUILD, FORMAT_VERSIONS, MANIFEST, Manifest, ShardInfo, write_json
from shards.patch_statistics import count_patches, merge_counts
from shards.reader import Artifact, open_artifact
from shards.rows import Rows
from shards.writer import ArtifactBuild

PROBE = 64  # images on which a given threshold is tried before all are read
CLOSE = 0.01  # how far from --target-length, as a part of it, needs no excuse
SECOND_LOOK = 2**16  # sequences, at least, on which a threshold that missed its target is looked for again
RULE = "rule.json"  # in an unfinished artifact: the rule as it was found, so that going on does not look again


def patchify(codes: Path, out: Path, settings: PatchifySettings, progress: Progress | None = None) -> Manifest | None:
    """Writes a patches artifact to ``out``: the codes of ``codes``, their entropies, and boundaries.

    Any number of processes may share the work (``torchrun``, or several runs on one ``out``); running it again goes
    on where it stopped.

    Returns:
        The artifact's manifest; None where other processes have shards still to write.

    Raises:
        StageError, ModelError, ArtifactError: input, weights, output or settings cannot be used; the entropy model was
            trained on codes of another tokenizer, as far as its run records it.
        Stopped: the user pressed Ctrl-C.
    """
    progress = progress or Progress()
    artifact = open_artifact(codes, verify=settings.verify, share=(rank(), world_size()))
    before = artifact.manifest
    warn_if_out_of_reach(settings.threshold, before.codebook_size, progress)
    meter = EntropyMeter(artifact, settings)
    decides: dict[str, Any] = {
        "codes": before.fingerprint() if before.kind == "codes" else before.settings["codes"],
        "codes_settings": before.settings if before.kind == "codes" else before.settings["codes_settings"],
        "entropy_model": None if meter.origin is None else meter.origin["fingerprint"],
        "precision": meter.precision,
        "batch": meter.batch,
        "container": settings.container or before.container,
        "format_version": FORMAT_VERSIONS["patches"],  # of the rule, so that versions do not share an artifact
        **settings.rule.to_dict(),
    }
    asked = {"target_length": settings.target_length, "sample": settings.sample} if settings.target_length else {}
    found = _found_before(out, decides, asked)
    rule = _find_rule(meter, settings, progress) if found is None else PatchRule.from_dict(found)
    decides |= rule.to_dict()
    build = ArtifactBuild(
        out,
        settings=decides,
        n_shards=len(before.shards),
        container=decides["container"],
        overwrite=settings.overwrite,
    )

    def make_manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        statistics = merge_counts(
            [shard.statistics for shard in shards],
            n_tokens=before.n_tokens,
            views=before.views,
            class_names=before.class_names,
        )
        return Manifest(
            kind="patches",
            container=decides["container"],
            grid=before.grid,
            codebook_size=before.codebook_size,
            views=before.views,
            class_names=before.class_names,
            rows=before.rows,
            shards=shards,
            settings=decides,
            source=before.source,
            tokenizer=before.tokenizer,
            entropy_model=meter.origin,
            statistics=statistics,
            left_out=before.left_out,
            made_by={**made_by(), **asked},
        )

    with contextlib.closing(build):
        if found is None:
            with contextlib.suppress(FileNotFoundError):  # the artifact is finished
                write_json(out / BUILD / RULE, {"settings": decides, "asked": asked})
        keeps = f"Stopped. Finished shards are kept in {out}; run the same command again to go on."
        with stops_with(keeps), progress.task("patchify", before.rows, "images") as task:
            task.skip(sum(info.rows for index, info in enumerate(before.shards) if build.done(index)))
            _write_shards(build, artifact, meter, rule, task)
        manifest = build.finish(make_manifest)
    if manifest is None:
        progress.say(
            f"{build.remaining()} shards are still being written by other processes; "
            "the last one to finish writes the manifest"
        )
    elif settings.target_length is not None:
        _say_target(out, manifest, settings, progress)
    return manifest


def _write_shards(build: ArtifactBuild, artifact: Artifact, meter: EntropyMeter, rule: PatchRule, task: Task) -> None:
    """Writes every shard that is this process's to write: one thread computes while this one hashes and writes.

    Nothing is claimed ahead of that: another process may be free to take it.
    """
    stopped = threading.Event()

    def advance(images: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        task.advance(images)

    def work() -> Generator[tuple[int, Rows, dict[str, Any]], None, None]:
        for index in build.todo(rank(), world_size()):
            rows = artifact.shard_rows(index)
            entropy = meter.measure(rows, advance)
            starts = rule.starts(entropy, artifact.manifest.grid[1])
            made = Rows(keys=rows.keys, labels=rows.labels, codes=rows.codes, entropy=entropy, starts=starts)
            yield index, made, count_patches(starts, rows.labels)

    with contextlib.closing(prefetch(work(), limit=1)) as shards:
        try:
            for index, made, counts in shards:
                build.add(index, made, statistics=counts)
        except BaseException:
            stopped.set()  # so that the other thread ends within its batch, not its shard
            raise


class EntropyMeter:
    """Where an artifact's entropies come from: a model, what is stored, or nowhere."""

    def __init__(self, artifact: Artifact, settings: PatchifySettings) -> None:
        self.artifact, self.settings = artifact, settings
        manifest = artifact.manifest
        self.model: LlamaGen | None = None
        self.origin = manifest.entropy_model  # path and fingerprint; None where nothing was measured
        before = manifest.settings if manifest.kind == "patches" else {}
        self.precision: str | None = before.get("precision")
        self.batch: int | None = before.get("batch")  # products round differently in batches of another size
        if settings.entropy_model is not None and manifest.kind == "patches":
            given = fingerprint_of(settings.entropy_model, "entropy_model")
            if self.origin is None:
                raise StageError(f"{artifact.folder} holds no entropies; to measure them, patchify the codes anew")
            if given != self.origin["fingerprint"]:
                raise StageError(
                    f"{artifact.folder} already holds entropies, of another entropy model; "
                    "leave --entropy-model out to use them, or patchify the codes anew"
                )
        elif settings.entropy_model is not None:
            model = load_entropy_model(settings.entropy_model)
            check_compatible(model, manifest, str(artifact.folder), unconditional=True)
            check_same_tokenizer(settings.entropy_model, manifest.tokenizer, str(artifact.folder))
            device = choose_device(settings.device)
            self.model = prepared(model.to(device), settings.precision)
            self.precision, self.batch = precision_name(device, settings.precision), settings.batch
            self.origin = {
                "path": settings.entropy_model,
                "fingerprint": fingerprint_of(settings.entropy_model, "entropy_model"),
            }
        elif settings.strategy == "entropy" and self.origin is None:
            raise StageError(f"{artifact.folder} holds no entropies; name the entropy model with --entropy-model")

    def measure(self, rows: Rows, advance: Callable[[int], None]) -> NDArray[np.float16]:
        """Entropies (R, views, N) float16 of a shard's rows; NaN where nothing measures them (but +inf at token 0).

        A model's batches are cut within the shard, in order, so that its bytes do not depend on who works on what.
        ``advance`` is told how many more images are done.
        """
        if self.model is None:
            advance(len(rows))
            return self._of_codes(rows.codes) if rows.entropy is None else rows.entropy
        measured = np.empty(rows.codes.shape, np.float16)
        step = self.settings.batch  # rows: as many full batches as there are views
        for first in range(0, len(rows), step):
            measured[first : first + step] = self._of_codes(rows.codes[first : first + step])
            advance(len(rows.codes[first : first + step]))
        return measured

    def sample(self, images: int) -> NDArray[np.float16]:
        """Entropies (n, N) of the views that :func:`spread_views` gives."""
        batch = self.artifact.gather(*spread_views(self.artifact.manifest, images))
        if batch.entropy is not None and self.model is None:
            return batch.entropy
        return self._of_codes(batch.codes)

    def _of_codes(self, codes: NDArray[Any]) -> NDArray[np.float16]:
        if self.model is None:
            nothing = np.full(codes.shape, np.nan, np.float16)
            nothing[..., 0] = np.inf
            return nothing
        flat = codes.reshape(-1, codes.shape[-1])
        measured = entropies(self.model, flat, batch=self.settings.batch, precision=self.settings.precision)
        return measured.reshape(codes.shape)


def spread_views(manifest: Manifest, images: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and views (n,): every view where there are at most ``images``, else one each of images spread evenly."""
    if manifest.rows * manifest.views <= images:
        return np.divmod(np.arange(manifest.rows * manifest.views), manifest.views)
    rows = np.unique(np.linspace(0, manifest.rows - 1, min(images, manifest.rows)).astype(np.int64))
    return rows, np.arange(len(rows)) % manifest.views


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A threshold for a wanted mean patch length, and the length that it gives on a sample."""

    value: float  # nats
    length: float
    beside: float  # the length that the nearest threshold on the target's other side gives
    sequences: int  # of the sample

    def off(self, target: float) -> float:
        """How far the length is from ``target``, as a part of it."""
        return abs(self.length / target - 1)


def find_threshold(entropy: NDArray[np.float16], target: float, rule: PatchRule, grid_width: int) -> Threshold:
    """The threshold of ``rule`` whose mean patch length on (n, N) stored entropies comes nearest to ``target``.

    Raises:
        StageError: no threshold can reach it, with the range that can be.
    """
    # float16 values are few and, from zero up, in the order of their bits. A token at the threshold starts no patch,
    # so the largest value closes the gate, and one below the smallest lets every token start a patch.
    bits = np.unique(np.ascontiguousarray(entropy[:, 1:]).view(np.uint16))
    candidates = np.append(np.maximum(bits[:1], 1) - np.uint16(1), bits).view(np.float16)

    def length(candidate: int) -> float:
        starts = dataclasses.replace(rule, threshold=float(candidates[candidate])).starts(entropy, grid_width)
        return entropy.size / int(np.count_nonzero(starts))

    low, high = 0, len(candidates) - 1  # length rises with the threshold
    longest = length(high)
    if target > longest * (1 + CLOSE):
        raise StageError(
            f"--target-length {target:g} cannot be reached: with --max-length {rule.max_length or 0} and "
            f"--{'' if rule.row_reset else 'no-'}row-reset lengths from 1 to {longest:.3f} can be"
        )
    while low < high:
        middle = (low + high) // 2
        if length(middle) < target:
            low = middle + 1
        else:
            high = middle
    beside = max(low - 1, 0)
    if abs(length(beside) - target) <= abs(length(low) - target):
        low, beside = beside, low
    return Threshold(value=float(candidates[low]), length=length(low), beside=length(beside), sequences=len(entropy))


def _found_before(out: Path, decides: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any] | None:
    """The settings that a run of the same command has recorded in ``out``, its threshold among them; None without."""
    if (out / MANIFEST).is_file():
        manifest = Manifest.read(out)
        held, before = manifest.settings, {name: manifest.made_by.get(name) for name in asked}
    else:
        try:
            recorded = json.loads((out / BUILD / RULE).read_text(encoding="utf-8"))
            held, before = recorded["settings"], recorded["asked"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
    ours = json.loads(json.dumps(decides))
    if asked:  # then the threshold is what is to be found
        ours["threshold"] = held.get("threshold")
    return held if held == ours and before == asked else None


def _find_rule(meter: EntropyMeter, settings: PatchifySettings, progress: Progress) -> PatchRule:
    """The rule with its threshold: the one given, or the one that gives the wanted length on a sample.

    Raises:
        StageError: the wanted length cannot be reached, or every token would be its own patch without this being asked.
    """
    target, rule = settings.target_length, settings.rule
    if rule.strategy == "static":
        return rule
    width = meter.artifact.manifest.grid[1]
    sample = meter.sample(PROBE if target is None else settings.sample)
    finite = sample[:, 1:]
    low, high = float(finite.min()), float(finite.max())
    if target is not None:
        found = find_threshold(sample, target, rule, width)
        rule = dataclasses.replace(rule, threshold=found.value)
        progress.say(
            f"threshold {found.value!r} nats: mean patch length {found.length:.3f} on a sample of "
            f"{found.sequences} sequences"
        )
    alike = target is not None and low == high
    if rule.max_length == 1 or not (alike or bool(rule.starts(sample, width).all())):
        return rule
    if target is None:
        raise StageError(
            f"--threshold {rule.threshold:g} makes every token its own patch: on {len(sample)} images entropies "
            f"reach from {low:.2f} to {high:.2f} nats. Raise it, or give --target-length; "
            "--max-length 1 if one token a patch is what you want"
        )
    if target <= 1 + CLOSE:
        raise StageError(
            f"--target-length {target:g} makes every token its own patch; --max-length 1 if that is what you want"
        )
    raise StageError(
        f"--target-length {target:g} cannot be reached: the entropies are too alike to tell "
        f"tokens apart ({low:.3f} to {high:.3f} nats); train the entropy model longer"
    )


def _say_target(out: Path, manifest: Manifest, settings: PatchifySettings, progress: Progress) -> None:
    """Says how near to the wanted length all data came; where that is not near enough, why, and what would be."""
    target = settings.target_length
    assert target is not None
    reached = manifest.statistics["mean_length"]
    off = abs(reached / target - 1)
    said = f"mean patch length {reached:.3f} on all data, {off:.1%} from --target-length {target:g}"
    if off > CLOSE:
        sample = open_artifact(out).gather(*spread_views(manifest, max(SECOND_LOOK, 16 * settings.sample))).entropy
        assert sample is not None
        better = find_threshold(sample, target, settings.rule, manifest.grid[1])
        if better.value == manifest.settings["threshold"] or better.off(target) >= off:
            said += f"; no threshold comes nearer, the next one gives {better.beside:.3f}"
        else:
            said += (
                f"; the sample of {settings.sample} was not like the rest. `dpar patchify {out} NEW --threshold "
                f"{better.value!r}` moves the boundaries without a model: length {better.length:.3f} on "
                f"{better.sequences} sequences"
            )
    progress.say(said)
