"""Weights on disk and on the Hub: a directory with ``config.json``, ``model.safetensors`` and a model card.

model.save_pretrained("weights/")
model = DPAR.from_pretrained("weights/")                 # or a run, or "owner/name" on the Hugging Face Hub
tokenizer = VQTokenizer.from_pretrained("vq_ds16_c2i.pt")  # LlamaGen's and the authors' files: dpar/checkpoint_files.py

huggingface_hub's ``PyTorchModelHubMixin`` is not used: it loads configs and weights without the limits and checks
of the reader below, and does not support training runs, bundles or the authors' files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast

import torch
from safetensors.torch import save_file

from dpar.bundle import Part
from dpar.errors import ModelError
from dpar.files import atomic_path
from dpar.locations import CARD, CONFIG, WEIGHTS, local_folder, weights_path
from dpar.tensors import check_tensors, count_layers, first_line, read_tensors, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch import nn

FORMATS = {"dpar": 2, "llamagen": 1, "vq": 1}  # of config.json, by model type
LARGEST_CONFIG = 2**20  # bytes of config.json
LARGEST_DEPTH = 1024  # layers; building more takes minutes, and no published model has as many
LARGEST_SIZE = 2**24  # of a number in config.json; a product of two fits in 64 bits
Config = TypeVar("Config")
Grid = tuple[int, int]  # rows and columns of tokens


class Pretrained(Generic[Config]):
    """Loading and saving for a module with a dataclass ``config``. Mixed into ``nn.Module`` classes."""

    config_class: type[Any]
    model_type: str
    config: Config

    def save_pretrained(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Path:
        """Write the directory ``path`` atomically: a reader sees the old weights or the new ones.

        Args:
            path: created if missing.
            dtype: of stored floating-point tensors; None keeps each tensor's own.
        """
        module: nn.Module = self  # type: ignore[assignment]
        tensors = {
            name: t.to(dtype) if dtype is not None and t.is_floating_point() else t
            for name, t in module.state_dict().items()
        }
        return write_weights(path, self.model_type, dataclasses.asdict(cast("DataclassInstance", self.config)), tensors)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        heads: int | None = None,
        grid: Grid | None = None,
        rope: str | None = None,
    ) -> Self:
        """Return the model at ``path``, in evaluation mode, on the CPU, in float32.

        Args:
            path: a local directory, a training run, ``builtin:photos``, ``owner/name`` of a repository on the Hugging
                Face Hub, or a checkpoint file of LlamaGen or of the DPAR authors.
            heads: attention heads, if a file does not record them (see :mod:`dpar.checkpoint_files`).
            grid: rows and columns of tokens, likewise. Weights work only on the grid they were trained on.
            rope: rotary positions of a DPAR's patches, likewise.

        Raises:
            ModelError: there is no model, or it has another type; tensors are missing, unexpected or misshapen; or
                the model contradicts ``heads``, ``grid`` or ``rope``.
        """
        part: Part = "tokenizer" if cls.model_type == "vq" else "generator"
        name = weights_path(path, part)
        return cls.from_weights(read_weights(name, cls.model_type, heads=heads, grid=grid, rope=rope))

    @classmethod
    def from_weights(cls, weights: Weights) -> Self:
        """Return the model with weights from :func:`read_weights`; see :meth:`from_pretrained`."""
        config = weights.meta_model(cls).config
        model = cls(config)  # type: ignore[call-arg]  # a module's
        module: nn.Module = model  # type: ignore[assignment]
        module.load_state_dict(weights.tensors)
        module.eval()
        return model


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The contents of a model directory or checkpoint file."""

    model_type: str
    values: dict[str, Any]  # of the config
    tensors: dict[str, torch.Tensor]  # in the dtypes of the file
    source: str  # the file that holds the tensors, for messages
    config_source: str  # the file that holds the values, for messages

    def make_config(self, config_class: type[Any]) -> Any:
        """Return the config.

        Raises:
            ModelError: a value is unknown, invalid or of the wrong type, or asks for more layers than the tensors have.
        """
        config = _config(config_class, self.values, self.config_source)
        for field, prefix in config_class.layer_prefixes.items():
            value = getattr(config, field)
            layers, stored = len(value) if isinstance(value, tuple) else value, count_layers(self.tensors, prefix)
            if layers > LARGEST_DEPTH:
                raise ModelError(
                    f"{self.config_source}: {field} asks for {layers} layers; at most {LARGEST_DEPTH} are read"
                )
            if layers > stored:
                raise ModelError(
                    f"{self.config_source}: {field} asks for {layers} layers; {self.source} has tensors of {stored} "
                    f"({prefix}0 and so on)"
                )
        return config

    def meta_model(self, model_class: type[Any]) -> Any:
        """Return a model of these sizes on the meta device, so that sizes are checked before memory is allocated.

        Raises:
            ModelError: see :meth:`make_config`; or the tensors are not exactly those of such a model.
        """
        config = self.make_config(model_class.config_class)
        try:
            with torch.device("meta"):
                model = model_class(config)
        except ModelError as error:
            raise ModelError(f"{self.config_source}: {error}") from error
        except RuntimeError as error:  # more entries than 64 bits count
            raise ModelError(f"{self.config_source}: no model can have these sizes ({first_line(error)})") from error
        check_tensors(model, self.tensors, self.source)
        return model


