"""Kills of plain processes that write to a disk or to a bucket."""

import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.kill_campaign.outputs import Folder, Output, Prefix, files, stamps, temporary_leavings
from tests.kill_campaign.report import Report, is_partly_done
from tests.kill_campaign.victims import Fork, Home, Program, Stage, Victim, children, group, send

Start = Literal["alone", "two by hand", "torchrun"]
Place = Literal["disk", "bucket"]

LONGEST_DELAY = {"disk": 0.4, "bucket": 1.0}  # seconds between the first sign of work and the kill
POLL = 0.002  # seconds between looks at an output
LOOKING = 0.2  # of the time at most, because looking at a bucket costs its server time
KILLS_A_FOLDER = 6  # then it is run to the end, and the next folder begins


@dataclass
class Victims:
    """One command, started in one way, that writes one output."""

    home: Home
    stage: Stage
    start: Start
    place: Place
    output: Output
    temporary: Path

    def start_all(self) -> list[Victim]:
        """Start their processes."""
        words = self.home.command(self.stage, self.output.address)
        if self.start == "torchrun":
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            return [Program(launcher + words, self.temporary)]
        return [Fork(words, self.temporary) for _ in range(2 if self.start == "two by hand" else 1)]


def campaign(
    stage: Stage, start: Start, kills: int, home: Home, folder: Path, seed: int = 0, place: Place = "disk"
) -> Report:
    """Kills until ``kills`` have hit a process at work, in as many outputs as that takes.

    Args:
        stage: the command.
        start: how its processes are started.
        kills: how many are to hit.
        home: what they read.
        folder: where victims write and have their temporary files; finished outputs are removed again.
        seed: of the moments and the choice of victims.
        place: whether they write to ``folder`` or to the bucket.
    """
    chance = random.Random(f"{stage} {start} {seed}")
    report = Report(stage, start)
    expected = Folder(home.path / stage).finals()
    while report.kills < kills and not report.wrong:
        name = f"{stage}-{start.replace(' ', '-')}-{seed}-{report.folders}"
        output = Prefix(name) if place == "bucket" else Folder(folder / name)
        temporary = folder / f"{name}.tmp"
        temporary.mkdir()
        victims = Victims(home, stage, start, place, output, temporary)
        report.folders += 1
        for _ in range(KILLS_A_FOLDER):
            if report.kills >= kills or output.is_finished() or report.wrong:
                break
            kill_once(victims, chance, report, expected)
        finish(victims, report)
        report.check_finished(output, expected, temporary_leavings(temporary))
        if not report.wrong:
            output.remove()
            shutil.rmtree(temporary)
    return report


def kill_once(victims: Victims, chance: random.Random, report: Report, expected: dict[str, str]) -> None:
    """Starts the command, kills one or all of its processes at a random moment, and looks at what is left."""
    output = victims.output
    before, n_before = stamps(output), len(output.written())
    report.unfinished += is_partly_done(output, expected)
    processes = victims.start_all()
    while not any(process.has_ended() for process in processes):
        looked = time.monotonic()
        if len(output.written()) != n_before:
            break
        time.sleep(max(POLL, (time.monotonic() - looked) / LOOKING))
    time.sleep(chance.random() * LONGEST_DELAY[victims.place])
    at_work = not output.is_finished()
    one = chance.random() < 0.5
    for victim in processes[: 1 if one else None]:
        if not victim.has_ended():
            # Under torchrun "one" is a worker; the launcher then ends the rest.
            is_worker = victims.start == "torchrun" and one
            send(signal.SIGKILL, children(victim.pid)[:1] if is_worker else group(victim.pid))
            report.kills += at_work
    report.mid_write += at_work and (output.is_mid_write() or has_files(victims.temporary))
    for process in processes:
        process.end()
    report.check_halves(output, expected)
    report.check_kept(output, before)
    report.say()


def has_files(temporary: Path) -> bool:
    """Return whether a shard of a bucket was on the way to or from it."""
    return any(path.parent.name.startswith("dpar-") for path in files(temporary))


def finish(victims: Victims, report: Report) -> None:
    """Runs the command undisturbed to its end."""
    before = stamps(victims.output)
    for process in victims.start_all():
        code, message = process.end()
        if code:
            report.wrong.append(f"{victims.output.address}: the last run ended with {code}: {message}")
    report.check_kept(victims.output, before)
