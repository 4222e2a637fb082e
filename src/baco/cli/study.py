"""``baco study``: a human evaluation of a run's answers, from the plan to the report."""

import logging
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from baco.cli import options as opt
from baco.cli.console import note, out, print_json
from baco.cli.study_analysis import StudyPath, power, report, simulate
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.study.build import StudyOptions
    from baco.study.study import Study

study = typer.Typer(no_args_is_help=True, help="Plan, run and analyse a study with human raters.")


@dataclass(frozen=True, slots=True)
class DesignOptions:
    """What is compared, by how many raters, on how many prompts."""

    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "-m",
            help="A method or setting of the run, such as P-Punc:0.4; the first is the one under "
            "test. Repeatable; further names may follow without the option.",
        ),
    ] = None
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Task of the run; needed if it has several.")
    ] = None
    pair: Annotated[
        str | None, typer.Option("--pair", "-p", help="Pair of the run; needed if it has several.")
    ] = None
    raters: Annotated[int, typer.Option("--raters", help="Number of raters.")] = 24
    prompts: Annotated[int, typer.Option("--prompts", help="Number of prompts.")] = 40
    per_rater: Annotated[
        int | None,
        typer.Option(
            "--per-rater",
            show_default="all of them",
            help="Prompts that each rater judges, as sets and as single answers.",
        ),
    ] = None
    set_size: Annotated[int, typer.Option("--set-size", help="Answers of a set, 4 to 6.")] = 5
    word_limit: Annotated[
        int, typer.Option("--word-limit", help="Longer answers are cut, for every method.")
    ] = 80
    creativity: Annotated[
        str, typer.Option("--creativity", help="Judge creativity on a set or on an answer.")
    ] = "set"
    block: Annotated[int, typer.Option("--block", help="Most items between two pauses.")] = 10
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of all random choices.")] = 0
    title: Annotated[str | None, typer.Option("--title", help="Title that raters see.")] = None
    consent: Annotated[
        Path | None,
        typer.Option("--consent", help="File with the consent text; blank lines part paragraphs."),
    ] = None
    rubric: Annotated[
        Path | None, typer.Option("--rubric", help="File with the rubric, in the same form.")
    ] = None

    def options(self, more: list[str] | None) -> "StudyOptions":
        """The study's options; `more` are further methods.

        Raises:
            BacoError: a value that is none, or a file that cannot be read.
        """
        from baco.study.build import StudyOptions

        if self.creativity not in ("set", "answer"):
            raise BacoError(f"creativity is {self.creativity!r}: use set or answer")
        unit: Literal["set", "answer"] = "set" if self.creativity == "set" else "answer"
        return StudyOptions(
            methods=[*(self.methods or ()), *(more or ())],
            task=self.task,
            pair=self.pair,
            raters=self.raters,
            prompts=self.prompts,
            per_rater=self.per_rater,
            set_size=self.set_size,
            word_limit=self.word_limit,
            creativity=unit,
            block=self.block,
            seed=self.seed,
            title=self.title,
            consent=_paragraphs(self.consent),
            rubric=_paragraphs(self.rubric),
        )


def _paragraphs(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BacoError(f"cannot read {path}: give a file of UTF-8 text") from error
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return [paragraph for paragraph in paragraphs if paragraph]


@opt.grouped()
def plan(
    *,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD]...", help="Further methods.")
    ] = None,
    design: DesignOptions,
    out: Annotated[Path, typer.Option("--out", "-o", help="The study's directory.")],
    as_json: opt.AsJson = False,
) -> None:
    """Decide everything before the first judgment, and write it into one file with a hash.

    Questions, contrasts, checks, exclusions and texts are in STUDY/plan.json. Edit it until the
    first answer; later changes start a new version with 'baco study amend'.
    """
    from baco.evaluation.store import Run
    from baco.study.build import build
    from baco.study.study import Study

    created = Study.create(out, *build(Run.open(run), design.options(more)))
    planned = created.plan
    created.close()
    if as_json:
        print_json({"study": str(out), "hash": planned.hash, "minutes": planned.minutes})
        return
    note(f"plan of {len(planned.methods)} methods in {out}: {', '.join(planned.methods)}")
    note(f"each of {planned.raters} raters needs about {planned.minutes} minutes")
    if any(planned.cut.values()):
        cut = ", ".join(f"{number} of {method}" for method, number in planned.cut.items())
        note(f"answers cut at {planned.word_limit} words: {cut}")
    _show(f"plan {planned.hash}")


