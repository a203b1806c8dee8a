"""The manifest: what an artifact holds and what made it, with the SHA-256 of every shard.

It is written last, under a temporary name first, so an artifact that has one is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from shards.errors import ArtifactError
from shards.files import write_json
from shards.records import Count, Positive, Range, parse, read_json

MANIFEST = "manifest.json"
MOST_VALUES = 2**31 - 1  # in a row of a column, as Arrow's fixed-size lists have it
Kind = Literal["codes", "patches"]
FORMAT_VERSIONS: dict[Kind, int] = {"codes": 1, "patches": 2}
Container = Literal["arrow", "webdataset"]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """An input that was not used."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard: its file, what it holds, and what its making left behind."""

    name: str
    rows: Count
    sha256: str
    bytes: Count | None = None  # size of the file; None in artifacts of earlier versions
    statistics: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artifact holds. ``settings`` are those that decide its bytes; the rest of what made it is ``made_by``."""

    kind: Kind
    container: Container
    grid: tuple[Positive, Positive]  # rows and columns of tokens
    codebook_size: Annotated[int, Range(1, 2**16)]  # codes are stored in 16 bits
    views: Positive  # token sequences per row
    class_names: tuple[str, ...]
    rows: Count
    shards: tuple[ShardInfo, ...]
    settings: dict[str, Any]
    source: dict[str, Any]  # the images: kind, location, listing
    tokenizer: dict[str, Any]  # path, and the fingerprint of its weights
    entropy_model: dict[str, Any] | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    left_out: Count = 0
    made_by: dict[str, Any] = field(default_factory=dict)

    @property
    def format_version(self) -> int:
        """Of an artifact of this kind."""
        return FORMAT_VERSIONS[self.kind]

    @property
    def n_tokens(self) -> int:
        """Tokens an image, N."""
        return self.grid[0] * self.grid[1]

    def write(self, folder: Path) -> None:
        """Writes ``folder/manifest.json``, whole or not at all."""
        write_json(folder / MANIFEST, {**dataclasses.asdict(self), "format_version": self.format_version})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of ``folder``.

        Raises:
            ArtifactError: there is none, it is of another version, or it is damaged.
        """
        path = folder / MANIFEST
        if not folder.is_dir():
            raise ArtifactError(f"no artifact at {folder}: there is no such directory")
        if not path.is_file():
            unfinished = (folder / BUILD).is_dir()
            raise ArtifactError(
                f"{folder} is not finished: run the command that makes it again"
                if unfinished
                else f"{folder} is no artifact: it has no {MANIFEST}"
            )
        values = read_json(path)
        if isinstance(values, dict):
            _check_version(values.get("kind"), values.pop("format_version", "missing"), path)
        manifest = parse(cls, values, str(path))
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        """Raises ArtifactError where fields contradict each other or a shard leads out of the directory."""
        names = [shard.name for shard in self.shards]
        wrong = None
        if (values := self.views * self.n_tokens) > MOST_VALUES:
            wrong = f"{self.views} views of {self.grid[0]}×{self.grid[1]} tokens are {values} values per row"
        for name in names:
            if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
                wrong = f"shard name {name!r} is not a plain file name"
        if len(set(names)) < len(names):
            wrong = "a shard is listed twice"
        if (held := sum(shard.rows for shard in self.shards)) != self.rows:
            wrong = f"its shards hold {held} rows together, and it says {self.rows}"
        if wrong is not None:
            raise ArtifactError(f"{path} is damaged: {wrong}")

    def fingerprint(self) -> str:
        """SHA-256 over what the artifact holds: its shards, grid, codebook and classes."""
        held = [self.kind, self.grid, self.codebook_size, self.views, self.class_names]
        held += [(shard.name, shard.sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()


BUILD = ".build"  # records of finished shards, while an artifact is being written


def _check_version(kind: object, version: object, path: Path) -> None:
    """Raises ArtifactError unless an artifact of this ``kind`` has the format version that is read here."""
    reads = FORMAT_VERSIONS.get(kind) if isinstance(kind, str) else None  # type: ignore[call-overload]
    if reads is None or version == reads:  # an unknown kind is found when it is parsed
        return
    what = f"{path} has format version {version!r}; this version reads {reads}"
    if kind == "patches" and version == 1:
        what += ". Version 1 followed another patch rule: make the patches again with `dpar patchify`, from the codes"
    raise ArtifactError(what)
