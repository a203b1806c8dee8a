"""The samples in a WebDataset tar: members that share a key, such as ``0001.jpg`` and ``0001.cls``.

    for sample in samples(file, "train-000.tar"):
        sample.key, sample.label                             # "0001", 7

Keys and suffixes are split as in webdataset. The label is the member ``cls`` (a number or text), else a field of the
member ``json``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.runtime.errors import StageError
from pipeline.sources.decode import EXTENSIONS
from pipeline.sources.labels import Label, parse_label
from pipeline.sources.source import valid_text
from pipeline.sources.tar import Bytes, Member, members
from shards.manifest import LeftOut

LABEL_FIELDS = ("label", "cls", "class", "class_id", "class_name", "classname")
"""Label fields of a sample's ``json``, in order of preference."""

_LARGEST_LABEL = 2**20
_SUFFIXES = frozenset(ending[1:] for ending in EXTENSIONS)


@dataclass
class Sample:
    """One image of a WebDataset tar.

    Attributes:
        key: the common part of its members' names, unchanged.
        image: the member with the image; None if there is none.
        data: the image's bytes, if requested.
        label: a number or text; None if it has none.
        problem: why it cannot be used, if known.
        suffixes: the suffixes of its members.
    """

    key: str
    image: Member | None = None
    data: bytes = b""
    label: Label | None = None
    problem: str | None = None
    suffixes: list[str] = field(default_factory=list)


def samples(file: Bytes, tar: str, *, keep_images: bool = False) -> Iterator[Sample | LeftOut]:
    """Yield the samples of one tar in order, and LeftOut for entries that cannot be read.

    Args:
        file: the tar.
        tar: its name, for messages.
        keep_images: also read the images, for a tar that is read only once.

    Raises:
        StageError: see `members`; or it holds codes written by ``dpar tokenize``, not images.
    """
    from webdataset.tariterators import base_plus_ext

    sample: Sample | None = None
    for member in members(file, tar):
        if isinstance(member, LeftOut):
            yield member
            continue
        key, suffix = base_plus_ext(member.name)
        if key is None:
            continue
        suffix = suffix.lower()
        if suffix == "codes.npy":
            raise StageError(
                f"{tar}: is a shard of codes written by dpar, not of images; give the images it was made from"
            )
        # A repeated suffix starts another sample of the same key.
        if sample is None or key != sample.key or suffix in sample.suffixes:
            if sample is not None and sample.image is not None:
                yield sample
            sample = Sample(key)
        sample.suffixes.append(suffix)
        if sample.image is None and suffix.rpartition(".")[2] in _SUFFIXES:
            sample.image = member
            if keep_images:
                sample.data = _read(file, member)
        elif suffix in ("cls", "json"):
            _read_label(sample, suffix, file, member)
    if sample is not None and sample.image is not None:
        yield sample


def holds_samples(file: Bytes, tar: str) -> bool:
    """Return whether a tar is in WebDataset's format: whether one of its first 1000 images has a label or text."""
    first = (sample for sample in samples(file, tar) if isinstance(sample, Sample))
    return any(not {"cls", "json", "txt"}.isdisjoint(sample.suffixes) for sample in itertools.islice(first, 1000))


def _read(file: Bytes, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _read_label(sample: Sample, suffix: str, file: Bytes, member: Member) -> None:
    if member.size > _LARGEST_LABEL:
        sample.problem = f"its {suffix} has more than {_LARGEST_LABEL} bytes"
        return
    try:
        text = _read(file, member).decode("utf-8")
        label = parse_label(text) if suffix == "cls" else _label_of_json(json.loads(text))
        if isinstance(label, str):
            label.encode()  # fails on lone surrogates, which JSON can spell
    except (ValueError, RecursionError):
        sample.problem = f"its {suffix} is not {'UTF-8' if suffix == 'cls' else 'valid JSON'}"
        return
    if label is not None and (suffix == "cls" or sample.label is None):
        sample.label = label


def _label_of_json(fields: object) -> Label | None:
    if not isinstance(fields, dict):
        return None
    for name in LABEL_FIELDS:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip():
            return parse_label(value)
    return None


def key_text(stem: str, key: str) -> str:
    """Return the unique key of a sample: prefixed with the tar's name, since each tar may count from 0."""
    return f"{stem}/{valid_text(key)}"
