"""A batch on a Ray cluster of several nodes: the rows of one process, whatever is lost."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from baco.cli import run
from tests.test_batch import BACO, prompt_file, shards, wait_for

ray = pytest.importorskip("ray")

DRAWS = ["-n", "4", "-r", "P-Punc:0.4", "-s", "5", "--max-tokens", "32", "--shard-rows", "2"]
SHARDS = 24
# How Ray names a process of the pool.
ACTOR = "ray::MapWorker"


class Nodes:
    """A head that drives and two nodes with two processors each, all on this machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        small: dict[str, Any] = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        self.nodes = [self.cluster.add_node(num_cpus=2, **small) for _ in range(2)]
        self.address: str = self.cluster.address

    def workers(self, title: str = ACTOR) -> list[int]:
        """Processes that make shards, on any node."""
        return [
            process.pid for process in psutil.process_iter() if _title(process).startswith(title)
        ]

    def remove_one(self) -> None:
        """Take a node away that makes shards, as if its machine had lost power."""
        parents = {psutil.Process(pid).ppid() for pid in self.workers()}
        node = next(n for n in self.nodes if _raylet(n) in parents)
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


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


def _wait_until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        (["--address", "somewhere"], "address is 'somewhere': give auto"),
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
    tmp_path: Path,
) -> None:
    """A replica that sees another manifest under the same path writes nothing there."""
    from baco.batch.output import Output
    from baco.batch.replica import Copy, Order, Replica

    order = Order(Copy({"max_rows": 2}, 1), Output(tmp_path, "jsonl", 1, 1), {"format": 1}, {})
    with pytest.raises(ValueError, match="storage that all nodes share"):
        Replica(order).make(range(1), [])
    assert not list(tmp_path.iterdir())


def test_a_sweep_on_a_cluster_that_loses_a_worker_is_the_run_of_one_process(
    cluster: Nodes, tmp_path: Path
) -> None:
    command = ["sweep", "--limit", "3", "-n", "2", "--seed", "5", "--max-tokens", "12"]
    command += ["--preset", "quick", "--router", "P-Punc", "--method", "mixing", "--no-score"]
    here, there = tmp_path / "here", tmp_path / "there"
    assert run([*command, "--workers", "1", "--out", str(here)]) == 0
    process = subprocess.Popen(
        [*BACO, *command, "--out", str(there), *on(cluster, 2)], stderr=subprocess.PIPE, text=True
    )
    wait_for(process, (there / "speed.jsonl").exists)
    os.kill(cluster.workers("ray::_Worker")[0], signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert (there / "samples.jsonl").read_bytes() == (here / "samples.jsonl").read_bytes()
    assert (there / "prompts.jsonl").read_bytes() == (here / "prompts.jsonl").read_bytes()


def test_a_driver_a_worker_and_a_node_are_lost_and_no_row_is(
    cluster: Nodes, prompts: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*BACO, "batch", str(prompts), str(out), *DRAWS]
    driver = subprocess.Popen([*command, *on(cluster, 2)], stderr=subprocess.DEVNULL)
    wait_for(driver, made(out, 4))
    driver.kill()
    driver.wait()
    _wait_until(lambda: not cluster.workers())
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("rows-*")}
    assert 4 <= len(there) < SHARDS / 2

    process = subprocess.Popen(
        [*command, *on(cluster, 4)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    wait_for(process, made(out, len(there) + 3))
    os.kill(cluster.workers()[0], signal.SIGKILL)
    wait_for(process, made(out, len(there) + 8))
    cluster.remove_one()
    assert not made(out, SHARDS)(), "it had ended before the node was lost: the test shows nothing"
    said, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert not said
    assert shards(out) == alone
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there
