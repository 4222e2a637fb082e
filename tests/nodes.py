"""A Ray cluster of several nodes on this machine; tests kill its processes and nodes."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

# How Ray names a process that carries out pieces of a job.
WORKER = "ray::_Worker"

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # What the machine is set up for is none of the tests' business.
    "RAY_AUTH_MODE": "disabled",
    # Ray's workers stand back for others, and would get nothing beside other tests.
    "RAY_worker_niceness": "0",
    # A node that is gone is found out within seconds.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


class Nodes:
    """A head node for drivers, and two nodes with two processors each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        os.environ.update(ENVIRONMENT)
        self._small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **self._small})
        self._nodes: list[Any] = []
        self.address: str = self._cluster.address
        self.complete()

    def complete(self) -> None:
        """Start nodes in the place of lost ones."""
        while len(self._nodes) < 2:
            self._nodes.append(self._cluster.add_node(num_cpus=2, **self._small))

    def shutdown(self) -> None:
        self._cluster.shutdown()

    def processes(self, title: str) -> list[psutil.Process]:
        """Those of the cluster, on any node, that Ray calls so."""
        return [process for node in self._nodes for process in _processes(node, title)]

    @contextmanager
    def held(self, title: str) -> Iterator[list[psutil.Process]]:
        """Processes stand still, so that nothing ends while something is taken away."""
        held = self.processes(title)
        for process in held:
            process.suspend()
        try:
            yield held
        finally:
            for process in held:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def kill_one(self, title: str) -> None:
        """Take a process away."""
        with self.held(title) as processes:
            processes[0].send_signal(signal.SIGKILL)

    def remove_one(self, title: str) -> None:
        """Take a node with such processes away, as if its machine had lost power."""
        with self.held(title):
            node = next(node for node in self._nodes if _processes(node, title))
            self._nodes.remove(node)
            self._cluster.remove_node(node, allow_graceful=False)


def _processes(node: Any, title: str) -> list[psutil.Process]:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [process for process in raylet.children() if _title(process).startswith(title)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
