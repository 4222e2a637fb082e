"""``baco batch``: many prompts into a directory of shards, here or on a cluster."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baco.backends import RAY
from baco.backends import names as backends
from baco.cli import options as opt
from baco.cli.cluster import Address, named_cluster
from baco.cli.console import note, print_json
from baco.cli.progress import answering
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.batch.batch import Batch, Executor
    from baco.batch.replica import JobSpec, ShardResult


def batch(
    context: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Prompts: .jsonl, .parquet or .txt files, or folders of them. The last path is "
            "the directory of shards.",
            metavar="IN... OUT",
        ),
    ],
    n: opt.Answers = 1,
    router: opt.RouterSpelling = None,
    diversity: opt.Diversity = None,
    backend: Annotated[
        str,
        typer.Option("--backend", help="local (this process), vllm, remote, or ray (a cluster)."),
    ] = "local",
    replica: Annotated[
        str, typer.Option("--replica", help="Of --backend ray: what each replica is.")
    ] = "local",
    address: Address = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            help="Of --backend ray: replicas; by default one a GPU, or one a core where none is.",
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float, typer.Option("--gpus-per-worker", help="Of --backend ray: GPUs of one replica.")
    ] = 1,
    threads: Annotated[
        int,
        typer.Option("--threads", help="Processors of one replica; last digits hang on it."),
    ] = 1,
    form: Annotated[str, typer.Option("--format", help="Of the shards: jsonl or parquet.")] = (
        "jsonl"
    ),
    shard_rows: Annotated[
        int | None,
        typer.Option("--shard-rows", help="Prompts of a shard; by default 1,024 answers' worth."),
    ] = None,
    pair: opt.PairName = None,
    base: opt.BaseName = None,
    aligned: opt.AlignedName = None,
    system: opt.System = None,
    seed: opt.Seed = None,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    max_tokens: opt.MaxTokens = None,
    stop: opt.Stop = None,
    switch: opt.SwitchAt = "word",
    max_rows: Annotated[
        int, typer.Option("--max-rows", help="Answers that a replica decodes at once.")
    ] = 256,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    quantize: opt.Quantize = None,
    draft: opt.Draft = None,
    memory: opt.Memory = None,
    base_url: opt.BaseUrl = None,
    aligned_url: opt.AlignedUrl = None,
    base_model: opt.BaseModel = None,
    aligned_model: opt.AlignedModel = None,
    engine: opt.EngineArguments = None,
    base_template: opt.BaseTemplate = None,
    chat_template: opt.ChatTemplate = None,
    template_arg: opt.TemplateArguments = None,
    date: opt.Date = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    as_json: opt.AsJson = False,
) -> None:
    """Answer files of prompts into a directory of shards.

    Stop it at any moment, or lose machines: the same command makes what is missing, and every row
    is the same byte for byte, whoever made it.
    """
    *inputs, out = paths
    if not inputs:
        raise BacoError(
            f"missing argument OUT: give prompts and a directory, as in baco batch {out} answers/"
        )
    _check_place(backend, replica, address, workers, gpus_per_worker)
    for name, value in (("threads", threads), ("shard-rows", shard_rows), ("max-rows", max_rows)):
        if value is not None and value < 1:
            raise BacoError(f"{name} is {value}: give 1 or more")
    cluster = named_cluster(address, workers, device, threads=threads, gpus=gpus_per_worker)
    sampling = opt.given(
        {
            "n": n,
            "seed": seed,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "max_tokens": max_tokens,
            "stop": tuple(stop) if stop else None,
        }
    )
    opt.check(sampling, switch, router)
    kind = replica if backend == RAY else backend
    load = {"name": pair, "base": base, "aligned": aligned, "max_rows": max_rows} | opt.given(
        {
            "backend": None if kind == "local" else kind,
            "dtype": dtype,
            "device": device,
            "quantize": quantize,
            "draft": draft,
            "memory": memory,
            "base_url": base_url,
            "aligned_url": aligned_url,
            "base_model": base_model,
            "aligned_model": aligned_model,
            "engine": opt.engine_arguments(engine),
            "base_template": base_template,
            "chat_template": chat_template,
            "template_args": opt.template_arguments(template_arg),
            "date": opt.day(date),
            "trust_remote_code": trust_remote_code,
        }
    )
    from baco.batch.batch import Batch
    from baco.batch.formats import check_format
    from baco.batch.output import refuse_other
    from baco.batch.replica import PairOptions
    from baco.batch.rows import read_rows
    from baco.files import locked

    checked = check_format(form)
    out = out.absolute()
    refuse_other(out)
    if out.is_dir():
        with locked(out):  # another command's is refused before two models are loaded
            pass
    rows = read_rows(inputs)
    spell = partial(opt.spelled_router, router=router, diversity=diversity)
    settings = {"system": system, "switch": switch, **sampling}
    asked = Batch(rows, PairOptions(load, threads), spell, settings, checked, shard_rows)
    command = shlex.join(["baco", *context.obj])
    opt.hush()
    with _place(cluster if backend == RAY else None) as place:
        order = _begin(asked, place, out, command)
        made = _make(asked, order, place)
    _told(order, len(made), as_json)
    if broken := [one for one in made if one.broken]:
        raise BacoError(
            f"answers to {sum(one.broken for one in broken)} of {order.output.rows} prompts broke "
            f"off; they have the finish_reason 'error'. The first, {broken[0].error}"
        )


def _check_place(
    backend: str, replica: str, address: str | None, workers: int | None, gpus: float
) -> None:
    if backend not in (*backends(), RAY):
        raise BacoError(f"unknown backend {backend!r}: use one of {', '.join((*backends(), RAY))}")
    if replica not in backends():
        raise BacoError(f"unknown replica {replica!r}: use one of {', '.join(backends())}")
    if backend != RAY and (address, workers, replica, gpus) != (None, None, "local", 1):
        raise BacoError(
            "--address, --workers, --replica and --gpus-per-worker are of a cluster: "
            "give --backend ray with them"
        )


@contextmanager
def _place(cluster: Any) -> "Iterator[Executor]":
    """Where shards are made: this process, or a cluster that is reached for as long as it takes."""
    if cluster is None:
        from baco.batch.batch import LocalExecutor

        yield LocalExecutor()
        return
    with cluster.reached() as share:
        from baco.batch.replicas import Replicas

        cards = f", {share.gpus:g} GPUs each" if share.gpus else ""
        note(f"{share.workers} replica{'s' if share.workers > 1 else ''}{cards}")
        yield Replicas(share)


def _begin(batch: "Batch", place: "Executor", out: Path, command: str) -> "JobSpec":
    from baco.evaluation.plan import made

    return batch.order(out, place.look(batch), {"command": command, **made()})


def _make(batch: "Batch", order: "JobSpec", place: "Executor") -> "list[ShardResult]":
    """Make what is missing, with a bar; the shards made, in order."""
    from baco.batch.batch import carry_out

    total = len(batch.rows)
    made: list[ShardResult] = []
    with answering("prompts", total) as bar:
        bar.skip(total - sum(len(shard) for shard in order.output.missing()))

        def advance(answers: int, tokens: int) -> None:
            bar.advance(answers / batch.settings["n"], tokens)

        made += carry_out(batch, order, place, advance)
    return sorted(made, key=lambda one: one.shard.start)


def _told(order: "JobSpec", made: int, as_json: bool) -> None:
    output = order.output
    if (date := order.manifest.get("date")) is not None:
        note(f"the prompts hold the date {date}")
    if as_json:
        shards = len(output.shards())
        told = {"out": str(output.path), "rows": output.rows, "shards": shards, "made": made}
        print_json(told | {"seed": order.settings["seed"]})
        return
    note(f"{output.rows} prompts answered in {output.path}")
