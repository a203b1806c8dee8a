"""A small campaign of kills in every test run; `python tests/kill_campaign.py --kills 100` is the long one."""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "kill_campaign.py"
KINDS = (("tokenize", "alone"), ("tokenize", "two by hand"), ("patchify", "alone"), ("patchify", "two by hand"))
KILLS = 3  # of each kind
SHARDS = 120


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_campaign", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_campaign"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """What campaigns of each kind saw; two run at the same time, in folders of their own."""
    script = load_script()
    home = script.prepare(tmp_path_factory.mktemp("home"), SHARDS)
    folder = tmp_path_factory.mktemp("victims")
    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(lambda kind: script.campaign(*kind, KILLS, home, folder), KINDS))
    return dict(zip(KINDS, seen, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_after_kills_at_random_moments_every_byte_is_that_of_an_undisturbed_run(
    reports: dict[tuple[str, str], Any], kind: tuple[str, str]
) -> None:
    report = reports[kind]
    assert report.wrong == []
    assert report.kills >= KILLS
