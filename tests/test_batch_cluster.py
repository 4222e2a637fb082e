"""A batch on a Ray cluster of several nodes: the rows of one process, whatever is lost."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from baco.cli import run
from tests.test_batch import BACO, prompt_file, shards, wait_for

ray = pytest.importorskip("ray")

DRAWS = ["-n", "4", "-r", "P-Punc:0.4", "-s", "5", "--max-tokens", "32", "--shard-rows", "2"]
SHARDS = 24


class Nodes:
    """A head that drives and four nodes with a processor each, all on this machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        small: dict[str, Any] = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        self.nodes = [self.cluster.add_node(num_cpus=1, **small) for _ in range(4)]
        self.address: str = self.cluster.address

    def workers(self) -> list[int]:
        """Processes that make shards, on any node."""
        listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True)
        own = [line.split(maxsplit=1) for line in listed.stdout.splitlines() if "MapWorker" in line]
        return [int(pid) for pid, args in own if args.startswith("ray::")]

    def remove_one(self, workers: list[int]) -> None:
        """Take a node away that makes shards, as if its machine had lost power."""
        parents = {_parent(pid) for pid in workers}
        node = next(n for n in self.nodes if _raylet(n) in parents)
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # A node that is gone is found out within seconds.
    for name, value in {
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }.items():
        os.environ[name] = value
    nodes = Nodes()
    yield nodes
    nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompt_file(tmp_path_factory.mktemp("in") / "in.jsonl", 2 * SHARDS)


@pytest.fixture(scope="module")
def alone(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes."""
    out = tmp_path_factory.mktemp("batches") / "alone"
    assert run(["batch", str(prompts), str(out), *DRAWS]) == 0
    return shards(out)


def on(cluster: Nodes, workers: int) -> list[str]:
    return ["--backend", "ray", "--address", cluster.address, "--workers", str(workers)]


def made(out: Path, shards: int) -> Callable[[], bool]:
    return lambda: len(list(out.glob("rows-*"))) >= shards


@pytest.mark.parametrize("workers", [1, 2])
def test_replicas_make_the_rows_of_one_process(
    workers: int, cluster: Nodes, prompts: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(["batch", str(prompts), str(out), *DRAWS, *on(cluster, workers)]) == 0
    assert shards(out) == alone


def test_a_driver_that_is_killed_or_interrupted_costs_only_what_was_in_flight(
    cluster: Nodes, prompts: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["batch", str(prompts), str(out), *DRAWS, *on(cluster, 2)]
    before: dict[str, int] = {}
    for kill, there in ((signal.SIGKILL, 4), (signal.SIGINT, 12)):
        process = subprocess.Popen([*BACO, *command], stderr=subprocess.PIPE, text=True)
        wait_for(process, made(out, there))
        process.send_signal(kill)
        _, told = process.communicate()
        assert process.returncode == (-9 if kill == signal.SIGKILL else 130)
        assert "Traceback" not in told
    _wait_until(lambda: not cluster.workers())
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("rows-*")}
    assert len(before) < SHARDS
    assert run(command) == 0
    assert shards(out) == alone
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_a_worker_and_then_a_node_are_lost_and_no_row_is(
    cluster: Nodes, prompts: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["batch", str(prompts), str(out), *DRAWS, *on(cluster, 4)]
    process = subprocess.Popen([*BACO, *command], stderr=subprocess.PIPE, text=True)
    wait_for(process, made(out, 3))
    os.kill(cluster.workers()[0], signal.SIGKILL)
    wait_for(process, made(out, 8))
    cluster.remove_one(cluster.workers())
    assert not made(out, SHARDS)(), "it had ended before the node was lost: the test shows nothing"
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert shards(out) == alone


def _wait_until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        (["--gpus-per-worker", "0"], "gpus-per-worker is 0: give a number above 0"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_in_one_line(
    arguments: list[str],
    told: str,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert run(["batch", str(prompts), str(out), "--backend", "ray", *arguments]) == 2
    said = capsys.readouterr().err
    assert told in " ".join(said.split()) and said.count("baco:") == 1
    assert not out.exists()


def test_what_a_replica_refuses_is_told_with_its_line_before_anything_runs(
    cluster: Nodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out"
    rows = [{"prompt": "x"}, {"prompt": "word " * 600}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["batch", str(path), str(out), *on(cluster, 1)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "in.jsonl, line 2: 6" in said and "shorten the prompt" in said
    assert not out.exists()


def test_storage_that_is_not_shared_is_refused(
    cluster: Nodes, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A replica that sees another manifest under the same path writes nothing there."""
    from baco.batch.output import Output
    from baco.batch.replica import Copy, Order, Replica

    order = Order(Copy({"max_rows": 2}, 1), Output(tmp_path, "jsonl", 1, 1), {"format": 1}, {})
    with pytest.raises(ValueError, match="storage that all nodes share"):
        Replica(order).make(range(1), [])
    assert not list(tmp_path.iterdir())
