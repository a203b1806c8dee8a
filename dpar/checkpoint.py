"""Weights on disk and on the Hub: a directory with ``config.json``, ``model.safetensors`` and a model card.

model.save_pretrained("weights/")
model = DPAR.from_pretrained("weights/")                 # or "owner/name" on the Hugging Face Hub
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
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
FORMAT = 1
Config = TypeVar("Config")


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
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        module: nn.Module = self  # type: ignore[assignment]
        tensors = {
            name: (t.to(dtype) if dtype is not None and t.is_floating_point() else t).detach().contiguous().cpu()
            for name, t in module.state_dict().items()
        }
        config = {
            "model_type": self.model_type,
            "format": FORMAT,
            **dataclasses.asdict(cast("DataclassInstance", self.config)),
        }
        part = folder / (WEIGHTS + ".part")
        # One entry: safetensors writes several in random order, and equal weights must have equal fingerprints.
        save_file(tensors, part, metadata={"format": "pt"})
        _write(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        _write(folder / CARD, _card(self.model_type, config))
        os.replace(part, folder / WEIGHTS)
        return folder

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """The model that ``save_pretrained`` wrote, in evaluation mode, on the CPU.

        Args:
            path: a local directory, or ``owner/name`` of a repository on the Hugging Face Hub.

        Raises:
            ModelError: nothing is there, it is another kind of model, or tensors are missing, left over or misshapen.
        """
        folder = local_folder(path)
        values = read_config(folder)
        found = values.pop("model_type", None)
        if found != cls.model_type:
            raise ModelError(f"{folder} holds a {found!r} model; a {cls.model_type!r} model is needed here")
        if values.pop("format", None) != FORMAT:
            raise ModelError(f"{folder / CONFIG} is of another format than this version reads ({FORMAT})")
        model = cls(_config(cls.config_class, values, folder / CONFIG))  # type: ignore[call-arg]  # a module's
        module: nn.Module = model  # type: ignore[assignment]
        load_tensors(module, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
        module.eval()
        return model


def local_folder(path: str | os.PathLike[str]) -> Path:
    """The directory of a model: ``path`` itself, or a snapshot of the Hub repository of that name."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{folder} is a file; a directory with {CONFIG} and {WEIGHTS} is needed")
    name = str(path)
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
        raise ModelError(f"{folder} is no model: it has no {CONFIG}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{folder / CONFIG} is not a JSON object")
    return values


def model_type(path: str | os.PathLike[str]) -> str | None:
    """What kind of model a directory or Hub repository holds, by its config: ``dpar``, ``llamagen``, ``vq``."""
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
    module.load_state_dict(tensors)


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a model's weights file, as manifests record it."""
    with open(local_folder(path) / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config(config_class: type[Any], values: dict[str, Any], source: Path) -> Any:
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


def _card(kind: str, config: dict[str, Any]) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
    return (
        f"---\nlibrary_name: dpar\ntags: [dpar, {kind}, image-generation]\n---\n\n# {kind}\n\n"
        f"Weights of the `dpar` toolkit. Load them with `from_pretrained` of the class that `model_type` names.\n\n"
        f"| setting | value |\n| --- | --- |\n{rows}\n"
    )
