"""Read checkpoint files of LlamaGen and of the DPAR authors, without executing code stored in them.

    checkpoint = read("c2i_B_256.pt")
    checkpoint.model_type, checkpoint.sizes, checkpoint.tensors     # "llamagen", its config, tensors by name

``from_pretrained`` passes files to this module: ``.pt`` (``vq_ds16_c2i.pt``, ``c2i_B_256.pt``) or
``.safetensors``. The state dict of a ``.pt`` is under ``model``, ``ema``, ``module`` or ``state_dict``, the first in
this order, or bare. Names may begin with ``module.`` (DDP) or ``_orig_mod.`` (torch.compile). Tensors of
the authors' DPAR are renamed (:data:`AUTHORS_NAMES`). Sizes follow from tensor shapes; the other values come from:

- heads: ``freqs_cis`` if stored, else the training arguments, else the published model of that width;
- grid: ``freqs_cis``, else the training arguments, else ``_256``, ``_384`` or ``_512`` in the file's name (pixels, 16
  per token), else 16×16;
- rotary positions of DPAR's patches: the training arguments if this module wrote the file, else ``dynamic``.

``heads``, ``grid`` and ``rope`` supply values that the file does not record; a file that contradicts them is refused.
Weights work only on the grid they were trained on, because rotary positions count its rows and columns: a model trained
at 384 px treats a 256 px image as the top-left corner of a larger one.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpar.errors import ModelError
from dpar.files import atomic_path
from dpar.rope import token_table, with_condition
from dpar.tensors import count_layers, shown
from dpar.torch_files import NEEDED, load, state_dict

DERIVED = ("freqs_cis", "quantize.codebook_used")  # recomputed, or a statistic of training
CODEBOOK_USED = 65536  # length of quantize.codebook_used, without which LlamaGen's VQ does not load
# by width: B, L, XL, XXL, LlamaGen's 1B, 3B and 7B, DPAR's XXXL
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 3200: 32, 4096: 32, 2560: 40}
NAMES = {"GPT-B": 12, "GPT-L": 16, "GPT-XL": 20, "GPT-XXL": 24, "GPT-1B": 32, "GPT-3B": 32, "GPT-7B": 32}
# Prefixes of tensor names: the authors', and this package's; {} is the number of a layer.
AUTHORS_NAMES = {
    "local_encoder.layers.{}.": "encoder.{}.block.",
    "local_encoder.cross_attn_layers.{}.cross_attn_norm_q.": "encoder.{}.cross_attention.patch_norm.",
    "local_encoder.cross_attn_layers.{}.cross_attn_norm_kv.": "encoder.{}.cross_attention.token_norm.",
    "local_encoder.cross_attn_layers.{}.": "encoder.{}.cross_attention.",
    "local_decoder.layers.{}.": "decoder.{}.block.",
    "local_decoder.cross_attn_layers.{}.cross_attn_norm_kv.": "decoder.{}.patch_norm.",
    "local_decoder.cross_attn_layers.{}.wo.": "decoder.{}.patch_proj.",
    "decoder_start_embedding.": "decoder_start.",
}
PUBLISHED = {"decoder_start": "learned"}  # what the format supports
TITLES = {"vq": "LlamaGen's VQ tokenizer", "llamagen": "LlamaGen's GPT", "dpar": "a DPAR model"}


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """The contents of a checkpoint file."""

    path: Path
    model_type: str  # "vq", "llamagen" or "dpar"
    sizes: dict[str, Any]  # fields of VQConfig, LlamaGenConfig or DPARConfig
    tensors: dict[str, Tensor]  # this package's names, the file's dtypes, no DERIVED; memory-mapped if possible
    key: str | None  # of the state dict in the file; None: bare
    grid_from: str | None = None  # where the grid was read from; None for a VQ


def read(
    path: str | os.PathLike[str],
    *,
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
    rope: str | None = None,
) -> CheckpointFile:
    """Read one file of LlamaGen or of the DPAR authors.

    Args:
        path: the file.
        heads: attention heads, if the file does not record them.
        grid: rows and columns of tokens, likewise.
        rope: rotary positions of a DPAR's patches, likewise.

    Raises:
        ModelError: the file is not such a checkpoint, or contradicts ``heads``, ``grid`` or ``rope``.
    """
    file = Path(path)
    contents = load(file)
    tensors, key = state_dict(contents, file)
    kind = _kind(tensors)
    if kind is None:
        raise ModelError(f"{file} holds {_other(tensors)}; {NEEDED}")
    if rope is not None and kind != "dpar":
        raise ModelError(f"{file} is {TITLES[kind]}; rope= belongs to a DPAR model")
    kept = {name: tensor for name, tensor in tensors.items() if name not in DERIVED}
    if kind == "vq":
        return CheckpointFile(path=file, model_type=kind, sizes=_vq_sizes(kept, file), tensors=kept, key=key)
    stored = contents.get("args") if key is not None else None
    stored = dict(vars(stored)) if isinstance(stored, argparse.Namespace) else stored
    arguments = stored if isinstance(stored, dict) else {}
    sizes = _gpt_sizes(kept, arguments, file)
    if kind == "dpar":
        sizes |= _dpar_depths(kept) | {"rope": _rope(arguments, rope, file)} | PUBLISHED
        kept = {_renamed(name, AUTHORS_NAMES): tensor for name, tensor in kept.items()}
    rotary = _rotary(tensors.get("freqs_cis"), sizes["width"], file)
    sizes["heads"] = _heads(rotary, arguments, sizes["width"], heads, file)
    (sizes["grid_height"], sizes["grid_width"]), grid_from = _grid(rotary, arguments, grid, file)
    if "freqs_cis" in tensors:
        _check_rotary(tensors["freqs_cis"], sizes, file)
    return CheckpointFile(path=file, model_type=kind, sizes=sizes, tensors=kept, key=key, grid_from=grid_from)


def write(path: Path, model_type: str, sizes: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a file that LlamaGen's or the DPAR authors' code loads: ``{"model": state dict}``. Atomic.

    Heads, grid and rotary positions that neither tensors nor file name determine are stored in ``args`` beside it,
    for :func:`read`.

    Raises:
        ModelError: this model has a choice that the authors' DPAR does not have.
    """
    names = {}
    if model_type == "dpar":
        other = [f"{name} {sizes[name]!r}" for name, value in PUBLISHED.items() if sizes[name] != value]
        if other:
            raise ModelError(f"{path} cannot be written: the authors' model has no {', '.join(other)}")
        names = {local: authors for authors, local in AUTHORS_NAMES.items()}
    state = {_renamed(name, names): tensor.contiguous() for name, tensor in tensors.items()}
    contents: dict[str, Any] = {"model": state}
    if model_type == "vq":
        state["quantize.codebook_used"] = torch.zeros(CODEBOOK_USED)
    else:
        grid = (sizes["grid_height"], sizes["grid_width"])
        guessed = _grid(None, {}, None, path)[0]
        arguments: dict[str, Any] = {}
        if HEADS.get(sizes["width"]) != sizes["heads"] or guessed != grid:
            arguments = {"n_head": sizes["heads"], "grid": list(grid)}
        if sizes.get("rope", "dynamic") != "dynamic":
            arguments["rope"] = sizes["rope"]
        if arguments:
            contents["args"] = arguments
    with atomic_path(path) as part:
        torch.save(contents, part)


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    """Return a tensor's name with its prefix replaced; the first matching prefix wins."""
    for old, new in prefixes.items():
        pattern = re.escape(old).replace(re.escape("{}"), r"(\d+)")
        if match := re.match(pattern, name):
            return new.format(*match.groups()) + name[match.end() :]
    return name


