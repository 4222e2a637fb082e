"""The process that renders templates: `baco.text.templates` starts it, and no module imports it.

A template of a downloaded model is a program. Here it can neither hang nor crash the process that
holds the models, nor fill its memory. A request and its reply are one line of JSON each, on
standard input and output. Only the standard library and Jinja are imported: it starts quickly.
"""

import contextlib
import faulthandler
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """``{% generation %}…{% endgeneration %}``, which marks answers for training: its body."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        """The call of a macro, so that the body has a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class Dict:
    """``dict`` of templates, without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As Python's own."""
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """``namespace`` of templates: it takes no name of Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a variable may be called self
        self, *rest = args
        given = dict(*rest, **kwargs)
        for name in given:
            Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no {name!r}")


class Clock:
    """``strftime_now`` of a given day, at midnight.

    Attributes:
        read: a template has asked for the time.
    """

    def __init__(self) -> None:
        self.day = datetime.min
        self.read = False

    def __call__(self, form: str) -> str:
        self.read = True
        return self.day.strftime(form)


CLOCK = Clock()


def refuse(message: str) -> NoReturn:
    """``raise_exception`` of chat templates."""
    raise jinja2.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """``tojson`` of chat templates, which escapes no HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def environment(kind: str) -> jinja2.Environment:
    """What ``transformers`` gives chat templates; base templates keep their white space and may
    name no variable that is not there.
    """
    options: dict[str, Any] = {"undefined": jinja2.StrictUndefined}
    if kind == "chat":
        options = {"trim_blocks": True, "lstrip_blocks": True}
    made = ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols], **options)
    made.filters["tojson"] = to_json
    made.globals |= {
        "raise_exception": refuse,
        "strftime_now": CLOCK,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return made


ENVIRONMENTS = {kind: environment(kind) for kind in ("chat", "base")}


@lru_cache(maxsize=64)
def compiled(kind: str, source: str) -> jinja2.Template:
    """A template, ready to be rendered."""
    return ENVIRONMENTS[kind].from_string(source)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request: ``text`` and whether the clock was read, or ``error``."""
    CLOCK.day, CLOCK.read = datetime.fromisoformat(request["date"]), False
    random.seed(0)  # of Jinja's filter `random`
    try:
        template = compiled(request["kind"], request["source"])
        text = template.render(request["variables"])
    except MemoryError:
        return {"error": "MemoryError"}
    except Exception as error:
        return {
            "error": type(error).__name__,
            "message": str(error),
            "line": getattr(error, "lineno", None),
            "refused": type(error) is jinja2.TemplateError,
            "syntax": isinstance(error, jinja2.TemplateSyntaxError),
            "traceback": traceback.format_exc(),
        }
    if len(text) > request["characters"]:
        return {"error": "TooLong"}
    return {"text": text, "clock": CLOCK.read}


def timer() -> Callable[[float], object]:
    """A function that ends this process after so many seconds; 0 seconds call it off.

    Where the system can, these are seconds of computing: a busy machine does not shorten them.
    """
    if hasattr(signal, "setitimer"):
        # Whoever started this process may ignore or block the signal, which is inherited.
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
        return lambda seconds: signal.setitimer(signal.ITIMER_PROF, seconds)
    dump = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open to the end

    def watch(seconds: float) -> None:
        if seconds:
            faulthandler.dump_traceback_later(seconds, exit=True, file=dump)
        else:
            faulthandler.cancel_dump_traceback_later()

    return watch


def limit_memory(size: int) -> None:
    """Let this process take so many bytes more than it has now, where the system can."""
    try:
        import resource
    except ImportError:
        return
    with contextlib.suppress(OSError):  # what libraries that are preloaded have mapped, if it tells
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
        size += int(pages) * resource.getpagesize()
    for name, limit in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, size)):
        with contextlib.suppress(OSError, ValueError):  # a lower limit holds already
            resource.setrlimit(name, (limit, limit))


def main() -> None:
    """Answer requests until standard input ends."""
    limit_memory(int(sys.argv[1]))
    bound = timer()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        bound(request["seconds"])
        reply = json.dumps(answer(request)) + "\n"
        bound(0)
        sys.stdout.write(reply)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
