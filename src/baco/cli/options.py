"""Options that several commands share, and the pair they name."""

import atexit
import json
import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baco.cli.console import Debug, note
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.text.prompts import Conversation

PairName = Annotated[
    str | None,
    typer.Option("--pair", "-p", help="Short name (see 'baco pairs') or folder of a pair."),
]
BaseName = Annotated[str | None, typer.Option("--base", help="Base model: hub id or folder.")]
AlignedName = Annotated[
    str | None,
    typer.Option("--aligned", help="Aligned model, or a PEFT adapter over the base."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Weights as float32, bfloat16 or float16; by default bfloat16 where it is native. "
        "One for both halves, or base=…,aligned=….",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Such as cpu, cuda, or base=cuda:0,aligned=cuda:1."),
]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", help="Weights in int8 or int4, or base=…,aligned=…."),
]
Draft = Annotated[
    str | None,
    typer.Option("--draft", help="A small model of the same vocabulary that drafts: id or folder."),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile",
        help="Compile forwards (CPU) or record them (CUDA): small models answer sooner.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory", help="For caches and a step's tensors, as 2GiB or 40% of what is free."
    ),
]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that a model comes with. Only for models that you trust.",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        help="Where the pair decodes: local (this process), vllm (one vLLM engine), or remote "
        "(two servers, see --base-url). A cluster (ray) is for batch and sweep.",
    ),
]
BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", help="Of --backend remote: the base model's server, with /v1."),
]
AlignedUrl = Annotated[
    str | None,
    typer.Option("--aligned-url", help="Of --backend remote: the aligned model's server."),
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", help="Its name there, where that server has several models."),
]
AlignedModel = Annotated[
    str | None,
    typer.Option("--aligned-model", help="The same of the aligned model's server."),
]
EngineArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="NAME=VALUE",
        help="Of --backend vllm: an engine argument of vLLM's, as tensor_parallel_size=2; may be "
        "given again.",
    ),
]
BaseTemplate = Annotated[
    str | None,
    typer.Option(
        "--base-template",
        help="Jinja text or file of the base model's prompt; 'aligned': the chat template's text.",
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option("--chat-template", help="Jinja text or file of the aligned model's prompt."),
]
TemplateArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        metavar="NAME=VALUE",
        help="A variable of the templates, as enable_thinking=false; may be given again.",
    ),
]
Date = Annotated[
    str | None,
    typer.Option(
        "--date",
        metavar="YYYY-MM-DD",
        help="The date in prompts whose template reads the clock; by default today.",
    ),
]
RouterSpelling = Annotated[
    str | None,
    typer.Option(
        "--router",
        "-r",
        help="Such as P-Punc:0.4 (see 'baco routers'); by default P-Punc at its calibrated middle.",
    ),
]
Diversity = Annotated[
    float | None,
    typer.Option(
        "--diversity",
        "-d",
        help="In place of a threshold: from 0, the aligned model's own diversity, to 1, "
        "the most this router gives.",
    ),
]
Answers = Annotated[int, typer.Option("--n", "-n", help="Answers to draw.")]
System = Annotated[str | None, typer.Option("--system", help="System message.")]
Seed = Annotated[
    int | None, typer.Option("--seed", "-s", help="Same seed, same answers; fresh if left out.")
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", "-t", help="0 takes the most likely token."),
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Draw from the k most likely tokens.")]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Draw from the likeliest tokens up to this probability."),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", help="Least probability, as a part of the likeliest token's."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Above 1: say less often what was said."),
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Longest answer, in tokens.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="End answers here; may be given again.")
]
SwitchAt = Annotated[
    str, typer.Option("--switch", help="Change the model between 'word's, or at any 'token'.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


class _Notes(logging.Handler):
    """Warnings of the library as one dim line each."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def hush() -> None:
    """Let libraries say only what a user can act on, and this one in notes.

    Downloads keep their bars on a terminal, since they take long. ``--debug`` lets all be said.
    """
    log = logging.getLogger("baco")
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes())
        log.propagate = False
    if Debug.on:
        log.setLevel(logging.DEBUG)
        return
    logging.getLogger("baco.compiling").setLevel(logging.INFO)
    # What torchao has to say at its import is about other accelerators and of no use to a user.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)

    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    shows_downloads = sys.stderr.isatty() and not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # the hub's bars too
    if shows_downloads:
        enable_progress_bars()


def load(pair: str | None, base: str | None, aligned: str | None, **options: Any) -> "Baco":
    """The pair that a command's options name; the demo pair where they name none."""
    hush()

    from baco.api import Baco

    loaded = Baco.load(pair, base=base, aligned=aligned, **given(options))
    atexit.register(loaded.close)
    return loaded


def engine_arguments(given: list[str] | None) -> dict[str, Any] | None:
    """The values of ``--engine``; errors as for `named_values`."""
    return named_values("--engine", given, "tensor_parallel_size=2")


def template_arguments(given: list[str] | None) -> dict[str, Any] | None:
    """The values of ``--template-arg``.

    Raises:
        BacoError: as for `named_values`, or a name that is no variable of a template.
    """
    from baco.text.prompts import check_template_args

    named = named_values("--template-arg", given, "enable_thinking=false")
    check_template_args(named or {})
    return named


def day(given: str | None) -> str | None:
    """The day of ``--date``.

    Raises:
        BacoError: it is none.
    """
    from baco.text.templates import check_date

    return None if given is None else check_date(given)


def named_values(option: str, given: list[str] | None, example: str) -> dict[str, Any] | None:
    """Values by name: as JSON where they are that, else as text; None where none is given.

    Raises:
        BacoError: one without a name or a value.
    """
    if not given:
        return None
    named: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not name or not equals:
            raise BacoError(f"{option} {each}: give NAME=VALUE, as in {example}")
        try:
            named[name.replace("-", "_")] = json.loads(value)
        except (ValueError, RecursionError):
            named[name.replace("-", "_")] = value
    return named


def take_today(baco: "Baco", prompt: "Conversation" = "Hello", system: str | None = None) -> None:
    """Take today for the date of all prompts, and say so where a template reads the clock.

    Nothing changes where ``--date`` gave one.
    """
    from baco.text.templates import today

    if baco.pair.renderer.date is not None:
        return
    baco.pair.renderer.date = today()
    if date := date_in_prompts(baco, prompt, system):
        note(f"the prompt holds today's date: --date {date} repeats the answer")


def date_in_prompts(
    baco: "Baco", prompt: "Conversation" = "Hello", system: str | None = None
) -> str | None:
    """The date that a template writes into a prompt; None where none reads the clock."""
    try:
        return baco.pair.renderer.render(prompt, system).date
    except BacoError:
        return None  # whoever answers the prompt reports it


def check(sampling: Mapping[str, Any], switch: str, router: str | None) -> None:
    """Fail before two models are loaded.

    Raises:
        BacoError: a sampling parameter, switch or router that is none.
    """
    from baco.sampling.params import SamplingParams

    SamplingParams().updated(sampling)
    if switch not in ("word", "token"):
        raise BacoError(f"switch is {switch!r}: use word or token")
    if router is not None:
        from baco.routing.parser import needs_threshold
        from baco.routing.parser import router as parse

        # 0.5 is in every rule's range: it stands in for the threshold that the pair may supply.
        parse(router, 0.5 if needs_threshold(router) else None)


def check_text(text: str) -> None:
    """BacoError where bytes that are no UTF-8 stand in a text."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BacoError("the prompt is no UTF-8 text: convert it first, as with iconv")


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the user gave."""
    return {name: value for name, value in options.items() if value is not None}


def spelled_router(baco: "Baco", router: str | None, diversity: float | None) -> Any:
    """The router of ``--router`` and ``--diversity``.

    Raises:
        BacoError: a dial beside a threshold, or on a pair that is not calibrated.
    """
    if diversity is None:
        return baco.router(router)
    from baco.api import DEFAULT_ROUTER
    from baco.calibration.store import Calibration
    from baco.routing.parser import canonical_name, router_name
    from baco.routing.parser import router as parse

    if not 0 <= diversity <= 1:
        raise BacoError(f"diversity is {diversity:g}: give a number from 0 to 1")
    spelling = router or DEFAULT_ROUTER
    if ":" in spelling:
        raise BacoError(
            f"--diversity and --router {spelling} both say how often the base speaks: "
            f"give --router {router_name(spelling)}, or leave out --diversity"
        )
    spelling = canonical_name(spelling)
    calibration = Calibration.load(baco.pair)
    if calibration is None or spelling not in calibration.curves:
        raise BacoError(
            f"{baco.pair.name} is not calibrated for {spelling}: run 'baco calibrate "
            f"--router {spelling}' for it first, or give a threshold as in {spelling}:0.4"
        )
    return parse(spelling, calibration.threshold(spelling, diversity))
