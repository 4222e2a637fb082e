"""A process for work on what others wrote, within limits of time and memory.

Nothing inside a Python process limits the time and the memory of a library's call, or survives its
crash. Such work is done in a process that is started once, answers requests one after the other,
and is replaced when a request ends it. Any thread can send a request. A request and its reply are
one line of JSON each, on the process's standard input and output.

`LimitedProcess` is the parent's side; :func:`reply_to_requests` is all that the program calls. To
start quickly, this module imports only the standard library and `baco.errors`.
"""

import atexit
import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from baco.errors import BacoError

_TIMED_OUT = -getattr(signal, "SIGPROF", 0)


class EndedError(Exception):
    """The process ended without a reply.

    Attributes:
        code: its exit code, or minus the number of the signal that ended it.
        timed_out: the request took longer than its limit.
    """

    def __init__(self, code: int, *, timed_out: bool = False) -> None:
        super().__init__()
        self.code, self.timed_out = code, timed_out

    def __str__(self) -> str:
        if self.code >= 0:
            return f"exit code {self.code}"
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"


class LimitedProcess:
    """The process, started for the first request and after it has ended.

    Args:
        program: its Python file.
        memory: bytes that it may use beyond those of a new process.
        purpose: completes "the process that ...", for messages.
    """

    def __init__(self, program: Path, memory: int, purpose: str) -> None:
        self._program, self._memory, self._purpose = program, memory, purpose
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.end)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The reply to a request.

        Args:
            request: JSON values; anything else is converted to a text.
            seconds: of computing that it may take.

        Raises:
            EndedError: the request ended the process.
            BacoError: the process cannot be started.
        """
        line = json.dumps({**request, "seconds": seconds}, default=str).encode() + b"\n"
        with self._lock:
            while True:
                is_new, started = self._process is None, time.monotonic()
                process = self._started()
                assert process.stdin is not None
                assert process.stdout is not None
                reply = b""
                try:
                    process.stdin.write(line)
                    process.stdin.flush()
                    reply = process.stdout.readline()
                except OSError:
                    pass  # it has ended
                except BaseException:
                    self.end()  # its reply would be read as that of the next request
                    raise
                if reply.endswith(b"\n"):
                    message: dict[str, Any] = json.loads(reply)
                    if message.get("error") == "MemoryError":
                        self.end()
                    return message
                code = self.end()
                late = time.monotonic() - started >= seconds
                timed_out = code == _TIMED_OUT or (not _TIMED_OUT and late)
                # A process that was ended from outside while it waited is replaced.
                if is_new or timed_out:
                    raise EndedError(code, timed_out=timed_out)

    def start(self) -> None:
        """Start the process, which gets ready while this one does other work.

        Raises:
            BacoError: it cannot be started.
        """
        with self._lock:
            self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        path = os.pathsep.join(str(folder) for folder in sys.path if str(folder))
        try:
            self._process = subprocess.Popen(
                # -P: modules beside the program must not shadow the standard library.
                [sys.executable, "-P", str(self._program), str(self._memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the parent
            )
        except (OSError, TypeError) as error:
            raise BacoError(f"cannot start the process that {self._purpose}: {error}") from error
        return self._process

    def end(self) -> int:
        """End the process, if there is one; returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        with contextlib.suppress(OSError):
            process.communicate()
        return process.returncode

    def _forget(self) -> None:
        """After a fork, in the child: the process belongs to the parent."""
        process, self._process = self._process, None
        self._lock = threading.Lock()
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
            process.returncode = 0  # not a child of this process


def reply_to_requests(reply_to: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In the process: reply to requests until standard input ends."""
    _limit_memory(int(sys.argv[1]))
    limit_time = _timer()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        limit_time(request["seconds"])
        try:
            reply = json.dumps(reply_to(request)) + "\n"
        except MemoryError:
            reply = json.dumps({"error": "MemoryError"}) + "\n"
        limit_time(0)
        sys.stdout.write(reply)
        sys.stdout.flush()


def _timer() -> Callable[[float], object]:
    """A function that ends this process after a number of seconds; 0 cancels it.

    Where the system supports it, CPU seconds count, so that a busy machine does not shorten them.
    """
    if hasattr(signal, "setitimer"):
        # The parent may ignore or block the signal, which is inherited.
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
        return lambda seconds: signal.setitimer(signal.ITIMER_PROF, seconds)
    dump = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - stays open

    def watch(seconds: float) -> None:
        if seconds:
            faulthandler.dump_traceback_later(seconds, exit=True, file=dump)
        else:
            faulthandler.cancel_dump_traceback_later()

    return watch


def _limit_memory(size: int) -> None:
    """Limit this process to ``size`` bytes more than it has now, where the system supports it."""
    try:
        import resource
    except ImportError:
        return
    with contextlib.suppress(OSError):  # preloaded libraries map memory too
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
        size += int(pages) * resource.getpagesize()
    for name, limit in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, size)):
        with contextlib.suppress(OSError, ValueError):  # a lower limit is set already
            resource.setrlimit(name, (limit, limit))
