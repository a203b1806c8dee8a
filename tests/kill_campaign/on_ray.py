"""Kills of workers, nodes and drivers of ``--engine ray``."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ray.cluster_utils import Cluster

from tests.kill_campaign.outputs import Folder, Stamps, stamps, temporary_leavings
from tests.kill_campaign.report import Report, is_partly_done
from tests.kill_campaign.victims import PATIENCE, Home, Program, Stage, Victim, group, send
from tests.ray_nodes import NODE, raylet, workers

Kind = Literal["worker", "node", "driver"]
KINDS: tuple[Kind, ...] = ("worker", "node", "driver")
WEIGHTS = (5, 3, 3)  # a driver takes longest to start again

NODES = 2  # beside the head, which has no workers and is not killed
LONGEST_DELAY = 1.0  # seconds between a first sign of work and the kill
KILLS_A_FOLDER = 6


class RayCampaign:
    """Kills on one cluster."""

    def __init__(self, stage: Stage, home: Home, cluster: Cluster, folder: Path, seed: int = 0) -> None:
        """Args:
        stage: the command.
        home: what it reads.
        cluster: with `NODES` nodes beside its head.
        folder: where it writes; finished outputs are removed again.
        seed: of the moments and the choice of victims.
        """
        self.stage, self.home, self.cluster, self.folder, self.seed = stage, home, cluster, folder, seed
        self.chance = random.Random(f"{stage} ray {seed}")
        self.expected = Folder(home.path / stage).finals()
        self.reports = {kind: Report(stage, f"ray, kills of a {kind}") for kind in KINDS}

    @property
    def kills(self) -> int:
        """How many have hit a run at work."""
        return sum(report.kills for report in self.reports.values())

    @property
    def wrong(self) -> list[str]:
        """What is wrong so far."""
        return [fault for report in self.reports.values() for fault in report.wrong]

    def run(self, kills: int) -> list[Report]:
        """Kill until ``kills`` have hit a run at work; return a report for each kind of victim."""
        n = 0
        while self.kills < kills and not self.wrong:
            output, temporary = Folder(self.folder / f"{self.stage}-ray-{n}"), self.folder / f"{self.stage}-ray-{n}.tmp"
            temporary.mkdir()
            n += 1
            report = self.one_output(output, temporary, min(KILLS_A_FOLDER, kills - self.kills))
            report.check_finished(output, self.expected, temporary_leavings(temporary))
            if not self.wrong:
                output.remove()
                shutil.rmtree(temporary)
        return list(self.reports.values())

    def one_output(self, output: Folder, temporary: Path, kills: int) -> Report:
        """Write one output, with kills on the way; return the report of the last one."""
        driver, kept, kinds = self.start_driver(output, temporary), Stamps(), set[Kind]()
        report = self.reports["driver"]
        for _ in range(kills):
            wait_for_work(output, driver)
            time.sleep(self.chance.random() * LONGEST_DELAY)
            if driver.has_ended():
                break
            [kind] = self.chance.choices(KINDS, WEIGHTS)
            report = self.reports[kind]
            kinds.add(kind)
            kept |= stamps(output)
            victims, repair = self.choose(kind, driver)
            at_work = bool(victims) and not output.is_finished()
            send(signal.SIGKILL, victims)
            report.kills += at_work
            # A driver writes no shards; the workers that it leaves end by themselves.
            report.mid_write += at_work and (output.is_mid_write() if kind == "driver" else output.halves(victims) > 0)
            report.check_halves(output, self.expected)
            report.check_kept(output, kept)
            repair()
            if kind == "driver":
                driver.end()
                report.unfinished += is_partly_done(output, self.expected)
                driver = self.start_driver(output, temporary)
            report.say()
        for each in kinds:
            self.reports[each].folders += 1
        code, message = driver.end()
        if code:
            report.wrong.append(f"{output.address}: the run ended with {code}: {message}")
        report.check_kept(output, kept)
        wait_until(lambda: not self.workers())
        return report

    def start_driver(self, output: Folder, temporary: Path) -> Victim:
        """Start the command as a user would."""
        words = [*self.home.command(self.stage, output.address), "--engine", "ray"]
        return Program([*words, "--ray-address", self.cluster.address], temporary)

    def choose(self, kind: Kind, driver: Victim) -> tuple[list[int], Callable[[], object]]:
        """Return the processes of a worker, a node or the driver, and what repairs the cluster without them."""
        if kind == "driver":
            return group(driver.pid), lambda: None
        if kind == "node":
            node = self.chance.choice(self.nodes())
            return group(raylet(node)), partial(self.replace, node)
        wait_until(lambda: self.workers() or driver.has_ended())
        pids = self.workers()
        return [self.chance.choice(pids)] if pids else [], lambda: None  # Ray starts another one

    def replace(self, node: Any) -> None:
        """Put a new node in the place of a dead one."""
        self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.add_node(**NODE)

    def nodes(self) -> list[Any]:
        """The nodes that may be killed, in the order of their processes' numbers."""
        return sorted(
            (node for node in self.cluster.list_all_nodes() if node is not self.cluster.head_node), key=raylet
        )

    def workers(self) -> list[int]:
        """The processes of all workers."""
        return [pid for node in self.nodes() for pid in workers(node)]


def wait_for_work(output: Folder, driver: Victim) -> None:
    """Wait until another shard is written, or the driver has ended."""
    written = len(output.written())
    wait_until(lambda: len(output.written()) > written or driver.has_ended())


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it takes too long.
    """
    until = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"nothing happened for {PATIENCE:g} seconds")
        time.sleep(0.02)