def amend(
    study: StudyPath,
    reason: Annotated[str, typer.Option("--reason", help="Why the plan changes.")],
    as_json: opt.AsJson = False,
) -> None:
    """Start a new version of a plan that was edited after the first answer.

    Answers keep the version they were given under, and the report names all versions.
    """
    from baco.study.study import amend as begin_version

    changed = begin_version(study, reason)
    changed.close()
    if as_json:
        print_json({"version": changed.version, "hash": changed.plan.hash})
        return
    _show(f"plan {changed.plan.hash}, version {changed.version}")


@dataclass(frozen=True, slots=True)
class WebsiteOptions:
    """Where the website listens, and where raters come from."""

    host: opt.Host = "127.0.0.1"
    port: opt.Port = 8400
    url: Annotated[
        str | None,
        typer.Option("--url", help="Address that raters use, such as https://study.example.org."),
    ] = None
    crowd: Annotated[
        str | None,
        typer.Option(
            "--crowd",
            help="prolific or mturk: raters come to URL/join instead of by personal links.",
        ),
    ] = None
    completion_code: Annotated[
        str | None,
        typer.Option(
            "--completion-code",
            help="Code that all raters get at the end. Default with --crowd: one for each.",
        ),
    ] = None
    per_minute: Annotated[
        int, typer.Option("--per-minute", min=10, help="Requests that a link may send per minute.")
    ] = 240


@opt.grouped()
def serve(*, study: StudyPath, website: WebsiteOptions) -> None:
    """Serve the pages of the raters, and print a secret link for each of them.

    It can be stopped or killed at any moment: an answer that a page shows as saved is on the disk.
    """
    try:
        import uvicorn

        from baco.study.website import Website, WebsiteSettings
    except ImportError as error:
        raise BacoError(
            f"the website needs {error.name}: install it with pip install 'baco[serve]'"
        ) from error
    from baco.sockets import address_of, bind
    from baco.study.study import Study

    if website.crowd not in (None, "prolific", "mturk"):
        raise BacoError(f"crowd is {website.crowd!r}: use prolific or mturk")
    there = Study.open(study)
    if there.simulated:
        raise BacoError(
            f"{study} holds simulated raters: plan another study for people, since their judgments "
            "must not mix"
        )
    bound = bind(website.host, website.port)
    url = (website.url or f"http://{address_of(bound)}").rstrip("/")
    key = there.store.secret("operator")
    settings = WebsiteSettings(
        key,
        website.crowd,  # type: ignore[arg-type]  # checked above
        website.completion_code,
        website.per_minute,
        secure=url.startswith("https:"),
    )
    app = Website(there, settings).app()
    if website.crowd is None:
        for rater in _with_links(there):
            assert rater.number is not None
            _show(f"rater {rater.number + 1:3d}  {url}/r/{rater.link}")
    else:
        parameters = {
            "prolific": "PROLIFIC_PID={{%PROLIFIC_PID%}}",
            "mturk": "workerId=${workerId}",
        }
        _show(f"{website.crowd}  {url}/join?{parameters[website.crowd]}")
    _show(f"operator   {url}/operator  key {key}")
    _log_requests()
    config = uvicorn.Config(app, ws="none", http="h11", log_config=None, access_log=False)
    note(f"{study} at http://{address_of(bound)}, plan {there.plan.hash[:16]}")
    uvicorn.Server(config).run(sockets=[bound])
    there.close()


