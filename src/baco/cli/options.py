"""Options that several commands share: dataclasses whose fields are the options.

`grouped` turns the groups in a command's signature into options, in their order. `load` makes the
pair of them, `SamplingOptions.settings` the keywords of a draw, `RouterOptions.router` the router.
"""

import atexit
import inspect
import json
import logging
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from baco.cli.console import Debug, note
from baco.errors import BacoError
from baco.text.invalid_characters import fault_of

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.batch.ray_cluster import Cluster
    from baco.routing.router import Router
    from baco.text.prompts import Conversation

Answers = Annotated[int, typer.Option("--n", "-n", help="Answers to draw.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
BaseName = Annotated[
    str | None, typer.Option("--base", help="Base model: hub id, folder or GGUF file.")
]
AlignedName = Annotated[
    str | None,
    typer.Option("--aligned", help="Aligned model, GGUF file, or a PEFT adapter over the base."),
]
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="Where the pair decodes: local (PyTorch in this process), llamacpp (llama.cpp in "
        "this process), vllm (one vLLM engine) or remote (two servers, see --base-url). batch and "
        "sweep can use a cluster too (ray). Default: llamacpp for GGUF files where it is "
        "installed, else local.",
    ),
]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that a model comes with. Only for models that you trust.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="With --backend ray: auto, host:port or ray://host:port. Default: this machine.",
    ),
]

Samplers = Annotated[
    list[str] | None,
    typer.Option(
        "--sampler",
        help="A further sampler, such as top_n_sigma:1 (see 'baco samplers'). Repeatable.",
    ),
]

TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Keep the most likely tokens up to this total probability."),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        help="Keep tokens with this fraction of the most likely token's probability, or more.",
    ),
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Longest answer, in tokens.")]