def read_weights(
    path: str | os.PathLike[str],
    needed_type: str | None = None,
    *,
    heads: int | None = None,
    grid: Grid | None = None,
    rope: str | None = None,
) -> Weights:
    """Return config values and tensors of a model: a directory, a Hub repository or a checkpoint file.

    Args:
        path: see :meth:`Pretrained.from_pretrained`.
        needed_type: ``dpar``, ``llamagen``, ``vq``; None accepts any.
        heads: checked against the model's, or used if a file does not record them.
        grid: rows and columns of tokens, likewise.
        rope: rotary positions of a DPAR's patches, likewise.

    Raises:
        ModelError: there is no usable model, or it has another type, other heads or another grid.
    """
    if Path(path).is_file():
        return _read_file(Path(path), needed_type, heads, grid, rope)
    folder = local_folder(path)
    values = read_config(folder)
    kind = values.pop("model_type", None)
    if needed_type is not None and kind != needed_type:
        raise ModelError(f"{folder} holds a {shown(kind)} model; a {needed_type!r} model is needed here")
    _check_format(folder / CONFIG, str(kind), values.pop("format", None))
    if rope is not None and values.get("rope") != rope:
        raise ModelError(f"{folder} has rotary positions {values.get('rope')!r}; requested were {rope!r}")
    if heads is not None and values.get("heads") != heads:
        raise ModelError(f"{folder} has {values.get('heads')} heads; {heads} were requested")
    if grid is not None and (values.get("grid_height"), values.get("grid_width")) != tuple(grid):
        stored = f"{values.get('grid_height')}×{values.get('grid_width')}"
        raise ModelError(f"{folder} is for a grid of {stored}; {grid[0]}×{grid[1]} was requested")
    return Weights(
        model_type=str(kind),
        values=values,
        tensors=read_tensors(folder / WEIGHTS),
        source=str(folder / WEIGHTS),
        config_source=str(folder / CONFIG),
    )


def _check_format(path: Path, kind: str, version: object) -> None:
    """Raise ModelError unless config.json has the supported format version of this ``kind`` of model."""
    reads = FORMATS.get(kind)
    if reads is None:  # the caller refuses unknown kinds
        return
    if version == reads and not isinstance(version, bool):
        return
    what = f"{path} has format version {shown(version)}; this version reads {reads} of a {kind!r} model"
    if kind == "dpar" and version == 1:
        raise ModelError(f"{what}. Version 1 was another architecture: train the model again with `dpar train`")
    raise ModelError(what)


def _read_file(path: Path, needed_type: str | None, heads: int | None, grid: Grid | None, rope: str | None) -> Weights:
    from dpar import checkpoint_files

    if path.name in (CONFIG, CARD) or (path.name == WEIGHTS and (path.parent / CONFIG).is_file()):
        raise ModelError(f"{path} is a file of a model directory; pass the directory {path.parent}")
    checkpoint = checkpoint_files.read(path, heads=heads, grid=grid, rope=rope)
    if needed_type is not None and checkpoint.model_type != needed_type:
        what = checkpoint_files.describe(checkpoint.model_type, checkpoint.sizes)
        needed = checkpoint_files.TITLES[needed_type]
        raise ModelError(f"{path} is {what}; {needed} is needed here")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.tensors.values())
    if claimed > path.stat().st_size:  # a view of one stored number can claim any size
        raise ModelError(
            f"{path} has tensors of {claimed:,} bytes in a file of {path.stat().st_size:,}; it is damaged, or not a "
            "checkpoint that was saved in full"
        )
    return Weights(
        model_type=checkpoint.model_type,
        values=checkpoint.sizes,
        tensors=checkpoint.tensors,
        source=str(path),
        config_source=str(path),
    )


