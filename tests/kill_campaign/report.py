"""What a campaign saw."""

import sys
from dataclasses import dataclass, field

from tests.kill_campaign.outputs import Output, Stamps, rewritten, stamps
from tests.kill_campaign.victims import Stage


@dataclass
class Report:
    """``wrong`` is empty if all promises were kept."""

    stage: Stage
    start: str
    kills: int = 0  # that hit a process at work
    mid_write: int = 0  # of them, those that left a shard half-written or unrecorded
    folders: int = 0
    unfinished: int = 0  # restarts that found some shards done and some not
    wrong: list[str] = field(default_factory=list)

    def say(self) -> None:
        """Write a line of progress."""
        counts = f"{self.kills} kills, {self.mid_write} in the middle of a shard, output {self.folders}"
        sys.stderr.write("\n".join([f"{self.stage}, {self.start}: {counts}", *self.wrong]) + "\n")

    def check_halves(self, output: Output, expected: dict[str, str]) -> None:
        """Whatever has its final name has its final bytes."""
        for name, digest in output.finals().items():
            if digest != expected.get(name):
                self.wrong.append(f"{output.address}/{name}: half-written")

    def check_kept(self, output: Output, before: Stamps) -> None:
        """A shard that was finished before is the same file still."""
        for name in rewritten(output, before):
            self.wrong.append(f"{output.address}/{name}: was finished, and was written again")

    def check_finished(self, output: Output, expected: dict[str, str], leavings: list[str]) -> None:
        """Every byte is that of an undisturbed run, and nothing else is left."""
        if (found := output.finals()) != expected:
            names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            self.wrong.append(f"{output.address}: not the bytes of an undisturbed run: {', '.join(names[:5])}")
        self.wrong += [f"{left}: left by a killed process" for left in [*output.leavings(), *leavings]]


def is_partly_done(output: Output, expected: dict[str, str]) -> bool:
    """Return whether a restart finds some shards done and some not."""
    return 0 < len(stamps(output)) < sum(name[0].isdigit() for name in expected)


def table(reports: list[Report]) -> str:
    """Markdown."""
    lines = [
        "| stage | processes | kills at work | left half a shard | restarts over some shards | folders | result |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in reports:
        result = "; ".join(r.wrong) or "every byte as in an undisturbed run"
        lines.append(f"| {r.stage} | {r.start} | {r.kills} | {r.mid_write} | {r.unfinished} | {r.folders} | {result} |")
    return "\n".join(lines)
