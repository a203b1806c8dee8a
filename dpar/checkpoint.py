"""Weights on disk and on the Hub: a directory with ``config.json``, ``model.safetensors`` and a model card.

model.save_pretrained("weights/")
model = DPAR.from_pretrained("weights/")                 # or a run, or "owner/name" on the Hugging Face Hub
tokenizer = VQTokenizer.from_pretrained("vq_ds16_c2i.pt")  # LlamaGen's and the authors' files: dpar/llamagen_files.py
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpar.errors import ModelError

if TYPE_CHECKING:
    import torch
    from _typeshed import DataclassInstance
    from torch import nn

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMATS = {"dpar": 2, "llamagen": 1, "vq": 1}  # of config.json, by model type
RUN, RUN_WEIGHTS = "run.json", "model"  # a training run, and where in it its newest weights are
BUILTIN = {"builtin:photos": "photos-vq-8"}  # ship in dpar/weights, whose README.md says how they were made
Config = TypeVar("Config")
Grid = tuple[int, int]  # rows and columns of tokens


class Pretrained(Generic[Config]):
    """Loading and saving for a module with a dataclass ``config``. Mixed into ``nn.Module`` classes."""

    config_class: type[Any]
    model_type: str
    config: Config

    def save_pretrained(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Path:
        """Writes the directory ``path``; a reader sees the old weights or the new, never half of them.

        Args:
            path: made if it is not there.
            dtype: what floating-point tensors are stored as; None keeps theirs.
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
            heads: of a file that does not say how many (:mod:`dpar.llamagen_files` says where that is looked for).
            grid: rows and columns of tokens, likewise. Weights trained on one grid serve that grid alone.
            rope: rotary positions of a DPAR's patches, likewise.

        Raises:
            ModelError: nothing is there, it is another kind of model, tensors are missing, left over or misshapen, or
                it has other heads, another grid or other rotary positions than asked for.
        """
        return cls.from_weights(read_weights(path, cls.model_type, heads=heads, grid=grid, rope=rope))

    @classmethod
    def from_weights(cls, weights: Weights) -> Self:
        """The model of :func:`read_weights`; see :meth:`from_pretrained`."""
        model = cls(weights.make_config(cls.config_class))  # type: ignore[call-arg]  # a module's
        module: nn.Module = model  # type: ignore[assignment]
        load_tensors(module, weights.tensors, weights.source)
        module.eval()
        return model


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model as it lies on disk."""

    model_type: str
    values: dict[str, Any]  # of its config
    tensors: dict[str, torch.Tensor]  # in the dtypes of the file
    source: str  # the file that holds the tensors, for messages
    config_source: str  # likewise of the values

    def make_config(self, config_class: type[Any]) -> Any:
        """The config; raises ModelError for values that it does not know or refuses."""
        return _config(config_class, self.values, self.config_source)


def read_weights(
    path: str | os.PathLike[str],
    wanted: str | None = None,
    *,
    heads: int | None = None,
    grid: Grid | None = None,
    rope: str | None = None,
) -> Weights:
    """Config values and tensors of a model: a directory, a Hub repository or a checkpoint file.

    Args:
        path: as :meth:`Pretrained.from_pretrained` takes it.
        wanted: the model type that is needed: ``dpar``, ``llamagen``, ``vq``; None takes any.
        heads: what the model must have, or what fills in for a file that does not say.
        grid: rows and columns of tokens, likewise.
        rope: rotary positions of a DPAR's patches, likewise.

    Raises:
        ModelError: nothing usable is there, or it is of another type, for other heads or another grid.
    """
    if Path(path).is_file():
        return _read_file(Path(path), wanted, heads, grid, rope)
    folder = local_folder(path)
    values = read_config(folder)
    found = values.pop("model_type", None)
    if wanted is not None and found != wanted:
        raise ModelError(f"{folder} holds a {found!r} model; a {wanted!r} model is needed here")
    _check_format(folder / CONFIG, str(found), values.pop("format", None))
    if rope is not None and values.get("rope") != rope:
        raise ModelError(f"{folder} has rotary positions {values.get('rope')!r}; {rope!r} were asked for")
    if heads is not None and values.get("heads") != heads:
        raise ModelError(f"{folder} has {values.get('heads')} heads; {heads} were asked for")
    if grid is not None and (values.get("grid_height"), values.get("grid_width")) != tuple(grid):
        theirs = f"{values.get('grid_height')}×{values.get('grid_width')}"
        raise ModelError(f"{folder} is for a grid of {theirs}; {grid[0]}×{grid[1]} was asked for")
    return Weights(
        model_type=str(found),
        values=values,
        tensors=read_tensors(folder / WEIGHTS),
        source=str(folder / WEIGHTS),
        config_source=str(folder / CONFIG),
    )


def _check_format(path: Path, kind: str, version: object) -> None:
    """Raises ModelError unless config.json of a model of this ``kind`` has the format version that is read here."""
    reads = FORMATS.get(kind)
    if version == reads or reads is None:  # an unknown kind gets its own message from who wanted a model
        return
    what = f"{path} has format version {version!r}; this version reads {reads} of a {kind!r} model"
    if kind == "dpar" and version == 1:
        raise ModelError(f"{what}. Version 1 was another architecture: train the model again with `dpar train`")
    raise ModelError(what)