def grouped(
    *, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace each dataclass in a command's signature by its fields, in place, for typer.

    Args:
        without: fields that are not options of this command; they keep their defaults.

    Returns:
        A decorator. The command is then called with options by keyword, those left out by default.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        groups: dict[str, tuple[type[Any], list[str]]] = {}
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            group = parameter.annotation
            if not (isinstance(group, type) and is_dataclass(group)):
                parameters.append(parameter)
                continue
            options = [field for field in fields(group) if field.name not in without]
            groups[parameter.name] = group, [field.name for field in options]
            parameters += [
                parameter.replace(name=field.name, default=field.default, annotation=field.type)
                for field in options
            ]

        @wraps(command)
        def run(**values: Any) -> None:
            built = {
                name: group(
                    **{option: values.pop(option) for option in options if option in values}
                )
                for name, (group, options) in groups.items()
            }
            command(**values, **built)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


class LoadGroup(Protocol):
    """A group of options for loading a pair."""

    def arguments(self) -> dict[str, Any]:
        """Keywords of :meth:`baco.Baco.load`; None stands for an option that was not given."""


@dataclass(frozen=True, slots=True)
class PairOptions:
    """Which two models."""

    pair: Annotated[
        str | None,
        typer.Option("--pair", "-p", help="Short name (see 'baco pairs') or folder of a pair."),
    ] = None
    base: BaseName = None
    aligned: AlignedName = None
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="One model under two prompts: plain text as base, its chat template as aligned.",
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """See `LoadGroup`."""
        base, aligned = self.base, self.aligned
        if self.model is not None:
            if self.pair or base or aligned:
                raise BacoError("give --model alone, without --pair, --base and --aligned")
            base = aligned = self.model
        return {"name": self.pair, "base": base, "aligned": aligned}


@dataclass(frozen=True, slots=True)
class WeightOptions:
    """The number format and device of the weights, and how this process runs them."""

    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Weights as float32, bfloat16 or float16; by default bfloat16 where it is native. "
            "One for both models, or base=…,aligned=….",
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option("--device", help="Such as cpu, cuda, or base=cuda:0,aligned=cuda:1."),
    ] = None
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", help="Weights in int8 or int4, or base=…,aligned=…."),
    ] = None
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            help="A small model of the same vocabulary that drafts tokens: hub id or folder.",
        ),
    ] = None
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile",
            help="Compile the forwards (CPU) or record CUDA graphs: faster for small models.",
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            help="Limit for KV caches and the tensors of a step: 2GiB, or 40% of the free memory.",
        ),
    ] = None
    enable_prefix_caching: Annotated[
        bool | None,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Keep what was read of prompts and answers for later prompts that begin alike.",
            show_default="on",
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """See `LoadGroup`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """Servers and engines where a pair decodes outside this process."""

    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url", help="With --backend remote: URL of the base model's server, with /v1."
        ),
    ] = None
    aligned_url: Annotated[
        str | None,
        typer.Option(
            "--aligned-url", help="With --backend remote: URL of the aligned model's server."
        ),
    ] = None
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model", help="Name of the base model on its server, if it serves several."
        ),
    ] = None
    aligned_model: Annotated[
        str | None,
        typer.Option(
            "--aligned-model", help="Name of the aligned model on its server, if it serves several."
        ),
    ] = None
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="NAME=VALUE",
            help="With --backend vllm: an engine argument of vLLM, such as tensor_parallel_size=2. "
            "Repeatable.",
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """See `LoadGroup`; errors as for `named_values`."""
        engine = named_values("--engine", self.engine, "tensor_parallel_size=2")
        return asdict(self) | {"engine": engine}


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """How prompts are rendered, and whether a model may run code of its own."""

    base_template: Annotated[
        str | None,
        typer.Option(
            "--base-template",
            help="Template of the base model's prompt: Jinja text or a file; 'aligned' takes the "
            "text of the aligned model's chat template.",
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template", help="Template of the aligned model's prompt: Jinja text or a file."
        ),
    ] = None
    template_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--template-arg",
            metavar="NAME=VALUE",
            help="A variable for the templates, such as enable_thinking=false. Repeatable.",
        ),
    ] = None
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Let an aligned model that can think do so before it answers, or not. Default: as "
            "its chat template has it.",
        ),
    ] = None
    date: Annotated[
        str | None,
        typer.Option(
            "--date",
            metavar="YYYY-MM-DD",
            help="The date in prompts whose template reads the clock. Default: today.",
        ),
    ] = None
    trust_remote_code: TrustRemoteCode = None

    def arguments(self) -> dict[str, Any]:
        """See `LoadGroup`.

        Raises:
            BacoError: a value without a name, a reserved name, or an invalid date.
        """
        from baco.text.prompts import check_template_args
        from baco.text.templates import check_date
        from baco.text.thinking import switch_variables

        variables = named_values("--template-arg", self.template_arg, "enable_thinking=false")
        check_template_args(variables or {})
        if self.thinking is not None:
            variables = switch_variables(self.thinking) | (variables or {})
        return {
            "base_template": self.base_template,
            "chat_template": self.chat_template,
            "template_args": variables,
            "date": None if self.date is None else check_date(self.date),
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass(frozen=True, slots=True)
class TokenizerOptions:
    """Whether the models share token ids or text."""

    separate_tokenizers: Annotated[
        bool | None,
        typer.Option(
            "--separate-tokenizers",
            help="Experimental: give each model token ids of its own, so that the models share the "
            "text of answers. Default: where their tokenizers differ.",
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """See `LoadGroup`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """Which router, and how far towards the base model."""

    router: Annotated[
        str | None,
        typer.Option(
            "--router",
            "-r",
            help="Rule that picks the model of each word, such as P-Punc:0.4 (see 'baco routers'). "
            "Default: P-Punc, with the threshold at diversity 0.5 for a calibrated pair.",
        ),
    ] = None
    diversity: Annotated[
        float | None,
        typer.Option(
            "--diversity",
            "-d",
            help="Instead of a threshold, after 'baco calibrate': 0 is the aligned model's own "
            "diversity, 1 the most that this router reaches.",
        ),
    ] = None

    def check(self) -> None:
        """Check the spelling of the router, which needs no pair.

        Raises:
            BacoError: no such router, or a threshold out of its range.
        """
        if self.router is not None:
            from baco.routing.parser import needs_threshold, router

            # 0.5 is in every rule's range; the pair supplies the threshold later.
            router(self.router, 0.5 if needs_threshold(self.router) else None)

    def choose(self, baco: "Baco") -> "Router":
        """The router, with the threshold of this pair where none was given.

        Raises:
            BacoError: a diversity beside a threshold, or on a pair that is not calibrated.
        """
        if self.diversity is None:
            return baco.router(self.router)
        from baco.api import DEFAULT_ROUTER
        from baco.calibration.store import Calibration
        from baco.routing.combiners import combiners
        from baco.routing.parser import canonical_name, router, router_name

        if not 0 <= self.diversity <= 1:
            raise BacoError(f"diversity is {self.diversity:g}: give a number from 0 to 1")
        spelling = self.router or DEFAULT_ROUTER
        if ":" in spelling:
            raise BacoError(
                f"--diversity and --router {spelling} both set the base share: "
                f"give --router {router_name(spelling)}, or leave out --diversity"
            )
        spelling = canonical_name(spelling)
        if spelling in combiners():
            raise BacoError(
                f"--diversity turns the threshold of a router, and {spelling} is a combiner: give "
                f"its number, as in {combiners()[spelling].example}, or leave out --diversity"
            )
        calibration = Calibration.load(baco.pair)
        if calibration is None or spelling not in calibration.curves:
            raise BacoError(
                f"{baco.pair.name} is not calibrated for {spelling}: run 'baco calibrate "
                f"--router {spelling}' for it first, or give a threshold as in {spelling}:0.4"
            )
        return router(spelling, calibration.threshold(spelling, self.diversity))


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """What is drawn from the model that the router picks."""

    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None
    seed: Annotated[
        int | None,
        typer.Option("--seed", "-s", help="Same seed, same answers. Default: a random one."),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", "-t", help="0 takes the most likely token."),
    ] = None
    top_k: Annotated[int | None, typer.Option("--top-k", help="Keep the k most likely tokens.")] = (
        None
    )
    top_p: TopP = None
    min_p: MinP = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty", help="Above 1: tokens that already occurred become less likely."
        ),
    ] = None
    repetition_window: Annotated[
        int | None,
        typer.Option(
            "--repetition-window", help="Penalties count only the last this many tokens; 0: all."
        ),
    ] = None
    dry_multiplier: Annotated[
        float | None,
        typer.Option(
            "--dry-multiplier",
            help="Strength of DRY: tokens that would repeat an earlier sequence become less "
            "likely, such as 0.8. 0: off.",
        ),
    ] = None
    dry_base: Annotated[
        float | None,
        typer.Option("--dry-base", help="DRY grows by this factor with each repeated token."),
    ] = None
    dry_allowed_length: Annotated[
        int | None,
        typer.Option("--dry-allowed-length", help="DRY leaves shorter sequences alone."),
    ] = None
    dry_window: Annotated[
        int | None,
        typer.Option("--dry-window", help="DRY reads only the last this many tokens; 0: all."),
    ] = None
    dry_breaker: Annotated[
        list[str] | None,
        typer.Option("--dry-breaker", help="A text that no repeated sequence spans. Repeatable."),
    ] = None
    sampler: Samplers = None
    max_tokens: MaxTokens = None
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End answers before this text. Repeatable.")
    ] = None
    switch: Annotated[
        str,
        typer.Option(
            "--switch",
            help="Where the source may change: between words (word), or at any token (token).",
        ),
    ] = "word"

    def settings(self, n: int) -> dict[str, Any]:
        """Keywords of :meth:`baco.Baco.stream`: system, switch, n, and what was given.

        Raises:
            BacoError: a value out of its range.
        """
        from baco.sampling.params import SamplingParams

        values = asdict(self) | {"stop": tuple(self.stop) if self.stop else None}
        values["dry_breakers"] = tuple(values.pop("dry_breaker") or ()) or None
        values["samplers"] = tuple(values.pop("sampler") or ()) or None
        beside = {name: values.pop(name) for name in ("system", "switch")}
        sampling = {"n": n, **given(values)}
        SamplingParams().updated(sampling)
        if self.switch not in ("word", "token"):
            raise BacoError(f"switch is {self.switch!r}: use word or token")
        return beside | sampling


