"""A trained run, with everything that sampling from it needs: model, entropy model, tokenizer and patch rule.

generator = Generator.load(Path("run"), settings)                # or the weights of a LlamaGen trained elsewhere
drawn = generator.sample(labels, indices, cfg_scale=2.0)         # codes, starts, pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpar.checkpoint import CONFIG, model_type
from dpar.llamagen import LlamaGen
from dpar.model import DPAR
from dpar.patching import static_starts
from dpar.sampling import check_same_tokens, sample
from dpar.tokenizer import VQTokenizer, to_uint8
from pipeline.device import autocast, choose_device
from pipeline.errors import StageError
from pipeline.progress import Progress
from pipeline.run import read_run
from pipeline.settings import Precision, SamplingSettings
from pipeline.sources.source import nearest
from pipeline.weights import fingerprint_of, load_entropy_model, load_model, load_tokenizer, same_tokens
from shards.reader import Artifact


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Sampled images."""

    codes: NDArray[np.int64]  # (n, N)
    starts: NDArray[np.bool_]  # (n, N)
    pixels: NDArray[np.uint8]  # (n, H, W, 3)

    @classmethod
    def joined(cls, parts: Sequence[Drawn]) -> Drawn:
        """All images of ``parts``, in order."""
        return cls(
            codes=np.concatenate([part.codes for part in parts]),
            starts=np.concatenate([part.starts for part in parts]),
            pixels=np.concatenate([part.pixels for part in parts]),
        )


@dataclass(frozen=True, kw_only=True)
class Generator:
    """What :meth:`load` found; everything is on ``device`` and in evaluation mode."""

    model: DPAR | LlamaGen
    entropy_model: LlamaGen | None
    tokenizer: VQTokenizer
    tokenizer_fingerprint: str  # of the weights that made what the model was trained on, as far as is known
    class_names: tuple[str, ...]
    rule: dict[str, Any]  # arguments of dpar.sample: threshold, max_length, row_reset, static_length
    settings: SamplingSettings
    device: torch.device

    @classmethod
    def load(cls, run: Path, settings: SamplingSettings, reference: Artifact | None = None) -> Generator:
        """Loads a run of ``dpar train``, or weights of a LlamaGen that was trained elsewhere.

        Args:
            run: the run's directory; or LlamaGen's own file, or a model directory without a ``run.json``.
            settings: how to sample, and where other weights than the recorded ones are to be found.
            reference: what weights without a run take their tokenizer and their class names from.

        Raises:
            StageError, ModelError: it is no such run, has no weights yet, or its parts are gone or do not fit.
        """
        if is_weights(run):
            return cls._of_weights(run, settings, reference)
        record = read_run(run)
        if record["kind"] != "train":
            raise StageError(f"{run} is a run of `dpar {record['kind']}`; one of `dpar train` is needed")
        inputs = record["inputs"]
        model = load_model(str(run))
        tokenizer = _part(inputs["tokenizer"], settings.tokenizer, load_tokenizer, "--tokenizer")
        if tokenizer.config.codebook_size != model.config.codebook_size:
            raise StageError(
                f"the tokenizer has {tokenizer.config.codebook_size} codes, the model {model.config.codebook_size}"
            )
        rule: dict[str, Any] = {}
        entropy_model = None
        if isinstance(model, DPAR):
            rule = sampling_rule(inputs["patch_rule"], settings)
            if rule["static_length"] is None:
                origin = inputs["entropy_model"]
                entropy_model = _part(origin, settings.entropy_model, load_entropy_model, "--entropy-model")
                check_same_tokens(model, entropy_model)
        device = choose_device(settings.device)
        return cls(
            model=model.to(device),
            entropy_model=None if entropy_model is None else entropy_model.to(device),
            tokenizer=tokenizer.to(device),
            tokenizer_fingerprint=inputs["tokenizer"]["fingerprint"],
            class_names=tuple(inputs["class_names"]),
            rule=rule,
            settings=settings,
            device=device,
        )

    @classmethod
    def _of_weights(cls, path: Path, settings: SamplingSettings, reference: Artifact | None) -> Generator:
        """A LlamaGen that was trained elsewhere: its classes have numbers, or the names of ``reference``."""
        if model_type(path) == DPAR.model_type:
            raise StageError(
                f"{path} holds a DPAR model without its run, and only run.json says which entropy model and which "
                "patch rule it was trained with; name the run of `dpar train`"
            )
        model = LlamaGen.from_pretrained(path)
        classes = model.config.classes
        if classes == 0:
            raise StageError(f"{path} is a LlamaGen without classes; it serves as an entropy model, not for sampling")
        origin: dict[str, str] | None = None
        names = tuple(str(label) for label in range(classes))
        if reference is not None:
            manifest = reference.manifest
            origin, names = manifest.tokenizer, manifest.class_names
            same_tokens(model.config, manifest, str(path), str(reference.folder))
            if len(names) != classes:
                raise StageError(f"{path} is a LlamaGen for {classes} classes; {reference.folder} has {len(names)}")
        elif settings.tokenizer is None:
            raise StageError(f"{path} does not say which tokenizer decodes its codes; name it with --tokenizer")
        tokenizer = _part(origin, settings.tokenizer, load_tokenizer, "--tokenizer")
        if tokenizer.config.codebook_size != model.config.codebook_size:
            raise StageError(
                f"the tokenizer has {tokenizer.config.codebook_size} codes, the model {model.config.codebook_size}"
            )
        device = choose_device(settings.device)
        return cls(
            model=model.to(device),
            entropy_model=None,
            tokenizer=tokenizer.to(device),
            tokenizer_fingerprint=fingerprint_of(str(settings.tokenizer)) if origin is None else origin["fingerprint"],
            class_names=names,
            rule={},
            settings=settings,
            device=device,
        )

    def sample(
        self,
        labels: NDArray[np.integer],
        indices: NDArray[np.integer],
        cfg_scale: float,
        progress: Progress,
        title: str,
    ) -> Drawn:
        """Images of these classes, (n,); image ``indices[i]`` of the run is the same in any batch."""
        codes, starts, pixels = [], [], []
        s = self.settings
        with progress.task(title, len(labels), "images") as task:
            for begin in range(0, len(labels), s.batch):
                part = slice(begin, begin + s.batch)
                with autocast(self.device, s.precision):
                    drawn_codes, drawn_starts = sample(
                        self.model,
                        self.entropy_model,
                        torch.from_numpy(np.asarray(labels[part], np.int64)),
                        cfg_scale=cfg_scale,
                        temperature=s.temperature,
                        top_k=s.top_k,
                        top_p=s.top_p,
                        seed=s.seed,
                        indices=[int(i) for i in indices[part]],
                        **self.rule,
                    )
                codes.append(drawn_codes.cpu().numpy())
                starts.append(drawn_starts.cpu().numpy())
                pixels.append(decode(self.tokenizer, codes[-1], self.grid, batch=s.batch, precision=s.precision))
                task.advance(len(codes[-1]))
        return Drawn(codes=np.concatenate(codes), starts=np.concatenate(starts), pixels=np.concatenate(pixels))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.model.config.grid_height, self.model.config.grid_width


