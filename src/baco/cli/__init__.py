"""The command line: `baco COMMAND`. Thin: every command checks its input, calls the API, prints."""

import re
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from baco import BacoError, __version__
from baco.cli.batch import batch
from baco.cli.bench import bench
from baco.cli.calibrate import calibrate
from baco.cli.chat import chat
from baco.cli.console import complain
from baco.cli.demo import demo
from baco.cli.diagnose import diagnose
from baco.cli.generate import generate
from baco.cli.lists import pairs, routers
from baco.cli.pair import pair
from baco.cli.report import report
from baco.cli.score import score
from baco.cli.serve import serve
from baco.cli.sweep import sweep

INTERRUPTED = 130
# How torch says it, on a GPU and on a CPU.
_OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|allocate memory", re.IGNORECASE)

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
    batch: "baco batch prompts.jsonl answers/ -n 8 --backend ray --workers 2",
    chat: "baco chat --router P-Punc:0.4 -n 3",
    routers: "baco routers --json",
    pairs: "baco pairs",
    diagnose: "baco diagnose --base Qwen/Qwen2.5-7B --aligned Qwen/Qwen2.5-7B-Instruct",
    calibrate: "baco calibrate --pair demo --router P-Punc --diversity 0.5",
    sweep: "baco sweep --pair demo --out runs/demo",
    score: "baco score runs/demo --metric self_bleu",
    report: "baco report runs/demo",
    bench: "baco bench --quick",
    serve: "baco serve --pair demo --port 8000",
}
for _command, _example in _EXAMPLES.items():
    app.command(epilog=f"Example: {_example}")(_command)
app.add_typer(demo, name="demo")
app.add_typer(pair, name="pair")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"baco {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a command; every error a user can cause is one line and exit code 2."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of ``baco ARGUMENTS``."""
    try:
        code = app(arguments, prog_name="baco", standalone_mode=False, obj=arguments)
    except typer.TyperException as error:
        if not error.format_message():
            return 2  # no command: its help has been shown
        command = next((a for a in arguments if not a.startswith("-")), "")
        known = [c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands]
        where = f"baco {command} --help" if command in known else "baco --help"
        complain(f"{error.format_message().rstrip('.')}; see '{where}'")
        return 2
    except BacoError as error:
        complain(str(error))
        return 2
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        complain("out of memory: lower -n or --max-tokens, or use a smaller model or --dtype")
        return 2
    if code == INTERRUPTED:
        complain("interrupted")
    return code if isinstance(code, int) else 0
