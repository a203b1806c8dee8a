"""A Ray cluster on this machine for tests: its nodes are raylets, with workers of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.kill_campaign.victims import ROOT, group

PATIENCE = 120  # seconds for a node or a worker to start on a busy machine
NODE: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}


@contextmanager
def ray_cluster(nodes: int, **head: Any) -> Iterator[Cluster]:
    """Give a cluster of a head and further nodes, one CPU each; workers inherit the environment of this process.

    Args:
        nodes: how many beside the head.
        head: what is different about the head.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_raylet_start_wait_time_s", str(PATIENCE))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", str(ROOT))
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False, **head})
        try:
            for _ in range(nodes):
                cluster.add_node(**NODE)
            yield cluster
        finally:
            cluster.shutdown()


def raylet(node: Any) -> int:
    """The process that a node is; those of its workers are its children."""
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def workers(node: Any) -> list[int]:
    """The processes of a node's workers."""
    return [pid for pid in group(raylet(node)) if title(pid).startswith(b"ray::Worker")]


def title(pid: int) -> bytes:
    """How a process calls itself; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