def is_weights(path: Path) -> bool:
    """Whether weights lie at ``path`` without a run around them: a file, or a directory with a config."""
    return path.is_file() or ((path / CONFIG).is_file() and not (path / "run.json").is_file())


@torch.no_grad()
def decode(
    tokenizer: VQTokenizer,
    codes: NDArray[np.integer],
    grid: tuple[int, int],
    *,
    batch: int = 32,
    precision: Precision = "fp32",
) -> NDArray[np.uint8]:
    """Pictures (n, H, W, 3) uint8 of codes (n, N)."""
    device = tokenizer.quantize.embedding.weight.device
    found = []
    for begin in range(0, len(codes), batch):
        chunk = torch.from_numpy(codes[begin : begin + batch].astype(np.int64)).to(device)
        with autocast(device, precision):
            found.append(to_uint8(tokenizer.decode(chunk, grid)).cpu().numpy())
    return np.concatenate(found)


def sampling_rule(trained: dict[str, Any] | None, settings: SamplingSettings) -> dict[str, Any]:
    """Arguments of :func:`dpar.sample` for boundaries: those of the training data, where settings say nothing else."""
    if trained is None:
        raise StageError("the run was trained without patches; DPAR cannot be sampled from it")
    if trained["strategy"] == "static":
        if settings.threshold is not None or settings.max_length is not None:
            raise StageError("the run was trained on static patches, which have no --threshold or --max-length")
        static_starts(1, trained["static_length"])  # refuses what it cannot mean
        return {"static_length": trained["static_length"], "threshold": None, "max_length": None, "row_reset": False}
    threshold = trained["threshold"] if settings.threshold is None else settings.threshold
    limit = trained["max_length"] if settings.max_length is None else settings.max_length
    return {
        "threshold": threshold,
        "max_length": limit or None,
        "row_reset": trained["row_reset"],
        "static_length": None,
    }


def choose_classes(names: tuple[str, ...], wanted: tuple[str, ...]) -> list[int]:
    """Labels of classes given by name or number; all of them if none is given.

    Raises:
        StageError: there is no such class, with the nearest name.
    """
    chosen = []
    for item in wanted:
        if item in names:
            chosen.append(names.index(item))
        elif item.isdigit() and int(item) < len(names):
            chosen.append(int(item))
        else:
            raise StageError(f"no class is {item!r}: numbers go from 0 to {len(names) - 1}; {nearest(item, names)}")
    return chosen or list(range(len(names)))


def _part(origin: dict[str, str] | None, given: str | None, load: Any, option: str) -> Any:
    """A model by the path that the user gave, or by the one recorded, whose weights must be the recorded ones."""
    if given is not None:
        return load(given, None if origin is None else origin["fingerprint"])
    if origin is None:
        raise StageError(f"the run does not say which one it needs; name it with {option}")
    try:
        return load(origin["path"], origin["fingerprint"])
    except ValueError as error:
        raise StageError(f"{error}. If it has moved, name it with {option}") from error
