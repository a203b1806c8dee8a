"""A short kill campaign in every test run; `python -m tests.kill_campaign --kills 100` is the long one."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.kill_campaign import Report, Stage, Start, campaign, prepare

KINDS: tuple[tuple[Stage, Start], ...] = (
    ("tokenize", "alone"),
    ("tokenize", "two by hand"),
    ("patchify", "alone"),
    ("patchify", "two by hand"),
)
KILLS = 2  # of each kind
SHARDS = 120


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Stage, Start], Report]:
    """The reports of the campaigns; two run at the same time, in separate folders."""
    home = prepare(tmp_path_factory.mktemp("home"), SHARDS)
    folder = tmp_path_factory.mktemp("victims")
    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(lambda kind: campaign(kind[0], kind[1], KILLS, home, folder), KINDS))
    return dict(zip(KINDS, seen, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_after_kills_at_random_moments_the_output_equals_that_of_an_undisturbed_run(
    reports: dict[tuple[Stage, Start], Report], kind: tuple[Stage, Start]
) -> None:
    report = reports[kind]
    assert report.wrong == []
    assert report.kills >= KILLS
