"""A trained run or a bundle with everything needed to sample from it: entropy model, tokenizer and patch rule.

generator = Generator.load(Path("run"), settings)                # or weights of a LlamaGen or DPAR trained elsewhere
drawn = generator.sample(labels, indices, cfg_scale=2.0)         # codes, starts
pixels = generator.decode(drawn.codes)
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dpar.bundle import Part
from dpar.guidance import SamplingOptions
from dpar.llamagen import LlamaGen
from dpar.locations import CONFIG, RUN, bundle_folder
from dpar.model import DPAR
from dpar.patching import PatchRule
from dpar.sampling import Sampler, check_same_tokens
from dpar.tokenizer import VQTokenizer, to_uint8
from pipeline.generation.batch_size import sampling_batch
from pipeline.runs.run_folder import read_run
from pipeline.runs.weights import (
    bundle_inputs,
    check_grid_and_codebook,
    fingerprint_of,
    load_entropy_model,
    load_model,
    load_tokenizer,
)
from pipeline.runtime.device import autocast, choose_device, precision_name
from pipeline.runtime.errors import StageError
from pipeline.settings.fields import Precision
from pipeline.settings.sampling import SamplingSettings
from shards.files import file_sha256
from shards.reader import Artifact

CHECKPOINT = "checkpoint.json"  # in a checkpoint of a run


@dataclass(frozen=True, kw_only=True)
class SampledImages:
    """Sampled images, as tokens."""

    codes: NDArray[np.int64]  # (n, N)
    starts: NDArray[np.bool_]  # (n, N)


@dataclass(frozen=True, kw_only=True)
class KeptTokens:
    """Tokens of an image that are kept when the rest is sampled."""

    codes: NDArray[np.int64]  # (N,)
    kept: NDArray[np.bool_]  # (N,)


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A model with its tokenizer, entropy model and patch rule, on ``device`` and in evaluation mode."""

    model: DPAR | LlamaGen
    entropy_model: LlamaGen | None
    tokenizer: VQTokenizer
    name: str  # of the run or the weights
    weights_fingerprint: str
    tokenizer_origin: dict[str, str]  # path and fingerprint of the weights that encoded the training data
    entropy_origin: dict[str, str] | None  # likewise, of the entropy model
    class_names: tuple[str, ...]
    trained_rule: PatchRule | None  # of the training data; None for LlamaGen
    rule: PatchRule | None  # to sample with: the trained one, or that of with_rule
    settings: SamplingSettings
    device: torch.device
    sampler: Sampler  # of the models; independent of the rule, so that its caches are reused

    @classmethod
    def load(
        cls, run: Path, settings: SamplingSettings, reference: Artifact | None = None, weights: str | None = None
    ) -> Generator:
        """Load a run of ``dpar train``, or weights of a LlamaGen or a DPAR that was trained elsewhere.

        Args:
            run: the run's directory, or weights inside it; a bundle; a checkpoint file of LlamaGen or of the DPAR
                authors; or a model directory that belongs to no run.
            settings: how to sample, and paths of parts that replace the recorded ones.
            reference: for weights without a run, the artifact that supplies tokenizer and class names, and for a DPAR
                also the entropy model and patch rule, if it has them.
            weights: weights or a checkpoint of the run to use instead of its newest weights.

        Raises:
            StageError, ModelError: it is not such a run, has no weights yet, or its parts are missing or incompatible.
        """
        bundle = bundle_folder(run)
        home = run if bundle is not None else run_of(run)
        if (bundle is not None or home is None) and weights is not None:
            raise StageError(f"--checkpoint belongs to a run; {run} has no checkpoints")
        if home is None:
            return cls._of_weights(run, settings, reference)
        name = weights or str(run)
        if bundle is not None:
            inputs = bundle_inputs(bundle)
            model = load_model(name)
        else:
            record = read_run(home)
            if record["kind"] != "train":
                raise StageError(f"{home} is a run of `dpar {record['kind']}`; a run of `dpar train` is needed")
            inputs = record["inputs"]
            model = _load_weights(home, name)
        tokenizer = _part(inputs["tokenizer"], settings.tokenizer, load_tokenizer, "--tokenizer")
        _same_codebook(tokenizer, model)
        if model.config.classes != len(inputs["class_names"]):
            raise StageError(
                f"{name} is a model of {model.config.classes} classes, the run {home} of {len(inputs['class_names'])}"
            )
        device = choose_device(settings.device)
        entropy_model = entropy_origin = trained = None
        if isinstance(model, DPAR):
            trained = trained_rule(inputs)
            if trained.strategy == "entropy":
                entropy_origin = inputs["entropy_model"]
                entropy_model = _part(entropy_origin, settings.entropy_model, load_entropy_model, "--entropy-model")
                check_same_tokens(model, entropy_model)
        return cls(
            model=model.to(device),
            entropy_model=None if entropy_model is None else entropy_model.to(device),
            tokenizer=tokenizer.to(device),
            name=name,
            weights_fingerprint=weights_fingerprint(name),
            tokenizer_origin=_moved(inputs["tokenizer"], settings.tokenizer, "tokenizer"),
            entropy_origin=(
                None if entropy_origin is None else _moved(entropy_origin, settings.entropy_model, "entropy_model")
            ),
            class_names=tuple(inputs["class_names"]),
            trained_rule=trained,
            rule=trained,
            settings=settings,
            device=device,
            sampler=Sampler(model, entropy_model),
        )

    @classmethod
    def _of_weights(cls, path: Path, settings: SamplingSettings, reference: Artifact | None) -> Generator:
        """Return a model that was trained elsewhere, with class names from ``reference`` or numbers."""
        model = load_model(str(path))
        classes = model.config.classes
        if classes == 0:
            raise StageError(f"{path} has no classes: it is an entropy model, not a generator")
        origin: dict[str, str] | None = None
        names = tuple(str(label) for label in range(classes))
        if reference is not None:
            manifest = reference.manifest
            origin, names = manifest.tokenizer, manifest.class_names
            check_grid_and_codebook(model.config, manifest, str(path), str(reference.folder))
            if len(names) != classes:
                raise StageError(f"{path} is a model of {classes} classes; {reference.folder} has {len(names)}")
        elif settings.tokenizer is None:
            raise StageError(f"{path} does not say which tokenizer decodes its codes; name it with --tokenizer")
        tokenizer = _part(origin, settings.tokenizer, load_tokenizer, "--tokenizer")
        _same_codebook(tokenizer, model)
        device = choose_device(settings.device)
        entropy_model = entropy_origin = trained = None
        if isinstance(model, DPAR):
            patches = None if reference is None or reference.manifest.kind != "patches" else reference.manifest
            trained = PatchRule() if patches is None else PatchRule.from_dict(patches.settings)
            if trained.strategy == "entropy":
                entropy_origin = None if patches is None else patches.entropy_model
                if entropy_origin is None and settings.entropy_model is None:
                    raise StageError(
                        f"{path} does not say which entropy model places its patches; name it with --entropy-model"
                    )
                entropy_model = _part(entropy_origin, settings.entropy_model, load_entropy_model, "--entropy-model")
                entropy_origin = _moved(entropy_origin, settings.entropy_model, "entropy_model")
                check_same_tokens(model, entropy_model)
        return cls(
            model=model.to(device),
            entropy_model=None if entropy_model is None else entropy_model.to(device),
            tokenizer=tokenizer.to(device),
            name=str(path),
            weights_fingerprint=fingerprint_of(str(path)),
            tokenizer_origin=_moved(origin, settings.tokenizer, "tokenizer"),
            entropy_origin=entropy_origin,
            class_names=names,
            trained_rule=trained,
            rule=trained,
            settings=settings,
            device=device,
            sampler=Sampler(model, entropy_model),
        )

    def with_rule(self, threshold: float | None, max_length: int | None) -> Generator:
        """Return the generator with another threshold (nats) or maximum length (0: no limit); None: as trained.

        Raises:
            StageError: the model's patches do not take these values, or no threshold is known.
        """
        row_reset = self.settings.row_reset
        if self.trained_rule is None:
            if threshold is not None or max_length is not None or row_reset is not None:
                raise StageError("a LlamaGen has no patches; omit --threshold, --max-length and --row-reset")
            return self
        return dataclasses.replace(self, rule=changed_rule(self.trained_rule, threshold, max_length, row_reset))

    def sample(
        self,
        labels: NDArray[np.integer],
        indices: NDArray[np.integer],
        cfg_scale: float,
        known: KeptTokens | None = None,
        advance: Callable[[int], None] = lambda images: None,
    ) -> SampledImages:
        """Sample images; image ``indices[i]`` is the same in any batch.

        Args:
            labels: (n,) classes.
            indices: (n,) indices of the images in the output.
            cfg_scale: s of guidance.
            known: tokens that every image keeps.
            advance: called with the number of images sampled since the last call.
        """
        s, n = self.settings, len(labels)
        batch = s.batch or sampling_batch(
            self.model,
            self.entropy_model,
            guided=cfg_scale != 1.0,
            device=self.device,
            bf16=precision_name(self.device, s.precision) == "bf16",
        )
        with autocast(self.device, s.precision):
            codes, starts = self.sampler.sample(
                torch.from_numpy(np.asarray(labels, np.int64)),
                self.rule,
                SamplingOptions(
                    cfg_scale=cfg_scale,
                    cfg_schedule=s.cfg_schedule,
                    cfg_power=s.cfg_power,
                    temperature=s.temperature,
                    top_k=s.top_k,
                    top_p=s.top_p,
                    seed=s.seed,
                ),
                indices=[int(i) for i in indices],
                batch=batch,
                known=None if known is None else torch.from_numpy(known.codes).expand(n, -1),
                keep=None if known is None else torch.from_numpy(known.kept).expand(n, -1),
                advance=advance,
            )
        return SampledImages(codes=codes.cpu().numpy(), starts=starts.cpu().numpy())

    def decode(self, codes: NDArray[np.integer], size: int | None = None) -> NDArray[np.uint8]:
        """Decode codes (n, N) to pictures (n, H, W, 3) uint8; see :func:`decode`."""
        return decode(self.tokenizer, codes, self.grid, precision=self.settings.decode_precision, size=size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.model.config.grid_height, self.model.config.grid_width

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        times = self.tokenizer.config.downsampling
        return self.grid[0] * times, self.grid[1] * times


def run_of(path: Path) -> Path | None:
    """Return the run at ``path``, or the run that contains the weights at ``path``; None for weights without a run.

    Any other path is returned unchanged, so that reading it as a run raises the error.
    """
    weights = path.is_file() or (path / CONFIG).is_file()
    if (path / RUN).is_file() or not weights:
        return path
    return next((folder for folder in list(path.absolute().parents)[:2] if (folder / RUN).is_file()), None)


@torch.no_grad()
def decode(
    tokenizer: VQTokenizer,
    codes: NDArray[np.integer],
    grid: tuple[int, int],
    *,
    batch: int = 16,
    precision: Precision = "fp32",
    size: int | None = None,
) -> NDArray[np.uint8]:
    """Decode codes (n, N) to pictures (n, H, W, 3) uint8.

    With ``size``, pictures are resized to ``size`` px along a side before rounding to integers: bicubic without
    antialiasing, as LlamaGen's sampling script resizes 384 px to 256 px for FID.
    """
    device = tokenizer.quantize.embedding.weight.device
    chunks = []
    for begin in range(0, len(codes), batch):
        chunk = torch.from_numpy(codes[begin : begin + batch].astype(np.int64)).to(device)
        with autocast(device, precision):
            images = tokenizer.decode(chunk, grid)
        if size is not None and images.shape[-2:] != (size, size):
            images = F.interpolate(images.float(), size=(size, size), mode="bicubic")
        chunks.append(to_uint8(images).cpu().numpy())
    return np.concatenate(chunks)


def trained_rule(inputs: dict[str, Any]) -> PatchRule:
    """Return the patch rule of a run's training data, from the recorded inputs."""
    if inputs["patch_rule"] is None:
        raise StageError("the run was trained without patches; DPAR cannot be sampled from it")
    return PatchRule.from_dict(inputs["patch_rule"])


def changed_rule(
    trained: PatchRule, threshold: float | None, max_length: int | None, row_reset: bool | None
) -> PatchRule:
    """Return the rule of the training data with the given values replaced; a ``max_length`` of 0 is no limit.

    Raises:
        StageError: the threshold is not known, or the rule is static.
    """
    if trained.strategy == "static":
        if threshold is not None or max_length is not None or row_reset is not None:
            raise StageError(
                "the model was trained on static patches, which have no --threshold, --max-length or --row-reset"
            )
        return trained
    rule = dataclasses.replace(
        trained,
        threshold=trained.threshold if threshold is None else threshold,
        max_length=trained.max_length if max_length is None else max_length or None,
        row_reset=trained.row_reset if row_reset is None else row_reset,
    )
    if rule.threshold is None:
        raise StageError("weights without a run do not record an entropy threshold; give --threshold (nats)")
    return rule


def weights_fingerprint(name: str) -> str:
    """Return the SHA-256 of the weights called ``name``; for a checkpoint of a run, of all its files."""
    if not (Path(name) / CHECKPOINT).is_file():
        return fingerprint_of(name)
    digests = [file_sha256(path) for path in sorted(Path(name).glob("*.safetensors"))]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _load_weights(run: Path, name: str) -> DPAR | LlamaGen:
    """Return the model of a run with the weights called ``name``."""
    if not (Path(name) / CHECKPOINT).is_file():
        return load_model(name)
    from pipeline.runs.checkpoints import load_full_tensors

    model = load_model(str(run))
    model.load_state_dict(load_full_tensors(Path(name), "model."))
    return model


def _same_codebook(tokenizer: VQTokenizer, model: DPAR | LlamaGen) -> None:
    wanted, given = tokenizer.config.codebook_size, model.config.codebook_size
    if wanted != given:
        raise StageError(f"the tokenizer has {wanted} codes, the model {given}")


def _moved(origin: dict[str, str] | None, given: str | None, part: Part) -> dict[str, str]:
    """Return the path and fingerprint of a part: those of the path ``given`` by the user, else the recorded ones."""
    if given is None:
        assert origin is not None  # or _part would have raised
        return origin
    return {"path": given, "fingerprint": fingerprint_of(given, part)}


def _part(origin: dict[str, str] | None, given: str | None, load: Any, option: str) -> Any:
    """Load a part from the path ``given`` by the user, else from the recorded one; its fingerprint must match."""
    if given is not None:
        return load(given, None if origin is None else origin["fingerprint"])
    if origin is None:
        raise StageError(f"the run does not say which one it needs; name it with {option}")
    try:
        return load(origin["path"], origin["fingerprint"])
    except ValueError as error:
        raise StageError(f"{error}. If it has moved, name it with {option}") from error
