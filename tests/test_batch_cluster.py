"""A batch on a Ray cluster of several nodes gives the rows of one process, whatever is lost."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from baco.cli import run
from tests.nodes import WORKER, Nodes
from tests.test_batch import BACO, WAIT_SECONDS, prompt_file, shards, wait_for

pytest.importorskip("ray")

DRAWS = ["-n", "4", "-r", "P-Punc:0.4", "-s", "5", "--max-tokens", "32", "--shard-rows", "2"]
SHARDS = 24


def on(cluster: Nodes, workers: int) -> list[str]:
    return ["--backend", "ray", "--address", cluster.address, "--workers", str(workers)]


def has_shards(out: Path, shards: int) -> Callable[[], bool]:
    return lambda: len(list(out.glob("rows-*"))) >= shards


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        (["--address", "somewhere"], "address is 'somewhere': give auto"),
        (["--gpus-per-worker", "0"], "gpus-per-worker is 0: give a number above 0"),
    ],
)
def test_an_unreachable_cluster_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = prompt_file(tmp_path / "in.jsonl", 1), tmp_path / "out"
    assert run(["batch", str(path), str(out), "--backend", "ray", *arguments]) == 2
    stderr = capsys.readouterr().err
    assert message in " ".join(stderr.split()) and stderr.count("baco:") == 1
    assert not out.exists()


def test_an_invalid_row_is_named_before_the_first_answer(
    cluster: Nodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out"
    rows = [{"prompt": "x"}, {"prompt": "word " * 600}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["batch", str(path), str(out), *on(cluster, 1)]) == 2
    stderr = " ".join(capsys.readouterr().err.split())
    assert "in.jsonl, line 2: prompt of 6" in stderr and "shorten the prompt" in stderr
    assert not out.exists()


def test_storage_that_nodes_do_not_share_is_refused(tmp_path: Path) -> None:
    """A replica that sees another manifest under the same path writes nothing there."""
    from baco.batch.answering import LoadSpec
    from baco.batch.shards import Output, Replica, ShardSpec

    output = Output(tmp_path, "jsonl", 1, 1)
    spec = ShardSpec(LoadSpec({"max_rows": 2}, 1), output, {"format": 1}, {})
    with pytest.raises(ValueError, match="storage that all nodes share"):
        Replica(spec)((range(1), []))
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(3 * WAIT_SECONDS)
def test_no_row_is_lost_with_drivers_a_worker_and_a_node(cluster: Nodes, tmp_path: Path) -> None:
    """One replica until the driver is killed, two until Ctrl-C, then four: one and a node lost."""
    prompts, alone = prompt_file(tmp_path / "in.jsonl", 2 * SHARDS), tmp_path / "alone"
    assert run(["batch", str(prompts), str(alone), *DRAWS]) == 0
    out = tmp_path / "out"
    command = ["batch", str(prompts), str(out), *DRAWS]

    driver = subprocess.Popen(
        [*BACO, *command, *on(cluster, 1)], stderr=subprocess.DEVNULL, text=True
    )
    wait_for(driver, has_shards(out, 3))
    with cluster.held(WORKER):
        driver.kill()
    driver.wait()
    until = time.monotonic() + WAIT_SECONDS
    while cluster.processes(WORKER):
        assert time.monotonic() < until, "replicas outlive their driver"
        time.sleep(0.05)
    by_one = shard_times(out)
    assert 3 <= len(by_one) < SHARDS / 2

    driver = subprocess.Popen([*BACO, *command, *on(cluster, 2)], stderr=subprocess.PIPE, text=True)
    wait_for(driver, has_shards(out, len(by_one) + 3))
    with cluster.held(WORKER):
        driver.send_signal(signal.SIGINT)
        _, stderr = driver.communicate(timeout=WAIT_SECONDS)
    assert driver.returncode == 130, stderr
    assert "Traceback" not in stderr and stderr.splitlines()[-1] == "baco: interrupted"
    by_two = shard_times(out)
    assert len(by_two) < SHARDS - 8

    driver = subprocess.Popen(
        [*BACO, *command, *on(cluster, 4)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(driver, has_shards(out, len(by_two) + 2))
    cluster.kill_one(WORKER)
    wait_for(driver, has_shards(out, len(by_two) + 4))
    cluster.remove_one(WORKER)
    by_four = shard_times(out)
    assert len(by_four) < SHARDS, "the batch ended before the node was lost: the test shows nothing"
    stdout, stderr = driver.communicate(timeout=WAIT_SECONDS)
    cluster.complete()
    assert driver.returncode == 0, stderr
    assert not stdout
    assert shards(out) == shards(alone)
    assert {**shard_times(out), **by_one, **by_two, **by_four} == shard_times(out), (
        "a shard was written twice"
    )


def shard_times(out: Path) -> dict[str, int]:
    """Times of modification of all shards."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("rows-*")}
