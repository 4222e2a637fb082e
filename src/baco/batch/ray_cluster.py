"""The connection to a Ray cluster, or to one started on this machine, and the resources used."""

import io
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from baco.device import cores
from baco.errors import BacoError

CONNECT_SECONDS = 10
# Longest line of Ray's messages, in characters.
LINE = 120
MISSING = "a cluster needs Ray: pip install 'baco[ray]'"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster as the user names it, and the processes to run on it.

    Attributes:
        address: ``auto``, ``host:port``, ``ray://host:port``; None: Ray on this machine, for as
            long as the command runs.
        workers: processes; None: one per device.
        threads: CPUs of a process.
        gpus: GPUs of a process, where the cluster has any.
        on_cpu: do not use GPUs.
    """

    address: str | None = None
    workers: int | None = None
    threads: int = 1
    gpus: float = 1
    on_cpu: bool = False

    @contextmanager
    def reached(self) -> Iterator["Share"]:
        """Connect to the cluster until the block ends.

        Raises:
            BacoError: Ray is not installed, the cluster does not answer or has no room.
        """
        # Ray's core reports lost workers; the errors that follow report them again.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            import ray
        except ImportError as error:
            raise BacoError(MISSING) from error
        # Ray prints long reports of lost workers on standard output, which belongs to the command.
        with redirect_stdout(_Short()):
            self._connect(ray)
            try:
                with _stopped_by_sigterm():
                    yield self._share(ray)
            finally:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        self._check_address()
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is None:
            # A cluster for one command sends no usage statistics.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            quiet |= {"include_dashboard": False}
            if self.workers is not None:
                quiet["num_cpus"] = max(cores(), self.workers * self.threads)
        try:
            with _mute():
                ray.init(address=self.address or "local", **quiet)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if self.address is None:
                raise BacoError(f"Ray does not start on this machine: {reason}") from error
            raise BacoError(
                f"no Ray cluster at {self.address}: {reason} (Ray here is {ray.__version__}: the "
                "cluster's must be the same, and so must RAY_AUTH_MODE)"
            ) from error

    def _check_address(self) -> None:
        """Fail early: Ray itself tries an address that does not answer for minutes."""
        if self.address is None or self.address in ("auto", "local"):
            return
        host, colon, port = self.address.removeprefix("ray://").rpartition(":")
        if not colon or not port.isdigit():
            raise BacoError(f"address is {self.address!r}: give auto, host:port or ray://host:port")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except OSError as error:
            raise BacoError(
                f"no Ray cluster at {self.address}: {error.strerror or error}"
            ) from error

    def _share(self, ray: Any) -> "Share":
        resources = ray.cluster_resources()
        gpus = 0.0 if self.on_cpu else resources.get("GPU", 0.0)
        cpus = resources.get("CPU", 0.0)
        fits = int(gpus // self.gpus) if gpus else int(cpus // self.threads)
        if fits < 1 and self.workers is None:
            raise BacoError(
                f"no room for a process in the cluster: it needs {self.gpus:g} GPUs or "
                f"{self.threads} CPUs; lower --gpus-per-worker or --threads, or give --workers to "
                "wait for machines"
            )
        return Share(self.workers or fits, self.threads, self.gpus if gpus else 0)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, which schedulers send, act as Ctrl-C does; Ray's own handler aborts."""

    def stop(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Short(io.TextIOBase):
    """Standard error with shortened lines; Ray's logs have them whole."""

    def write(self, text: str) -> int:
        sys.stderr.write("\n".join(shorten(line) for line in text.split("\n")))
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def shorten(line: str) -> str:
    """At most `LINE` characters."""
    return line if len(line) <= LINE else line[: LINE - 1] + "…"


@contextmanager
def _mute() -> Iterator[None]:
    """Discard what Ray's core writes to standard error outside Python, such as its log level."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@dataclass(frozen=True, slots=True)
class Share:
    """Part of a cluster: a number of processes, and the resources of each."""

    workers: int
    cpus: int
    gpus: float

    @property
    def resources(self) -> dict[str, float]:
        """Resources of one process, as Ray's options."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


def go_to(folder: str) -> None:
    """Change to the command's folder, so that relative paths mean the same, if it is here."""
    if Path(folder).is_dir():
        os.chdir(folder)


def last_line(error: Exception) -> str:
    """The last line of an error of Ray; the lines above are tracebacks of its processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
