"""The manifest: the contents and provenance of an artifact, with the SHA-256 of every shard.

It is written last and atomically, so an artifact that has one is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from shards.errors import ArtifactError
from shards.records import Count, Positive, Range, parse, read_json
from shards.storage import READ_ONLY, Location, entries, is_file, write_json

MANIFEST = "manifest.json"
MAX_VALUES = 2**31 - 1  # per row of a column: the limit of Arrow's fixed-size lists
Kind = Literal["codes", "patches"]
FORMAT_VERSIONS: dict[Kind, int] = {"codes": 1, "patches": 2}
Container = Literal["arrow", "webdataset"]


@dataclass(frozen=True)
class LeftOut:
    """An input that was left out, and why."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard: its file, its statistics, and the inputs it leaves out."""

    name: str
    rows: Count
    sha256: str
    bytes: Count | None = None  # file size; None in artifacts of earlier versions
    statistics: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of an artifact. ``settings`` decide its bytes; ``made_by`` is further provenance."""

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
        """The format version of this kind of artifact."""
        return FORMAT_VERSIONS[self.kind]

    @property
    def n_tokens(self) -> int:
        """Tokens per image, N."""
        return self.grid[0] * self.grid[1]

    def write(self, folder: Location) -> None:
        """Write ``folder/manifest.json`` atomically."""
        write_json(folder / MANIFEST, {**dataclasses.asdict(self), "format_version": self.format_version})

    @classmethod
    def read(cls, folder: Location) -> Manifest:
        """Return the manifest of ``folder``.

        Raises:
            ArtifactError: it is missing, damaged, or of another version.
        """
        path = folder / MANIFEST
        if isinstance(folder, Path) and not folder.is_dir():
            raise ArtifactError(f"no artifact at {folder}: there is no such directory")
        is_finished, is_started = _progress(folder)
        if not is_finished:
            raise ArtifactError(
                f"{folder} is not finished: rerun the command that makes it"
                if is_started
                else f"{folder} is not an artifact: it has no {MANIFEST}"
            )
        values = read_json(path)
        if isinstance(values, dict):
            _check_version(values.get("kind"), values.pop("format_version", "missing"), path)
        manifest = parse(cls, values, str(path))
        manifest._check(path)
        return manifest

    def _check(self, path: Location) -> None:
        """Raise ArtifactError if fields contradict each other or a shard lies outside the directory."""
        names = [shard.name for shard in self.shards]
        fault = None
        if (values := self.views * self.n_tokens) > MAX_VALUES:
            fault = f"{self.views} views of {self.grid[0]}×{self.grid[1]} tokens are {values} values per row"
        for name in names:
            if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
                fault = f"shard name {name!r} is not a plain file name"
        if len(set(names)) < len(names):
            fault = "a shard is listed twice"
        if (n_rows := sum(shard.rows for shard in self.shards)) != self.rows:
            fault = f"its shards have {n_rows} rows in total, not {self.rows}"
        if fault is not None:
            raise ArtifactError(f"{path} is damaged: {fault}")

    def fingerprint(self) -> str:
        """Return the SHA-256 of the artifact's contents: its shards, grid, codebook and classes."""
        contents = [self.kind, self.grid, self.codebook_size, self.views, self.class_names]
        contents += [(shard.name, shard.sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


BUILD = ".build"  # records of finished shards, while an artifact is being written
SETTINGS = "settings.json"  # in BUILD


def _progress(folder: Location) -> tuple[bool, bool]:
    """Return whether a directory has a manifest, and whether it has the records of an artifact being written.

    A URL is listed, because object stores explain why they refuse a listing, but not why they refuse a file.

    Raises:
        ArtifactError: a URL cannot be listed.
    """
    if isinstance(folder, Path):
        return (folder / MANIFEST).is_file(), (folder / BUILD).is_dir()
    if folder.scheme in READ_ONLY:
        return is_file(folder / MANIFEST), is_file(folder / BUILD / SETTINGS)
    names = entries(folder)
    return MANIFEST in names, BUILD in names


def _check_version(kind: object, version: object, path: Location) -> None:
    """Raise ArtifactError unless this version reads the format version of the artifact."""
    supported = FORMAT_VERSIONS.get(kind) if isinstance(kind, str) else None  # type: ignore[call-overload]
    if supported is None or version == supported:  # parsing reports an unknown kind
        return
    message = f"{path} has format version {version!r}; this version reads {supported}"
    if kind == "patches" and version == 1:
        message += ". Version 1 used another patch rule: make the patches again from the codes, with `dpar patchify`"
    raise ArtifactError(message)