def write_weights(
    path: str | os.PathLike[str],
    model_type: str,
    values: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    note: str = "",
) -> Path:
    """Write a model directory atomically: a reader sees the old weights or the new ones.

    Args:
        path: created if missing.
        model_type: ``dpar``, ``llamagen`` or ``vq``.
        values: of the config.
        tensors: stored in their own dtypes.
        note: a sentence for the model card.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": model_type, "format": FORMATS[model_type], **values}
    # The weights are renamed last: a directory with weights is complete.
    with atomic_path(folder / WEIGHTS) as weights:
        # One metadata entry: safetensors writes several in random order, and equal weights need equal fingerprints.
        save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, weights, metadata={"format": "pt"})
        for name, text in {CONFIG: json.dumps(config, indent=2) + "\n", CARD: _card(model_type, config, note)}.items():
            with atomic_path(folder / name) as part:
                part.write_text(text, encoding="utf-8")
        shutil.copymode(folder / CONFIG, weights)  # safetensors creates files that only their owner can read
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed ``config.json`` of a model directory."""
    path = folder / CONFIG
    if not path.is_file():
        hint = (
            f"; if {WEIGHTS} is a checkpoint of DPAR's authors, name that file" if (folder / WEIGHTS).is_file() else ""
        )
        raise ModelError(f"{folder} is not a model directory: it has no {CONFIG}{hint}")
    if path.stat().st_size > LARGEST_CONFIG:
        raise ModelError(f"{path} cannot be read: {path.stat().st_size:,} bytes are too many for a {CONFIG}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{folder / CONFIG} is not a JSON object")
    return values


def model_type(path: str | os.PathLike[str]) -> str | None:
    """Return ``dpar``, ``llamagen`` or ``vq``, from the config of a directory or the tensors of a file."""
    if Path(path).is_file():
        return read_weights(path).model_type
    kind = read_config(local_folder(path)).get("model_type")
    return None if kind is None else str(kind)


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a model's weights file or of a checkpoint file, as manifests record it."""
    weights = Path(path) if Path(path).is_file() else local_folder(path) / WEIGHTS
    with open(weights, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config(config_class: type[Any], values: dict[str, Any], source: str) -> Any:
    known, removed = {f.name for f in dataclasses.fields(config_class)}, config_class.removed_fields
    values = {name: value for name, value in values.items() if name not in removed or removed[name] != value}
    unknown = [shown(name, quote=False) for name in sorted(set(values) - known)]
    if unknown:
        raise ModelError(f"{source} has settings that {config_class.__name__} does not know: {', '.join(unknown)}")
    hints = typing.get_type_hints(config_class)
    for name, value in values.items():
        if (needed := _needed(hints[name], value)) is not None:
            raise ModelError(f"{source}: {name} is {shown(value)}; it must be {needed}")
    # JSON has no tuples: tuple fields are stored as lists.
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return config_class(**given)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error


def _needed(hint: Any, value: object) -> str | None:
    """Return what a config field of this type takes, or None if ``value`` is valid."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        valid = isinstance(value, (list, tuple)) and all(_needed(choices[0], item) is None for item in value)
        return None if valid else "a list of whole numbers"
    if typing.get_origin(hint) is typing.Literal:
        return None if isinstance(value, str) and value in choices else f"one of {', '.join(choices)}"
    if hint is bool:
        return None if isinstance(value, bool) else "true or false"
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_SIZE
    if hint is float:
        return None if number else "a number"
    assert hint is int, hint
    return None if number and isinstance(value, int) else f"a whole number of at most {LARGEST_SIZE:,}"


def _card(kind: str, config: dict[str, Any], note: str) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
    return (
        f"---\nlibrary_name: dpar\ntags: [dpar, {kind}, image-generation]\n---\n\n# {kind}\n\n"
        f"Weights of the `dpar` toolkit. Load them with `from_pretrained` of the class that `model_type` names.\n\n"
        f"{note}{chr(10) * 2 if note else ''}"
        f"| setting | value |\n| --- | --- |\n{rows}\n"
    )
