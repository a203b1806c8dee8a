"""``dpar patchify CODES OUT --entropy-model E``: entropies and patch boundaries.

    manifest = patchify(Path("codes"), Path("patches"), PatchifySettings(entropy_model="entropy", target_length=1.81))

On a patches directory it moves the boundaries, from stored entropies and without a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpar.llamagen import LlamaGen
from dpar.patching import PatchRule
from pipeline.runs.weights import check_same_tokenizer, fingerprint_of, load_entropy_model
from pipeline.runtime.device import choose_device, precision_name, rank, world_size
from pipeline.runtime.engine import Count, Engine, open_engine
from pipeline.runtime.errors import StageError
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import Progress, stops_with
from pipeline.runtime.provenance import made_by
from pipeline.runtime.threshold_warning import warn_if_out_of_reach
from pipeline.runtime.work_sharing import Shards
from pipeline.scoring.likelihood import check_compatible, entropies, prepared
from pipeline.settings.artifacts import PatchifySettings
from shards.manifest import BUILD, FORMAT_VERSIONS, MANIFEST, Manifest, ShardInfo
from shards.patch_statistics import count_patches, merge_counts
from shards.reader import Artifact, open_artifact
from shards.rows import Rows
from shards.storage import Location, is_file, read_bytes, write_json
from shards.writer import ArtifactBuild

PROBE = 64  # images on which a given threshold is tested before the full pass
TOLERANCE = 0.01  # relative deviation from --target-length that is not explained
SECOND_SAMPLE = 2**16  # sequences, at least, in the second search after a threshold missed its target
RULE = "rule.json"  # the rule of an unfinished artifact, so that a resumed run does not search again


def patchify(
    codes: Location, out: Location, settings: PatchifySettings, progress: Progress | None = None
) -> Manifest | None:
    """Write a patches artifact to ``out``: the codes of ``codes``, their entropies, and boundaries.

    Both may be URLs.

    Any number of processes may share the work (``torchrun``, several runs on one ``out``, or Ray's workers); a second
    run resumes the first.

    Returns:
        The artifact's manifest; None while other processes still write shards.

    Raises:
        StageError, ModelError, ArtifactError: input, weights, output or settings cannot be used; or the run of the
            entropy model records another tokenizer than that of the codes.
        Stopped: the user pressed Ctrl-C.
    """
    progress = progress or Progress()
    stopped = f"Stopped. Finished shards are kept in {out}; run the same command again to resume."
    with stops_with(stopped), open_engine(settings, progress) as engine:
        return _patchify(codes, out, settings, progress, engine)


def _patchify(
    codes: Location, out: Location, settings: PatchifySettings, progress: Progress, engine: Engine
) -> Manifest | None:
    artifact = open_artifact(codes, verify=settings.verify, share=(rank(), world_size()))
    source = artifact.manifest
    warn_if_out_of_reach(settings.threshold, source.codebook_size, progress)
    meter = engine.load(EntropyMeter, artifact, settings)
    identity = _identity(source, meter, settings)
    target = {"target_length": settings.target_length, "sample": settings.sample} if settings.target_length else {}
    recorded = _recorded_settings(out, identity, target)
    rule = _find_rule(meter, settings, progress, engine) if recorded is None else PatchRule.from_dict(recorded)
    identity |= rule.to_dict()
    build = ArtifactBuild(
        out,
        settings=identity,
        n_shards=len(source.shards),
        container=identity["container"],
        overwrite=settings.overwrite,
        share=(rank(), world_size()),
    )

    def make_manifest(shards: tuple[ShardInfo, ...]) -> Manifest:
        counts = [shard.statistics for shard in shards]
        return dataclasses.replace(
            source,
            kind="patches",
            container=identity["container"],
            shards=shards,
            settings=identity,
            entropy_model=meter.origin,
            statistics=merge_counts(
                counts, n_tokens=source.n_tokens, views=source.views, class_names=source.class_names
            ),
            made_by={**made_by(), **target},
        )

    with contextlib.closing(build):
        if recorded is None and build.finished is None:
            with contextlib.suppress(FileNotFoundError):  # another process has finished the artifact
                write_json(out / BUILD / RULE, {"settings": identity, "asked": target})

        origin = meter.origin

        def work(indices: Generator[int, None, None], count: Count) -> None:
            if meter.origin != origin:
                raise StageError(f"{settings.entropy_model} has other weights on the worker than on the driver")
            _write_shards(build, artifact, meter, rule, indices, count)

        with progress.task("patchify", source.rows, "images") as task:
            task.skip(source.rows - sum(source.shards[index].rows for index in build.unfinished()))
            engine.run(Shards(build), work, task)
        manifest = build.finish(make_manifest)
    if manifest is None:
        progress.say(
            f"{build.remaining()} shards are still being written by other processes; "
            "the last one to finish writes the manifest"
        )
    elif settings.target_length is not None:
        _report_target(out, manifest, settings, progress)
    return manifest


def _identity(source: Manifest, meter: EntropyMeter, settings: PatchifySettings) -> dict[str, Any]:
    """Return the settings that determine the artifact's bytes; with a target length, all but the threshold."""
    is_codes = source.kind == "codes"
    return {
        "codes": source.fingerprint() if is_codes else source.settings["codes"],
        "codes_settings": source.settings if is_codes else source.settings["codes_settings"],
        "entropy_model": None if meter.origin is None else meter.origin["fingerprint"],
        "precision": meter.precision,
        "batch": meter.batch,
        "container": settings.container or source.container,
        "format_version": FORMAT_VERSIONS["patches"],  # of the rule, so that versions do not share an artifact
        **settings.rule.to_dict(),
    }


def _write_shards(
    build: ArtifactBuild,
    artifact: Artifact,
    meter: EntropyMeter,
    rule: PatchRule,
    todo: Generator[int, None, None],
    task: Count,
) -> None:
    """Write the shards that ``todo`` claims: one thread computes while this one hashes and writes.

    No shard is claimed in advance, because another process may be idle.
    """
    stopped = threading.Event()

    def advance(images: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        task.advance(images)

    def work() -> Generator[tuple[int, Rows, dict[str, Any]], None, None]:
        for index in todo:
            rows = artifact.shard_rows(index)
            entropy = meter.measure(rows, advance)
            starts = rule.starts(entropy, artifact.manifest.grid[1])
            yield index, dataclasses.replace(rows, entropy=entropy, starts=starts), count_patches(starts, rows.labels)

    with contextlib.closing(prefetch(work(), limit=1)) as shards:
        try:
            for index, rows, counts in shards:
                build.add(index, rows, statistics=counts)
        except BaseException:
            stopped.set()  # ends the other thread after its batch, not its shard
            raise


class EntropyMeter:
    """The source of an artifact's entropies: a model, the stored values, or none."""

    def __init__(self, artifact: Artifact, settings: PatchifySettings) -> None:
        self.artifact, self.settings = artifact, settings
        manifest = artifact.manifest
        self.model: LlamaGen | None = None
        self.origin = manifest.entropy_model  # path and fingerprint; None if there are no entropies
        stored = manifest.settings if manifest.kind == "patches" else {}
        self.precision: str | None = stored.get("precision")
        self.batch: int | None = stored.get("batch")  # products round differently in batches of another size
        if settings.entropy_model is not None and manifest.kind == "patches":
            if self.origin is None:
                raise StageError(f"{artifact.folder} holds no entropies; to measure them, patchify the codes again")
            if fingerprint_of(settings.entropy_model, "entropy_model") != self.origin["fingerprint"]:
                raise StageError(
                    f"{artifact.folder} already holds entropies, of another entropy model; "
                    "omit --entropy-model to use them, or patchify the codes again"
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
        """Return entropies (R, views, N) float16, in nats, of a shard's rows; without a source NaN, +inf at token 0.

        A model's batches stay within the shard, in order, so that its bytes do not depend on how work is shared.
        ``advance`` receives the number of images of each batch.
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
        """Return entropies (n, N) float16 of the views that :func:`spread_views` selects."""
        batch = self.artifact.gather(*spread_views(self.artifact.manifest, images))
        if batch.entropy is not None and self.model is None:
            return batch.entropy
        return self._of_codes(batch.codes)

    def _of_codes(self, codes: NDArray[Any]) -> NDArray[np.float16]:
        if self.model is None:
            unknown = np.full(codes.shape, np.nan, np.float16)
            unknown[..., 0] = np.inf
            return unknown
        flat = codes.reshape(-1, codes.shape[-1])
        measured = entropies(self.model, flat, batch=self.settings.batch, precision=self.settings.precision)
        if np.isnan(measured).any():
            raise StageError(f"{self.settings.entropy_model} gives no entropies: its weights hold NaN or infinity")
        return measured.reshape(codes.shape)


def spread_views(manifest: Manifest, images: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and views, (n,) int64: all views if at most ``images``, else one each of evenly spread images."""
    if manifest.rows * manifest.views <= images:
        return np.divmod(np.arange(manifest.rows * manifest.views), manifest.views)
    rows = np.unique(np.linspace(0, manifest.rows - 1, min(images, manifest.rows)).astype(np.int64))
    return rows, np.arange(len(rows)) % manifest.views


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A threshold for a target mean patch length, and the length that it gives on a sample."""

    value: float  # nats
    length: float
    next_length: float  # of the nearest threshold on the target's other side
    sequences: int  # in the sample

    def deviation(self, target: float) -> float:
        """Return the relative deviation of the length from ``target``."""
        return abs(self.length / target - 1)


def find_threshold(entropy: NDArray[np.float16], target: float, rule: PatchRule, grid_width: int) -> Threshold:
    """Return the threshold of ``rule`` whose mean patch length on (n, N) stored entropies is nearest to ``target``.

    Raises:
        StageError: no threshold reaches it; the message has the reachable range.
    """
    # Non-negative float16 values are few and ordered like their bits. A token at the threshold starts no patch, so
    # with the largest value no token starts one, and with a value below the smallest every token does.
    bits = np.unique(np.ascontiguousarray(entropy[:, 1:]).view(np.uint16))
    candidates = np.append(np.maximum(bits[:1], 1) - np.uint16(1), bits).view(np.float16)

    def length(candidate: int) -> float:
        starts = dataclasses.replace(rule, threshold=float(candidates[candidate])).starts(entropy, grid_width)
        return entropy.size / int(np.count_nonzero(starts))

    low, high = 0, len(candidates) - 1  # length rises with the threshold
    longest = length(high)
    if target > longest * (1 + TOLERANCE):
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
    best, other = low, max(low - 1, 0)
    if abs(length(other) - target) <= abs(length(best) - target):
        best, other = other, best
    return Threshold(
        value=float(candidates[best]), length=length(best), next_length=length(other), sequences=len(entropy)
    )


def _recorded_settings(out: Location, identity: dict[str, Any], target: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings, threshold included, that a run of the same command recorded in ``out``, or None."""
    if is_file(out / MANIFEST):
        manifest = Manifest.read(out)
        settings, recorded_target = manifest.settings, {name: manifest.made_by.get(name) for name in target}
    else:
        try:
            recorded = json.loads(read_bytes(out / BUILD / RULE))
            settings, recorded_target = recorded["settings"], recorded["asked"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
    expected = json.loads(json.dumps(identity))
    if target:  # the threshold is the result of the search
        expected["threshold"] = settings.get("threshold")
    return settings if settings == expected and recorded_target == target else None


def _find_rule(meter: EntropyMeter, settings: PatchifySettings, progress: Progress, engine: Engine) -> PatchRule:
    """Return the rule with its threshold: the given one, or the one that reaches the target length on a sample.

    Raises:
        StageError: the target length cannot be reached, or every token would be its own patch unintentionally.
    """
    target, rule = settings.target_length, settings.rule
    if rule.strategy == "static":
        return rule
    width = meter.artifact.manifest.grid[1]
    images = PROBE if target is None else settings.sample
    sample = engine.call(lambda: meter.sample(images))
    finite = sample[:, 1:]
    low, high = float(finite.min()), float(finite.max())
    if target is not None:
        best = find_threshold(sample, target, rule, width)
        rule = dataclasses.replace(rule, threshold=best.value)
        progress.say(
            f"threshold {best.value!r} nats: mean patch length {best.length:.3f} on a sample of "
            f"{best.sequences} sequences"
        )
    alike = target is not None and low == high
    if rule.max_length == 1 or not (alike or bool(rule.starts(sample, width).all())):
        return rule
    if target is None:
        raise StageError(
            f"--threshold {rule.threshold:g} makes every token its own patch: on {len(sample)} images entropies "
            f"range from {low:.2f} to {high:.2f} nats. Raise it, or give --target-length; "
            "--max-length 1 if you want one token per patch"
        )
    if target <= 1 + TOLERANCE:
        raise StageError(
            f"--target-length {target:g} makes every token its own patch; give --max-length 1 if you want that"
        )
    raise StageError(
        f"--target-length {target:g} cannot be reached: the entropies are too similar to tell "
        f"tokens apart ({low:.3f} to {high:.3f} nats); train the entropy model longer"
    )


def _report_target(out: Location, manifest: Manifest, settings: PatchifySettings, progress: Progress) -> None:
    """Report the mean length on all data; if it is off target, also why and which threshold is better."""
    target = settings.target_length
    assert target is not None
    reached = manifest.statistics["mean_length"]
    deviation = abs(reached / target - 1)
    message = f"mean patch length {reached:.3f} on all data, {deviation:.1%} from --target-length {target:g}"
    if deviation > TOLERANCE:
        sample = open_artifact(out).gather(*spread_views(manifest, max(SECOND_SAMPLE, 16 * settings.sample))).entropy
        assert sample is not None
        better = find_threshold(sample, target, settings.rule, manifest.grid[1])
        if better.value == manifest.settings["threshold"] or better.deviation(target) >= deviation:
            message += f"; no threshold comes closer, the next one gives {better.next_length:.3f}"
        else:
            message += (
                f"; the sample of {settings.sample} was not representative. `dpar patchify {out} NEW --threshold "
                f"{better.value!r}` moves the boundaries without a model: length {better.length:.3f} on "
                f"{better.sequences} sequences"
            )
    progress.say(message)
