"""The layers of the code: a folder imports only from those below it, so that a reader can start at the bottom."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up. "stages" are the modules at the top of pipeline, one per command.
LAYERS = ("runtime", "settings", "reports", "sources", "runs", "generation", "scoring", "training", "stages")
ROOMS = ("dpar", "shards", "pipeline")


def imports(path: Path) -> Iterator[str]:
    """Return the modules of this project that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name for name in names if name.split(".")[0] in (*ROOMS, "cli"))


def layer(module: str) -> int:
    """Return the index in :data:`LAYERS` of a module of pipeline."""
    name = module.split(".")[1] if "." in module else "stages"
    return LAYERS.index(name if name in LAYERS else "stages")


@pytest.mark.parametrize("package", ["dpar", "shards"])
def test_dpar_and_shards_import_no_other_package(package: str) -> None:
    others = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in (ROOT / package).rglob("*.py")
        for module in imports(path)
        if module.split(".")[0] != package
    }
    assert others == set()


def test_folders_of_the_pipeline_import_only_from_those_below_them() -> None:
    upward = set()
    for path in (ROOT / "pipeline").rglob("*.py"):
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        upward |= {
            f"{own} imports {module}"
            for module in imports(path)
            if module.startswith("pipeline") and layer(module) > layer(own)
        }
        upward |= {f"{own} imports {module}" for module in imports(path) if module.split(".")[0] == "cli"}
    assert upward == set()
