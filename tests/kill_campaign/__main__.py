"""``python -m tests.kill_campaign``; see the package."""

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import tests.kill_campaign as package
from tests.kill_campaign.outputs import Prefix, keep_versions
from tests.kill_campaign.processes import Place, Start, campaign
from tests.kill_campaign.report import Report, table
from tests.kill_campaign.victims import Home, Stage
from tests.object_store import object_store

STAGES: tuple[Stage, ...] = get_args(Stage)
SHARDS = {"disk": 200, "bucket": 60, "ray": 80}
RAY_SIZE = 64  # pixels, so that a shard takes long enough to be hit


def shares(kills: int, n: int) -> list[int]:
    """Return ``kills`` in ``n`` parts of nearly the same size."""
    return [kills // n + (i < kills % n) for i in range(n)]


def on_processes(place: Place, arguments: argparse.Namespace, folder: Path) -> list[Report]:
    """Kill plain processes that write to a place."""
    kinds = [(stage, start) for stage in STAGES for start in get_args(Start)]
    with ExitStack() as stack:
        home = Home(folder / "home", arguments.shards or SHARDS[place])
        if place == "bucket":
            stack.enter_context(object_store())
            keep_versions()
            codes = Prefix("codes")
            codes.upload(home.path / "tokenize")
            home.codes = codes.address
        pool = stack.enter_context(ThreadPoolExecutor(arguments.at_once))
        return list(
            pool.map(
                lambda kind, share: campaign(kind[0], kind[1], share, home, folder, arguments.seed, place),
                kinds,
                shares(arguments.kills, len(kinds)),
            )
        )


def on_ray(arguments: argparse.Namespace, folder: Path) -> list[Report]:
    """Kill parts of a Ray cluster."""
    from tests.kill_campaign.on_ray import NODES, RayCampaign  # the others need no Ray
    from tests.ray_nodes import ray_cluster

    home = Home(folder / "home", arguments.shards or SHARDS["ray"], RAY_SIZE)
    with ray_cluster(NODES, num_cpus=0) as cluster:
        campaigns = [RayCampaign(stage, home, cluster, folder, arguments.seed) for stage in STAGES]
        return [
            report
            for one, share in zip(campaigns, shares(arguments.kills, len(STAGES)), strict=True)
            for report in one.run(share)
        ]


def main() -> None:
    """Run a campaign and print its table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kill_campaign",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=100, help="in all, over both stages and all ways to start")
    parser.add_argument("--on", choices=("disk", "bucket", "ray"), default="disk")
    parser.add_argument("--shards", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="victims at the same time, in outputs of their own")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reports = on_ray(arguments, folder) if arguments.on == "ray" else on_processes(arguments.on, arguments, folder)
    sys.stdout.write(table(reports) + "\n")
    sys.exit(any(report.wrong for report in reports))


if __name__ == "__main__":
    main()
