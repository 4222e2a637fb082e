"""Calls to the processes of a Ray cluster: each gets a result, whatever is lost or stopped."""

import gc
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from baco import BacoError
from baco.batch.ray_cluster import Cluster, Share
from baco.cli import run
from tests.nodes import WORKER, Nodes
from tests.test_batch import BACO, WAIT_SECONDS, wait_for

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def share(cluster: Nodes) -> Iterator[Share]:
    with Cluster(cluster.address, workers=4).reached() as share:
        yield share


def test_a_call_returns_or_raises_as_its_function_does(share: Share) -> None:
    from baco.batch.ray_executor import cluster_pool

    def refuse() -> None:
        raise BacoError("not this")

    def fail() -> None:
        raise ZeroDivisionError("a bug")

    with cluster_pool(Share(1, 1, 0), gc.enable) as executor:
        assert [executor.submit(pow, 2, power).result() for power in range(3)] == [1, 2, 4]
        with pytest.raises(BacoError, match=r"^not this$"):
            executor.submit(refuse).result()
        with pytest.raises(ZeroDivisionError, match="a bug"):
            executor.submit(fail).result()
        with pytest.raises(TypeError):
            executor.submit(repr, threading.Lock()).result()
        assert executor.submit(pow, 2, 3).result() == 8


def test_only_a_call_that_always_ends_its_process_is_given_up(
    share: Share,
) -> None:
    from baco.batch.ray_executor import cluster_pool

    with cluster_pool(Share(2, 1, 0), gc.enable) as executor:
        bad = executor.submit(os._exit, 1)
        good = [executor.submit(pow, 2, power) for power in range(20)]
        assert [one.result() for one in good] == [2**power for power in range(20)]
        with pytest.raises(BacoError, match="5 processes were lost at the same work"):
            bad.result()


def test_a_cancelled_call_does_not_run_and_a_stopped_driver_does_not_wait(share: Share) -> None:
    from baco.batch.ray_executor import cluster_pool

    with cluster_pool(Share(1, 1, 0), gc.enable) as executor:
        ready = executor.submit(os.getpid).result()
        under_way = executor.submit(time.sleep, 3600)
        cancelled, waiting = (executor.submit(os.getpid) for _ in range(2))
        assert cancelled.cancel()
        while not under_way.running():
            time.sleep(0.01)
    for call in (under_way, waiting):
        assert isinstance(call.exception(timeout=WAIT_SECONDS), RuntimeError)
    assert cancelled.cancelled()
    while psutil.pid_exists(ready):
        time.sleep(0.05)


def test_processes_that_cannot_start_are_an_error(share: Share) -> None:
    from baco.batch.ray_executor import cluster_pool

    def start() -> None:
        raise OSError("no such folder here")

    with (
        cluster_pool(Share(1, 1, 0), start) as executor,
        pytest.raises(BacoError, match=r"no process of the cluster starts: .*no such folder here"),
    ):
        executor.submit(pow, 2, 2).result()


def test_a_node_that_does_not_come_back_keeps_no_call_waiting(cluster: Nodes, share: Share) -> None:
    from baco.batch.ray_executor import cluster_pool

    def slowly(power: int) -> int:
        time.sleep(0.2)
        return 1 << power

    with cluster_pool(share, gc.enable) as executor:
        calls = [executor.submit(slowly, power) for power in range(60)]
        calls[8].result()
        cluster.remove_one(WORKER)
        assert not calls[-1].done(), "all was done before the node was lost"
        assert [call.result(timeout=WAIT_SECONDS) for call in calls] == [2**p for p in range(60)]
    cluster.complete()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--address", "auto"], "--address is of a cluster: give --backend ray with it"),
        (["--backend", "vllm"], "backend is 'vllm': a sweep draws on local or ray"),
        (["--backend", "ray", "--workers", "0"], "workers is 0: give 1 or more"),
    ],
)
def test_a_sweep_refuses_invalid_options_of_its_cluster(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sweep", "--out", str(tmp_path / "run"), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(3 * WAIT_SECONDS)
def test_a_sweep_stopped_once_with_a_lost_worker_equals_that_of_one_process(
    cluster: Nodes, tmp_path: Path
) -> None:
    command = ["sweep", "--limit", "3", "-n", "2", "--seed", "5", "--max-tokens", "12"]
    command += ["--preset", "quick", "--router", "P-Punc", "--method", "mixing", "--no-score"]
    here, there = tmp_path / "here", tmp_path / "there"
    assert run([*command, "--workers", "1", "--out", str(here)]) == 0
    command += ["--out", str(there), "--backend", "ray", "--address", cluster.address]
    driver = subprocess.Popen(
        [*BACO, *command, "--workers", "1"], stderr=subprocess.PIPE, text=True
    )
    wait_for(driver, (there / "speed.jsonl").exists)
    with cluster.held(WORKER):
        driver.send_signal(signal.SIGINT)
        _, stderr = driver.communicate(timeout=WAIT_SECONDS)
    assert driver.returncode == 130, stderr
    assert "Traceback" not in stderr and stderr.splitlines()[-1] == "baco: interrupted"
    before = (there / "speed.jsonl").stat().st_size
    assert before < (here / "speed.jsonl").stat().st_size / 2
    driver = subprocess.Popen(
        [*BACO, *command, "--workers", "2"], stderr=subprocess.PIPE, text=True
    )
    wait_for(driver, lambda: (there / "speed.jsonl").stat().st_size > before)
    cluster.kill_one(WORKER)
    _, stderr = driver.communicate(timeout=WAIT_SECONDS)
    assert driver.returncode == 0, stderr
    assert (there / "samples.jsonl").read_bytes() == (here / "samples.jsonl").read_bytes()
    assert (there / "prompts.jsonl").read_bytes() == (here / "prompts.jsonl").read_bytes()
