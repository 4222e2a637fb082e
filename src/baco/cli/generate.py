"""``baco generate``: draw answers, and show which model wrote which word."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baco.cli import options as opt
from baco.cli.console import note, print_json
from baco.cli.progress import answering
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.batch.answer_file import AnswerFile
    from baco.routing.router import Router


@opt.grouped()
def generate(
    *,
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; '-' or nothing reads standard input.")
    ] = None,
    n: opt.Answers = 1,
    routing: opt.RouterOptions,
    compare: Annotated[
        bool, typer.Option("--compare", help="Base, aligned and BACo next to each other.")
    ] = False,
    models: opt.PairOptions,
    tokenizers: opt.TokenizerOptions,
    sampling: opt.SamplingOptions,
    structure: opt.StructureOptions,
    as_json: opt.AsJson = False,
    jsonl: Annotated[
        Path | None,
        typer.Option("--jsonl", help='Many prompts: a file of {"prompt": …} or {"messages": …}.'),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the answers to --jsonl go.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="Also draw the coloured answers to this file.")
    ] = None,
    weights: opt.WeightOptions,
    backend: opt.Backend = None,
    servers: opt.BackendOptions,
    templates: opt.TemplateOptions,
) -> None:
    """Draw n answers to a prompt, every word coloured by the model it came from."""
    if (jsonl is None) != (output is None):
        raise BacoError("--jsonl and --output go together: give both, or a prompt")
    if jsonl is not None and (prompt is not None or compare or as_json or svg is not None):
        raise BacoError(
            "--jsonl takes its prompts from the file: leave out the prompt, --compare, "
            "--json and --svg"
        )
    if as_json and svg is not None:
        raise BacoError("give --json or --svg, not both")
    for target in (svg, output):
        if target is not None and target.is_dir():
            raise BacoError(f"cannot write {target}: it is a folder")
        if target is not None and not target.absolute().parent.is_dir():
            raise BacoError(f"cannot write {target}: no such folder as {target.absolute().parent}")
    settings = sampling.settings(n) | structure.settings()
    routing.check()
    from baco.routing.parser import CONSTANTS, router_name

    if (
        compare
        and routing.router is not None
        and (alone := router_name(routing.router)) in CONSTANTS
    ):
        raise BacoError(f"--compare shows {alone} anyway: give another router")
    groups = (models, tokenizers, weights, servers, templates)
    if jsonl is not None and output is not None:
        from baco.batch.answer_file import AnswerFile
        from baco.batch.rows import read_rows

        # The files are checked before two models are loaded.
        answers = AnswerFile(output, read_rows([jsonl]), settings)
        context.with_resource(answers.held())
        baco = opt.load(*groups, backend=backend or answers.begun_backend())
        loading = templates.arguments() | tokenizers.arguments()
        recorded = (
            "base_template",
            "chat_template",
            "trust_remote_code",
            "separate_tokenizers",
        )
        more = opt.given({name: loading[name] for name in recorded})
        _answer_file(baco, answers, routing.choose(baco), more)
        return
    text = _prompt(prompt)
    baco = opt.load(*groups, backend=backend)
    router = routing.choose(baco)
    opt.take_today(baco, text, sampling.system)
    _answer(baco, text, router, settings, compare=compare, as_json=as_json, svg=svg)


def _answer_file(
    baco: "Baco", answers: "AnswerFile", router: "Router", more: dict[str, Any]
) -> None:
    """Answer the rows of ``--jsonl``."""
    from baco.batch.answering import broke_off
    from baco.batch.job import LocalExecutor, carry_out

    total = len(answers.rows)
    try:
        answers.begin(baco, router, more)
        if answers.date is not None:
            note(f"the prompts hold the date {answers.date}")
        with answering("prompts", total) as bar:
            for _ in carry_out(answers, partial(answers.worker, baco), LocalExecutor(), bar):
                pass
        broken = answers.finish()
    except OSError as error:
        raise BacoError(f"cannot write {answers.partial}: {error.strerror}") from error
    note(f"{total} prompts answered in {answers.path}")
    if broken:
        raise broke_off(len(broken), total, answers.path, broken[0])


def _answer(
    baco: Any,
    prompt: str,
    router: Any,
    settings: dict[str, Any],
    *,
    compare: bool,
    as_json: bool,
    svg: Path | None,
) -> None:
    from baco.cli.answers import Show
    from baco.cli.comparison import show_comparison
    from baco.outputs import check_whole, record
    from baco.routing.parser import router as parse

    # One seed for all columns of a comparison.
    settings = settings | {
        "seed": baco.pair.defaults.updated({"seed": settings.get("seed")}).seeded().seed
    }
    routers = [parse("Base"), parse("Aligned"), router] if compare else [router]
    if as_json:
        answers = [baco.generate(prompt, router=one, **settings) for one in routers]
        records = [record(prompt, baco.pair, settings, each, timed=True) for each in answers]
        if compare:
            names = ("base", "aligned", "baco")
            print_json({"prompt": prompt} | dict(zip(names, records, strict=True)))
        else:
            print_json(records[0])
        check_whole([completion for each in answers for completion in each])
    elif compare:
        show_comparison(baco, prompt, routers, settings, svg)
    else:
        Show(baco, prompt, router, settings).run(svg)


def _prompt(argument: str | None) -> str:
    if argument is not None and argument != "-":
        text = argument
    elif argument is None and sys.stdin.isatty():
        raise BacoError('no prompt: give one, as in baco generate "Recommend a summer destination"')
    else:
        try:
            text = sys.stdin.read().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise BacoError(f"standard input is not valid UTF-8: {error}") from error
    opt.check_text(text)
    if not text.strip():
        raise BacoError("the prompt is empty: give some text to answer")
    return text.strip("\n")