def _read_file(path: Path, wanted: str | None, heads: int | None, grid: Grid | None, rope: str | None) -> Weights:
    from dpar import llamagen_files

    if path.name in (CONFIG, CARD) or (path.name == WEIGHTS and (path.parent / CONFIG).is_file()):
        raise ModelError(f"{path} is a file of a model directory; name the directory {path.parent}")
    found = llamagen_files.read(path, heads=heads, grid=grid, rope=rope)
    if wanted is not None and found.model_type != wanted:
        what = llamagen_files.describe(found.model_type, found.sizes)
        needed = llamagen_files.TITLES[wanted]
        raise ModelError(f"{path} is {what}; {needed} is needed here")
    return Weights(
        model_type=found.model_type,
        values=found.sizes,
        tensors=found.tensors,
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
    """Writes a model directory; a reader sees the old weights or the new, never half of them.

    Args:
        path: made if it is not there.
        model_type: ``dpar``, ``llamagen`` or ``vq``.
        values: the config's.
        tensors: stored in their own dtypes.
        note: a sentence for the model card.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": model_type, "format": FORMATS[model_type], **values}
    part = folder / (WEIGHTS + ".part")
    # One entry: safetensors writes several in random order, and equal weights must have equal fingerprints.
    save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, part, metadata={"format": "pt"})
    _write(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    _write(folder / CARD, _card(model_type, config, note))
    shutil.copymode(folder / CONFIG, part)  # safetensors lets nobody else read what it writes
    os.replace(part, folder / WEIGHTS)
    return folder


def weights_path(name: str | os.PathLike[str]) -> str:
    """The directory, checkpoint file or Hub name of the weights called ``name``: a run stands for its ``model/``.

    Raises:
        ModelError: an unknown built-in name, or a run without weights yet.
    """
    name = os.fspath(name)
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise ModelError(f"no weights are called {name!r}; built in are {', '.join(BUILTIN)}")
        return str(Path(__file__).parent / "weights" / BUILTIN[name])
    if (Path(name) / RUN).is_file():
        if not (Path(name) / RUN_WEIGHTS / CONFIG).is_file():
            raise ModelError(f"the run {name} has no weights yet: its first checkpoint is still to come")
        return str(Path(name) / RUN_WEIGHTS)
    return name


def local_folder(path: str | os.PathLike[str]) -> Path:
    """The directory of a model: see :func:`weights_path`; of a Hub repository, a snapshot."""
    path = weights_path(path)
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{folder} is a file; a directory with {CONFIG} and {WEIGHTS} is needed")
    name = str(path)
    if folder.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        raise ModelError(f"no model at {folder}: there is no such file")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ModelError(f"{name} is no local directory, and the Hub did not give it: {error}") from error
    raise ModelError(f"no model at {folder}: there is no such directory")


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a model directory."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = (
            f"; if {WEIGHTS} is a checkpoint of DPAR's authors, name that file" if (folder / WEIGHTS).is_file() else ""
        )
        raise ModelError(f"{folder} is not a model directory: it has no {CONFIG}{hint}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{folder / CONFIG} is not a JSON object")
    return values


def model_type(path: str | os.PathLike[str]) -> str | None:
    """What kind of model is there, ``dpar``, ``llamagen`` or ``vq``: by its config, or by the tensors of a file."""
    if Path(path).is_file():
        return read_weights(path).model_type
    found = read_config(local_folder(path)).get("model_type")
    return None if found is None else str(found)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    if not path.is_file():
        raise ModelError(f"{path.parent} holds no weights yet: {path.name} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from error


def load_tensors(module: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Fills ``module`` with exactly ``tensors``; raises ModelError that lists what does not fit."""
    check_tensors(module, tensors, source)
    module.load_state_dict(tensors)


def check_tensors(module: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Raises ModelError, with a list, where ``tensors`` are not exactly those of ``module``, which may be on meta."""
    own = module.state_dict()
    faults = [f"missing {name}" for name in own if name not in tensors]
    faults += [f"unexpected {name}" for name in tensors if name not in own]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise ModelError(f"{source} does not fit a {type(module).__name__}: {shown}")


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a model's weights file, or of LlamaGen's own file, as manifests record it."""
    weights = Path(path) if Path(path).is_file() else local_folder(path) / WEIGHTS
    with open(weights, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config(config_class: type[Any], values: dict[str, Any], source: str) -> Any:
    known = {f.name for f in dataclasses.fields(config_class)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ModelError(f"{source} has settings that {config_class.__name__} does not know: {', '.join(unknown)}")
    # JSON has no tuples; a dataclass field that is one comes back as a list.
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _card(kind: str, config: dict[str, Any], note: str) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
    return (
        f"---\nlibrary_name: dpar\ntags: [dpar, {kind}, image-generation]\n---\n\n# {kind}\n\n"
        f"Weights of the `dpar` toolkit. Load them with `from_pretrained` of the class that `model_type` names.\n\n"
        f"{note}{chr(10) * 2 if note else ''}"
        f"| setting | value |\n| --- | --- |\n{rows}\n"
    )
