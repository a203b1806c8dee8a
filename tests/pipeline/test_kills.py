"""A short kill campaign in every test run; `python -m tests.kill_campaign --kills 100` is the long one."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.kill_campaign.outputs import keep_versions
from tests.kill_campaign.processes import Place, Start, campaign
from tests.kill_campaign.report import Report
from tests.kill_campaign.victims import Home, Stage
from tests.object_store import object_store

Kind = tuple[Stage, Start, Place]
KINDS: tuple[Kind, ...] = (
    ("tokenize", "alone", "disk"),
    ("tokenize", "two by hand", "disk"),
    ("tokenize", "two by hand", "bucket"),
    ("patchify", "alone", "disk"),
    ("patchify", "two by hand", "disk"),
)
KILLS = 2  # of each kind
SHARDS = {"disk": 120, "bucket": 40}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Report]:
    """The reports of the campaigns; two run at the same time, in separate folders."""
    homes = {place: Home(tmp_path_factory.mktemp(place), n) for place, n in SHARDS.items()}
    folder = tmp_path_factory.mktemp("victims")

    def run(kind: Kind) -> Report:
        stage, start, place = kind
        return campaign(stage, start, KILLS, homes[place], folder, place=place)

    with object_store(), ThreadPoolExecutor(2) as pool:
        keep_versions()
        return dict(zip(KINDS, pool.map(run, KINDS), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_after_kills_at_random_moments_the_output_equals_that_of_an_undisturbed_run(
    reports: dict[Kind, Report], kind: Kind
) -> None:
    report = reports[kind]
    assert report.wrong == []
    assert report.kills >= KILLS
