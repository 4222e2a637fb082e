"""Servers, each in a process of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx
import psutil

# Seconds to wait for a reply; and of the processor's time in which a server starts, so that other
# work on the machine does not make it late.
WAIT = 900
START = 240


@contextmanager
def served(command: list[str], *paths: Path) -> Iterator[str]:
    """Run a server that takes ``--port``; its address. ``paths`` go before its Python's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen([*command, "--port", str(port)], env=environment)
    url, used, moved = f"http://127.0.0.1:{port}", 0.0, time.monotonic()
    try:
        while True:
            assert process.poll() is None, "the server ended"
            if (now_used := _processor_seconds(process.pid)) > used + 1:
                used, moved = now_used, time.monotonic()
            assert used < START, "the server does not answer"
            assert time.monotonic() < moved + START, "the server does nothing and does not answer"
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield url
        assert process.poll() is None, "the server died of its requests"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _processor_seconds(process: int) -> float:
    """The processor's time that a process and its children have used."""
    used = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        server = psutil.Process(process)
        for each in [server, *server.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = each.cpu_times()
                used = used + times.user + times.system
    return used


def baco(*arguments: str) -> list[str]:
    """``baco ARGUMENTS`` with this interpreter."""
    return [sys.executable, "-m", "baco", *arguments]


def vllm_serve(folder: Path, metadata: Path) -> list[str]:
    """vLLM's own command. It asks for the metadata of a package ``vllm``, but its build for CPUs is
    a package of another name: ``metadata``, to go on the path, then gets what is missing.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        # By the number it tells a build for CPUs from others.
        number = f"{version('vllm-cpu')}+cpu"
        info = metadata / f"vllm-{number}.dist-info"
        info.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n"
        (info / "METADATA").write_text(text, encoding="utf-8")
    return [str(Path(sys.executable).parent / "vllm"), "serve", str(folder)]


def kill_a_worker() -> None:
    """Kill one of the processes that share the models of a vLLM that this process started."""
    for process in psutil.Process().children(recursive=True):
        if process.cmdline()[:1] and process.cmdline()[0].startswith("VLLM::Worker"):
            process.kill()
            return
    raise AssertionError("no worker of vLLM is a child of this process")