@dataclass(frozen=True, slots=True)
class StructureOptions:
    """What an answer has to be."""

    schema: Annotated[
        Path | None,
        typer.Option("--schema", help="Answers are JSON of the JSON schema in this file."),
    ] = None
    regex: Annotated[
        str | None,
        typer.Option(
            "--regex", help=r"Answers match this regular expression, such as '\w+, \d+ days'."
        ),
    ] = None
    choice: Annotated[
        list[str] | None,
        typer.Option("--choice", help="Answers are one of these texts. Repeatable."),
    ] = None
    grammar: Annotated[
        Path | None,
        typer.Option(
            "--grammar", help="Answers follow the grammar in this file (Lark, or llama.cpp's EBNF)."
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Keywords of :meth:`baco.Baco.stream` for what was given.

        Raises:
            BacoError: a file cannot be read, or what was given cannot be used.
        """
        from baco.sampling.params import SamplingParams

        values = {
            "schema": None if self.schema is None else _text_of("--schema", self.schema),
            "regex": self.regex,
            "choice": list(self.choice) if self.choice else None,
            "grammar": None if self.grammar is None else _text_of("--grammar", self.grammar),
        }
        settings = given(values)
        SamplingParams().updated(settings)
        if self.schema is not None:
            settings["schema"] = json.loads(settings["schema"])
        return settings


def _text_of(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise BacoError(f"{option} {path} cannot be read: {reason}") from error


def load_arguments(*groups: LoadGroup) -> dict[str, Any]:
    """Keywords of :meth:`baco.Baco.load`: the options that were given."""
    return given({name: value for group in groups for name, value in group.arguments().items()})


def load(*groups: LoadGroup, **more: Any) -> "Baco":
    """Load the pair that a command's options name; the demo pair where they name none.

    Args:
        groups: of options.
        more: further keywords of :meth:`baco.Baco.load`.
    """
    arguments = load_arguments(*groups)
    quiet_libraries()

    from baco.api import Baco

    baco = Baco.load(**arguments, **more)
    _note_engine(baco)
    atexit.register(baco.close)
    return baco


def _note_engine(baco: "Baco") -> None:
    """Say what runs a GGUF file, since it depends on what is installed."""
    from baco.models.gguf import is_gguf
    from baco.source import MODELS

    pair = baco.pair
    forms = [
        pair.model(source).weights_format
        if pair.shares_weights
        else f"{source}: {pair.model(source).weights_format}"
        for source in MODELS
        if is_gguf(pair.model(source).name)
    ]
    if forms:
        note("; ".join(dict.fromkeys(forms)))


def cluster(
    address: str | None,
    workers: int | None,
    device: str | None,
    *,
    threads: int = 1,
    gpus: float = 1,
) -> "Cluster":
    """The cluster of a command's options.

    Raises:
        BacoError: a number of workers or GPUs that is too small.
    """
    from baco.batch.ray_cluster import Cluster

    if workers is not None and workers < 1:
        raise BacoError(f"workers is {workers}: give 1 or more")
    if gpus <= 0:
        raise BacoError(f"gpus-per-worker is {gpus:g}: give a number above 0")
    on_cpu = device is not None and "cuda" not in device
    return Cluster(address, workers, threads, gpus, on_cpu)


def named_values(
    option: str, assignments: Collection[str] | None, example: str
) -> dict[str, Any] | None:
    """The values of an option that takes NAME=VALUE: JSON where they are JSON, else text.

    Raises:
        BacoError: a name or its value is missing.
    """
    values: dict[str, Any] = {}
    for assignment in assignments or ():
        name, equals, value = assignment.partition("=")
        if not name or not equals:
            raise BacoError(f"{option} {assignment}: give NAME=VALUE, as in {example}")
        try:
            values[name.replace("-", "_")] = json.loads(value)
        except (ValueError, RecursionError):
            values[name.replace("-", "_")] = value
    return values or None


def check_text(text: str) -> None:
    """BacoError for a text with lone surrogates, which stand for bytes that are not UTF-8."""
    if fault_of(text) is not None:
        raise BacoError("the prompt is not valid UTF-8: convert it first, for example with iconv")


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the user gave."""
    return {name: value for name, value in options.items() if value is not None}


class _Notes(logging.Handler):
    """Shows warnings of the library as one dim line each."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def quiet_libraries() -> None:
    """Show the warnings of this library as notes, and of others only what a user can act on.

    Downloads keep their bars on a terminal, since they take long. ``--debug`` shows everything.
    """
    log = logging.getLogger("baco")
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes())
        log.propagate = False
    log.setLevel(logging.DEBUG if Debug.on else logging.NOTSET)
    if Debug.on:
        return
    logging.getLogger("baco.compiling").setLevel(logging.INFO)
    # torchao's warnings at import are about other accelerators.
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


def take_today(baco: "Baco", prompt: "Conversation" = "Hello", system: str | None = None) -> None:
    """Make today the date of all prompts, and say so where a template reads the clock.

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
        return None  # answering the prompt reports the error
