"""What a campaign looks at: an artifact in a folder or in a bucket, at any moment while it is written."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import boto3

from tests.object_store import BUCKET

ROOT = Path(__file__).parents[2]
BUILD = ".build"
SHARD = re.compile(r"\d{5}\.arrow")
Stamps = dict[str, object]  # by name of a shard: what differs if it is written again


class Output(Protocol):
    """An artifact that victims write."""

    @property
    def address(self) -> str:
        """What `dpar` calls it."""

    def finals(self) -> dict[str, str]:
        """MD5 of everything that has its final name."""

    def written(self) -> Stamps:
        """The stamps of all shards."""

    def recorded(self) -> set[str]:
        """The shards that are recorded as finished."""

    def is_finished(self) -> bool:
        """Whether there is a manifest."""

    def is_mid_write(self) -> bool:
        """Whether a shard is on its way: half-written, or not recorded yet."""

    def leavings(self) -> list[str]:
        """What a finished artifact must not have."""

    def remove(self) -> None:
        """Remove everything."""


def stamps(output: Output) -> Stamps:
    """Return the stamps of the finished shards."""
    recorded = output.recorded()  # first: their shards are there by then
    return {name: stamp for name, stamp in output.written().items() if name in recorded}


def rewritten(output: Output, before: Stamps) -> list[str]:
    """Return the shards that were finished ``before`` and have been written again."""
    now = output.written()
    return [name for name, stamp in before.items() if now.get(name) != stamp]


def files(folder: Path) -> list[Path]:
    """Return the files below a folder in which processes may be creating and removing folders meanwhile."""
    return [Path(path, name) for path, _, names in os.walk(folder) for name in names]


class Folder:
    """An artifact on disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)

    def finals(self) -> dict[str, str]:
        found = {}
        for path in files(self.path):
            inside = path.relative_to(self.path)
            if inside.parts[0] != BUILD and not any(p.endswith(".part") for p in inside.parts):
                found[inside.as_posix()] = hashlib.md5(path.read_bytes()).hexdigest()
        return found

    def written(self) -> Stamps:
        shards = {path.name: path.stat() for path in self.path.glob("[0-9]*.arrow")}
        return {name: (status.st_ino, status.st_mtime_ns) for name, status in shards.items()}

    def recorded(self) -> set[str]:
        return {f"{path.stem}.arrow" for path in files(self.path / BUILD) if re.fullmatch(r"\d+\.json", path.name)}

    def is_finished(self) -> bool:
        return (self.path / "manifest.json").exists()

    def is_mid_write(self) -> bool:
        return any(self._parts()) or any(self._record_parts())

    def halves(self, processes: list[int]) -> int:
        """Return how many files some processes have been writing."""
        names = [path.name for path in [*self._parts(), *self._record_parts()]]
        return sum(name.endswith(f".{pid}.part") for name in names for pid in processes)

    def leavings(self) -> list[str]:
        return [str(path) for path in [*self._parts(), self.path / BUILD] if path.exists()]

    def _parts(self) -> list[Path]:
        return list(self.path.glob("*.part"))

    def _record_parts(self) -> list[Path]:
        return [path for path in files(self.path / BUILD) if path.suffix == ".part"]

    def remove(self) -> None:
        shutil.rmtree(self.path)


class Prefix:
    """An artifact in a bucket that keeps every version of its objects."""

    def __init__(self, name: str) -> None:
        self.name, self.address = name, f"s3://{BUCKET}/{name}"
        self._client: Any = boto3.client("s3")

    def _versions(self) -> dict[str, dict[str, Any]]:
        """The newest version of each object, by its name below the prefix."""
        pages = self._client.get_paginator("list_object_versions").paginate(Bucket=BUCKET, Prefix=f"{self.name}/")
        versions = [version for page in pages for version in page.get("Versions", ()) if version["IsLatest"]]
        return {version["Key"].removeprefix(f"{self.name}/"): version for version in versions}

    def finals(self) -> dict[str, str]:
        versions = self._versions()  # the tag of an object that was put in one piece is its MD5
        return {name: v["ETag"].strip('"') for name, v in versions.items() if not name.startswith(BUILD)}

    def written(self) -> Stamps:
        return {name: v["VersionId"] for name, v in self._versions().items() if SHARD.fullmatch(name)}

    def recorded(self) -> set[str]:
        records = (re.fullmatch(rf"{BUILD}/(\d+)\.json", name) for name in self._versions())
        return {f"{record[1]}.arrow" for record in records if record}

    def is_finished(self) -> bool:
        return "manifest.json" in self._versions()

    def is_mid_write(self) -> bool:
        return bool(self.written().keys() - self.recorded())

    def leavings(self) -> list[str]:
        uploads = self._client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
        return [name for name in self._versions() if name.startswith(BUILD)] + [upload["Key"] for upload in uploads]

    def remove(self) -> None:
        for name in self._versions():
            self._client.delete_object(Bucket=BUCKET, Key=f"{self.name}/{name}")

    def upload(self, folder: Path) -> None:
        """Put the files of a folder."""
        for path in folder.iterdir():
            self._client.put_object(Bucket=BUCKET, Key=f"{self.name}/{path.name}", Body=path.read_bytes())


def keep_versions() -> None:
    """Have the bucket keep every version, so that an object that is written twice shows."""
    boto3.client("s3").put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})


def temporary_leavings(folder: Path) -> list[str]:
    """Return what `dpar` leaves in the directory for temporary files once another process has removed what it can.

    The last run may have found its output finished by a survivor of the kill. It then writes and removes nothing.
    """
    code = "from shards.scratch import remove_abandoned; remove_abandoned()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(folder)}, check=True)
    return [str(folder / name) for name in os.listdir(folder) if name.startswith("dpar-")]
