"""The provenance of a run's output: package versions, git revision, machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("dpar", "torch", "numpy", "pyarrow", "webdataset", "pillow", "scikit-image", "safetensors")


def made_by() -> dict[str, str]:
    """Return the versions of Python and of packages that affect results, and the git revision of a checkout."""
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    revision = git_revision()
    return versions | ({"git": revision} if revision else {})


def git_revision() -> str | None:
    """Return the commit of this code's checkout, with ``-dirty`` if it has changes; None without a checkout."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> list[str]:
    """Return the command as typed."""
    return list(sys.argv)
