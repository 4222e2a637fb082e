"""The process that renders templates. `baco.text.templates` starts it; no module imports it.

A template of a downloaded model is a program. In this process it can neither hang nor crash the
process that holds the models, nor use up its memory. To start quickly, it imports only the standard
library, Jinja and `baco.limited_process`.
"""

import json
import random
import traceback
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baco.limited_process import reply_to_requests


class Generation(Extension):
    """``{% generation %}…{% endgeneration %}``, which marks answers: its body."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        """A macro call, so that the body has its own scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class Dict:
    """``dict`` for templates, without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Like Python's own."""
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """``namespace`` for templates; it rejects names of Python internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a variable can be named self
        self, *rest = args
        variables = dict(*rest, **kwargs)
        for name in variables:
            Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, variables)

    def __setitem__(self, name: str, value: Any) -> None:
        Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no {name!r}")


class Clock:
    """``strftime_now`` for a fixed day, at midnight.

    Attributes:
        day: the day.
        read: whether a template has called it.
    """

    def __init__(self) -> None:
        self.day = datetime.min
        self.read = False

    def __call__(self, form: str) -> str:
        self.read = True
        return self.day.strftime(form)


CLOCK = Clock()


def refuse(message: str) -> NoReturn:
    """``raise_exception`` for chat templates."""
    raise jinja2.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """``tojson`` for chat templates, which does not escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def environment(kind: str) -> jinja2.Environment:
    """Chat templates get the environment of ``transformers``. Base and prompt templates keep their
    white space, and an undefined variable is an error. Prompt templates have no clock, so that a
    batch continued on another day has the same prompts.
    """
    options: dict[str, Any] = {"undefined": jinja2.StrictUndefined}
    if kind == "chat":
        options = {"trim_blocks": True, "lstrip_blocks": True}
    jinja = ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols], **options)
    jinja.filters["tojson"] = to_json
    jinja.globals |= {
        "raise_exception": refuse,
        "dict": Dict(),
        "namespace": Namespace,
    }
    if kind != "prompt":
        jinja.globals["strftime_now"] = CLOCK
    return jinja


ENVIRONMENTS = {kind: environment(kind) for kind in ("chat", "base", "prompt")}


@lru_cache(maxsize=64)
def compiled(kind: str, source: str) -> jinja2.Template:
    """A compiled template."""
    return ENVIRONMENTS[kind].from_string(source)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request: ``text`` and whether the clock was read (``clock``), or ``error``."""
    CLOCK.day, CLOCK.read = datetime.fromisoformat(request["date"]), False
    random.seed(0)  # for Jinja's filter `random`
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


if __name__ == "__main__":
    reply_to_requests(answer)