def _kind(tensors: dict[str, Tensor]) -> str | None:
    """Return ``vq``, ``llamagen``, ``dpar``, or None if the tensors belong to none of them."""
    if any(name.startswith("local_encoder.layers.") for name in tensors):
        return "dpar"
    if any(name.startswith(("encoder.conv_blocks.", "decoder.conv_blocks.")) for name in tensors):
        return "vq"
    if any(name.startswith("cls_embedding.cap_proj.") for name in tensors):
        return None
    if any(re.fullmatch(r"layers\.\d+\.attention\.wqkv\.weight", name) for name in tensors):
        return "llamagen"
    return None


def _other(tensors: dict[str, Tensor]) -> str:
    if any(name.startswith("cls_embedding.cap_proj.") for name in tensors):
        return "LlamaGen's text-to-image GPT, which takes captions, not classes"
    if any(name.startswith("encoder.0.block.") for name in tensors):
        return "the weights of a directory written by save_pretrained; pass the directory"
    return f"another model (its tensors: {', '.join(shown(name, quote=False) for name in list(tensors)[:3])} …)"


def _vq_sizes(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    levels = count_layers(tensors, "encoder.conv_blocks.")
    stages = [f"encoder.conv_blocks.{i}.res.0.conv1.weight" for i in range(levels)]
    needed = ["quantize.embedding.weight", "encoder.conv_in.weight", "encoder.conv_out.weight", *stages]
    codebook, first, last, *widths = _shapes(tensors, needed, "VQTokenizer", path)
    if first[0] < 1 or any(width[0] % first[0] for width in widths):
        listed = ", ".join(str(width[0]) for width in widths)
        raise ModelError(f"{path}: its widths ({listed}) are not multiples of the first layer's {first[0]}")
    return {
        "codebook_size": codebook[0],
        "codebook_dim": codebook[1],
        "channels": first[0],
        "channel_multipliers": tuple(width[0] // first[0] for width in widths),
        "residual_blocks": count_layers(tensors, "encoder.conv_blocks.0.res."),
        "latent_channels": last[0],
    }


def _gpt_sizes(tensors: dict[str, Tensor], arguments: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the sizes of a GPT, or of a DPAR without its depths."""
    class_table, is_dpar = "cls_embedding.embedding_table.weight", _kind(tensors) == "dpar"
    if not is_dpar and class_table not in tensors:  # the authors' entropy model: no start token
        (tokens,) = _shapes(tensors, ["tok_embeddings.weight"], "LlamaGen", path)
        sizes = {"codebook_size": tokens[0], "classes": 0, "width": tokens[1], "start_token": False}
    else:
        needed = ["tok_embeddings.weight", class_table]
        tokens, labels = _shapes(tensors, needed, "DPAR" if is_dpar else "LlamaGen", path)
        if _argument(arguments, "num_classes", path) == labels[0]:
            raise ModelError(f"{path} was trained without a guidance class (class dropout 0), which sampling needs")
        sizes = {"codebook_size": tokens[0], "classes": labels[0] - 1, "width": tokens[1]}
    return sizes if is_dpar else sizes | {"layers": count_layers(tensors, "layers.")}


def _dpar_depths(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return the depths of the three parts of a DPAR."""
    return {
        "encoder_layers": count_layers(tensors, "local_encoder.layers."),
        "patch_layers": count_layers(tensors, "layers."),
        "decoder_layers": count_layers(tensors, "local_decoder.layers."),
    }


def _rope(arguments: dict[str, Any], asked: str | None, path: Path) -> str:
    """Return the kind of rotary positions of patches: the recorded one, else ``asked``, else ``dynamic``."""
    stored = arguments.get("rope")
    if stored is not None and not isinstance(stored, str):
        raise ModelError(f"{path}: rope in its training arguments is {shown(stored)}; a name is needed")
    if stored is not None and asked not in (None, stored):
        raise ModelError(f"{path} has rotary positions {stored!r}; requested were {asked!r}")
    return stored or asked or "dynamic"


def _argument(arguments: dict[str, Any], name: str, path: Path) -> int | None:
    """Return a whole number above 0 of the training arguments; None if it is missing or null."""
    value: int | None = arguments.get(name)
    if value is not None and not _is_size(value):
        raise ModelError(f"{path}: {name} in its training arguments is {shown(value)}; a whole number is needed")
    return value


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shapes(tensors: dict[str, Tensor], names: list[str], model: str, path: Path) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors ``names``; raise ModelError if one is missing or a vector."""
    faults = [f"missing {name}" for name in names if name not in tensors]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}" for name in names if name in tensors and tensors[name].ndim < 2
    ]
    if faults:
        raise ModelError(f"{path} does not fit a {model}: {'; '.join(faults)}")
    return [tuple(tensors[name].shape) for name in names]


def _rotary(freqs_cis: Tensor | None, width: int, path: Path) -> tuple[int, int] | None:
    """Return heads and side of the grid, from a stored table of (1 + N, head_dim / 2, 2)."""
    if freqs_cis is None:
        return None
    side = math.isqrt(max(freqs_cis.shape[0] - 1, 0)) if freqs_cis.ndim == 3 else 0
    pairs = freqs_cis.shape[1] if freqs_cis.ndim == 3 else 0
    if side == 0 or side * side + 1 != freqs_cis.shape[0] or 0 in (pairs, width) or width % (2 * pairs):
        raise ModelError(f"{path}: freqs_cis is {tuple(freqs_cis.shape)}; (1 + N, head width / 2, 2) is needed")
    return width // (2 * pairs), side


def _heads(rotary: tuple[int, int] | None, arguments: dict[str, Any], width: int, asked: int | None, path: Path) -> int:
    stored: int | None
    if rotary is not None:
        stored = rotary[0]
    elif (heads := _argument(arguments, "n_head", path)) is not None:
        stored = heads
    else:
        stored = NAMES.get(str(arguments.get("gpt_model")), HEADS.get(width))
    if stored is None:
        if asked is not None:
            return asked
        raise ModelError(
            f"{path} does not record its number of heads, and no published model has its width of {width}; "
            "pass heads= to from_pretrained"
        )
    if asked not in (None, stored):
        raise ModelError(f"{path} has {stored} heads; {asked} were requested")
    return stored


def _grid(
    rotary: tuple[int, int] | None, arguments: dict[str, Any], asked: tuple[int, int] | None, path: Path
) -> tuple[tuple[int, int], str]:
    """Return rows and columns of tokens, and where they were read from."""
    grid: tuple[int, int] | None = None
    source = "freqs_cis"
    if rotary is not None:
        grid = (rotary[1], rotary[1])
    elif (stored := arguments.get("grid")) is not None:
        if not (isinstance(stored, list) and len(stored) == 2 and all(map(_is_size, stored))):
            raise ModelError(f"{path}: grid in its training arguments is {shown(stored)}; two whole numbers are needed")
        grid, source = (stored[0], stored[1]), "its training arguments"
    elif (pixels := _argument(arguments, "image_size", path)) is not None:
        side = pixels // (_argument(arguments, "downsample_size", path) or 16)
        grid, source = (side, side), "its training arguments"
    elif named := re.findall(r"_(256|384|512)(?!\d)", path.name):
        side = int(named[-1]) // 16
        grid, source = (side, side), f"_{named[-1]} in its name"
    if grid is not None and asked is not None and tuple(asked) != grid:
        raise ModelError(
            f"{path} is for a grid of {grid[0]}×{grid[1]} ({source}), but {asked[0]}×{asked[1]} was requested: "
            "weights work only on the grid they were trained on"
        )
    if grid is not None:
        return grid, source
    return (asked, "as requested") if asked is not None else ((16, 16), "LlamaGen's default; not recorded in the file")


def _check_rotary(freqs_cis: Tensor, sizes: dict[str, Any], path: Path) -> None:
    """Raise ModelError unless the stored table is LlamaGen's, the only one the model implements."""
    head_dim = sizes["width"] // sizes["heads"]
    table = with_condition(token_table(sizes["grid_height"], sizes["grid_width"], head_dim))
    if freqs_cis.shape != table.shape or not torch.allclose(freqs_cis.float(), table, atol=1e-2):
        raise ModelError(f"{path} was trained with other rotary positions (freqs_cis) than LlamaGen's 2D ones")


def describe(model_type: str, sizes: dict[str, Any]) -> str:
    """Return a one-line description of a model, from its config values."""
    title = TITLES.get(model_type, model_type)
    if model_type == "vq":
        pixels = 2 ** (len(sizes["channel_multipliers"]) - 1)
        return f"{title}: {sizes['codebook_size']} codes of dimension {sizes['codebook_dim']}, {pixels} pixels per code"
    depth = "{layers} layers"
    if model_type == "dpar":
        depth = "{encoder_layers} + {patch_layers} + {decoder_layers} layers"
    classes = f"{sizes['classes']} classes" if sizes["classes"] else "no classes"
    classes += "" if sizes.get("start_token", True) else ", no start token"
    return (
        f"{title}: {depth.format(**sizes)} of width {sizes['width']}, {sizes['heads']} heads, "
        f"{sizes['grid_height']}×{sizes['grid_width']} tokens of {sizes['codebook_size']} codes, {classes}"
    )
