"""The command line: `baco COMMAND`. Thin: every command checks its input, calls the API, prints."""

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from baco.cli.batch import batch
from baco.cli.bench import bench
from baco.cli.calibrate import calibrate
from baco.cli.chat import chat
from baco.cli.console import Debug, OutputError, StandardOutput, complain, give_up_output
from baco.cli.dataset import dataset
from baco.cli.demo import demo
from baco.cli.diagnose import diagnose
from baco.cli.generate import generate
from baco.cli.lists import combiners, methods, metrics, pairs, routers, samplers, tasks
from baco.cli.pair import pair
from baco.cli.report import report
from baco.cli.router import router
from baco.cli.score import score
from baco.cli.serve import serve
from baco.cli.study import study
from baco.cli.submission import noveltybench
from baco.cli.sweep import sweep
from baco.errors import OUT_OF_MEMORY, BacoError, one_line
from baco.version import __version__

FAULT, UNEXPECTED, INTERRUPTED = 2, 1, 130
_DEBUG = "--debug"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}

app = typer.Typer(
    name="baco",
    help="Decode with a base model and its aligned sibling at once: diverse and good answers.",
    epilog='Example: baco generate "Recommend a summer destination" -n 8',
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EXAMPLES: dict[Callable[..., None], str] = {
    generate: 'baco generate "Recommend a summer destination" -n 8 --router P-Punc:0.4',
    batch: "baco batch topics.csv data/ -n 8 --dataset --prompt-template 'Joke about {{ topic }}'",
    chat: "baco chat --router P-Punc:0.4 -n 3",
    routers: "baco routers --json",
    combiners: "baco combiners",
    samplers: "baco samplers",
    pairs: "baco pairs",
    tasks: "baco tasks",
    methods: "baco methods --json",
    metrics: "baco metrics",
    diagnose: "baco diagnose --frontier --pair qwen2.5-1.5b --prompts my-prompts.txt",
    calibrate: "baco calibrate --pair demo --router P-Punc --diversity 0.5",
    sweep: "baco sweep --pair demo --out runs/demo",
    score: "baco score runs/demo --metric self_bleu",
    report: "baco report runs/demo",
    noveltybench: "baco noveltybench runs/novelty --setting P-Punc:0.4 --name baco-llama-3-8b",
    bench: "baco bench --quick",
    serve: "baco serve --pair demo --port 8000",
}
for _command, _example in _EXAMPLES.items():
    app.command(epilog=f"Example: {_example}")(_command)
app.add_typer(dataset, name="dataset")
app.add_typer(demo, name="demo")
app.add_typer(pair, name="pair")
app.add_typer(router, name="router")
app.add_typer(study, name="study")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"baco {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[  # noqa: ARG001
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            _DEBUG,
            envvar="BACO_DEBUG",
            help="Show tracebacks and the logs of libraries. May follow the command too.",
        ),
    ] = False,
) -> None:
    Debug.on = debug


def main() -> None:
    """Run a command; every error a user can cause is one line and exit code 2."""
    _open_streams()
    sys.exit(run(sys.argv[1:]))


def _open_streams() -> None:
    """Open closed standard streams, so that no file that is opened later takes their numbers.

    A library that writes to standard error would write into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The original too: the size of the terminal is read from it.
        sys.stdout = sys.__stdout__ = StandardOutput.over(sys.stdout)  # type: ignore[misc]


def run(arguments: list[str]) -> int:
    """The exit code of ``baco ARGUMENTS``."""
    Debug.on = False
    if sys.stdout is None:
        complain("standard output is closed: send it to /dev/null where you do not want it")
        return FAULT
    code = _run(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        give_up_output()
    except OutputError as error:
        if code == 0:
            complain(str(error), error)
        give_up_output()
        code = FAULT
    return code


def _run(arguments: list[str]) -> int:
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if _DEBUG in own:  # an option of all commands, before or after the command's name
        arguments = [_DEBUG, *(a for a in own if a != _DEBUG), *arguments[len(own) :]]
    try:
        code = app(
            arguments,
            prog_name="baco",
            standalone_mode=False,
            obj=[argument for argument in arguments if argument != _DEBUG],
        )
    except typer.TyperException as error:
        if not error.format_message():
            return FAULT  # no command: its help has been shown
        # The context of a usage error is its command's: "baco pair export".
        context = getattr(error, "ctx", None)
        where = f"{context.command_path if context else 'baco'} --help"
        complain(f"{error.format_message().rstrip('.')}; see '{where}'", error)
        return FAULT
    except BacoError as error:
        complain(str(error), error)
        return FAULT
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and (error.filename or error.errno in _NO_SPACE):
            verb = "write" if error.errno in _NO_SPACE else "read or write"
            where = f" {error.filename}" if error.filename else ""
            complain(f"cannot {verb}{where}: {error.strerror}", error)
            return FAULT
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            message = "out of memory: lower -n or --max-tokens, or use a smaller model or --dtype"
            complain(message, error)
            return FAULT
        kind, message = type(error).__name__, one_line(error)
        what = message if message.startswith(kind) else f"{kind}: {message}"
        complain(f"unexpected {what} (baco --debug shows where)", error)
        return UNEXPECTED
    if code == INTERRUPTED:
        complain("interrupted")
    return code if isinstance(code, int) else 0