def _with_links(there: "Study") -> list[Any]:
    """The raters that still have a number, as many as are planned."""
    while there.store.add_rater(at_most=there.plan.raters) is not None:
        pass
    return [r for r in there.store.raters() if r.number is not None and r.link is not None]


def _log_requests() -> None:
    """Requests go to standard error as JSON lines, and so do faults."""
    handler = logging.StreamHandler(sys.stderr)
    for name in ("baco.access", "baco.study"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


def status(study: StudyPath, as_json: opt.AsJson = False) -> None:
    """Show the progress of every rater and of every comparison."""
    from rich.table import Table

    from baco.study.status import comparisons, rater_rows
    from baco.study.study import Study

    with closing(Study.open(study)) as there:
        raters, pairs = rater_rows(there), comparisons(there)
    if as_json:
        print_json(
            {
                "hash": there.plan.hash,
                "version": there.version,
                "raters": [
                    {
                        "rater": row.rater.id,
                        "origin": row.rater.origin,
                        "state": row.rater.state,
                        "items": row.done,
                        "of": row.total,
                        "minutes": round(row.minutes, 1),
                    }
                    for row in raters
                ],
                "comparisons": [
                    {"unit": r.unit, "methods": r.methods, "items": r.done, "of": r.planned}
                    for r in pairs
                ],
            }
        )
        return
    table = Table(box=None)
    for name in ("rater", "origin", "state", "items", "minutes"):
        table.add_column(name)
    for row in raters:
        items = f"{row.done}/{row.total}"
        table.add_row(row.rater.id, row.rater.origin, row.rater.state, items, f"{row.minutes:.0f}")
    out().print(table)
    table = Table(box=None)
    for name in ("unit", "first", "second", "items"):
        table.add_column(name)
    for pair in pairs:
        table.add_row(pair.unit, *pair.methods, f"{pair.done}/{pair.planned}")
    out().print(table)
    note(f"plan {there.plan.hash}, version {there.version}")


def export(
    study: StudyPath,
    to: Annotated[
        str, typer.Option("--to", help="potato, label-studio, csv or parquet.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write to.  [default: STUDY/export/FORMAT]"),
    ] = None,
) -> None:
    """Write the items for another tool, or all judgments as tables with a data card.

    What Potato and Label Studio get names no method, and the items have other names.
    """
    from baco.study.export import write
    from baco.study.study import Study

    with closing(Study.open(study)) as there:
        written = write(there, to, out or study / "export" / to)
    for path in written:
        _show(str(path))


def import_(
    study: StudyPath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV, TSV, JSON or JSON lines.")],
    question: Annotated[
        str | None,
        typer.Option(
            "--question", help="Question that FastChat's battles answer.  [default: quality]"
        ),
    ] = None,
) -> None:
    """Add judgments that were collected elsewhere, all of a file or none.

    Reads tables of 'baco study export', Potato's CSV, TSV and JSON lines, Label Studio's JSON, and
    FastChat's battles (question_id, model_a, model_b, winner, judge).
    """
    from baco.study.importing import import_judgments
    from baco.study.study import Study

    with closing(Study.open(study)) as there:
        name, raters, answers = import_judgments(there, file, question)
    note(f"{answers} answers of {raters} raters from {file} ({name})")


def _show(line: str) -> None:
    out().print(line, soft_wrap=True)


_EXAMPLES: dict[Callable[..., None], str] = {
    plan: "baco study plan runs/demo --methods P-Punc:0.4 aligned base --task demo --out study",
    power: "baco study power study --effect 0.65",
    serve: "baco study serve study --port 8400",
    status: "baco study status study",
    amend: "baco study amend study --reason 'six more raters'",
    export: "baco study export study --to csv",
    import_: "baco study import study answers.csv",
    simulate: "baco study simulate study --raters 24 --effect 0.6",
    report: "baco study report study --run runs/demo",
}
for _command, _example in _EXAMPLES.items():
    name = _command.__name__.rstrip("_")  # import is a word of the language
    study.command(name=name, epilog=f"Example: {_example}")(_command)
