"""``baco batch``: many prompts into a directory of shards, here or on a cluster."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baco.backends import RAY
from baco.backends import names as backends
from baco.cli import options as opt
from baco.cli.console import note, print_json
from baco.cli.progress import answering
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.batch.job import LocalExecutor
    from baco.batch.ray_cluster import Cluster
    from baco.batch.ray_executor import RayExecutor


@dataclass(frozen=True, slots=True)
class ExecutorOptions:
    """Where shards are made."""

    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            help="local or llamacpp (this process), vllm, remote, or ray (a cluster). Default: "
            "llamacpp for GGUF files where it is installed, else local.",
        ),
    ] = None
    replica: Annotated[
        str | None, typer.Option("--replica", help="With --backend ray: backend of each replica.")
    ] = None
    address: opt.Address = None
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            help="With --backend ray: number of replicas. Default: one per GPU, or one per core.",
        ),
    ] = None
    gpus_per_worker: Annotated[
        float, typer.Option("--gpus-per-worker", help="With --backend ray: GPUs of one replica.")
    ] = 1
    threads: Annotated[
        int,
        typer.Option(
            "--threads",
            help="CPU threads of one replica; the last digits of results depend on the number.",
        ),
    ] = 1

    @property
    def decodes(self) -> str | None:
        """The backend of every copy of the pair; None where none was given."""
        return self.replica if self.backend == RAY else self.backend

    def check(self) -> None:
        """BacoError for an unknown backend, no thread, or options of a cluster without one."""
        known = backends()
        if self.backend not in (None, *known, RAY):
            raise BacoError(
                f"unknown backend {self.backend!r}: use one of {', '.join((*known, RAY))}"
            )
        if self.replica not in (None, *known):
            raise BacoError(f"unknown replica {self.replica!r}: use one of {', '.join(known)}")
        of_cluster = (self.address, self.workers, self.replica, self.gpus_per_worker)
        if self.backend != RAY and of_cluster != (None, None, None, 1):
            raise BacoError(
                "--address, --workers, --replica and --gpus-per-worker need a cluster: "
                "give --backend ray with them"
            )
        if self.threads < 1:
            raise BacoError(f"threads is {self.threads}: give 1 or more")

    def cluster(self, device: str | None) -> "Cluster | None":
        """The cluster; None where this process makes the shards.

        Raises:
            BacoError: too few workers or GPUs.
        """
        if self.backend != RAY:
            return None
        return opt.cluster(
            self.address, self.workers, device, threads=self.threads, gpus=self.gpus_per_worker
        )


@opt.grouped(without=["compile"])
def batch(
    *,
    context: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Prompts: .jsonl, .csv, .parquet or .txt files, or folders of them. The last path "
            "is the directory of shards.",
            metavar="IN... OUT",
        ),
    ],
    n: opt.Answers = 1,
    routing: opt.RouterOptions,
    where: ExecutorOptions,
    prompt_template: Annotated[
        str | None,
        typer.Option(
            "--prompt-template",
            help="Template of every prompt: Jinja text or a file. The columns of the input row "
            "fill it, as in 'A {{ genre }} story about {{ topic }}'.",
        ),
    ] = None,
    dataset: Annotated[
        bool,
        typer.Option(
            "--dataset",
            help="Write a dataset: one row per answer with its provenance, the input's columns, "
            "and a card (README.md). Default: one row per prompt.",
        ),
    ] = False,
    form: Annotated[
        str, typer.Option("--format", help="Format of the shards: jsonl or parquet.")
    ] = "jsonl",
    shard_rows: Annotated[
        int | None,
        typer.Option(
            "--shard-rows", help="Prompts per shard. Default: as many as have 1,024 answers."
        ),
    ] = None,
    models: opt.PairOptions,
    tokenizers: opt.TokenizerOptions,
    sampling: opt.SamplingOptions,
    structure: opt.StructureOptions,
    max_rows: Annotated[
        int, typer.Option("--max-rows", help="Answers that a replica decodes at the same time.")
    ] = 256,
    weights: opt.WeightOptions,
    servers: opt.BackendOptions,
    templates: opt.TemplateOptions,
    as_json: opt.AsJson = False,
) -> None:
    """Answer files of prompts into a directory of shards.

    It can be stopped at any moment, and machines can be lost: the same command makes the missing
    shards. Every row is the same byte for byte, whichever process makes it.
    """
    *inputs, out = paths
    if not inputs:
        raise BacoError(
            f"missing argument OUT: give prompts and a directory, as in baco batch {out} answers/"
        )
    where.check()
    for name, value in (("shard-rows", shard_rows), ("max-rows", max_rows)):
        if value is not None and value < 1:
            raise BacoError(f"{name} is {value}: give 1 or more")
    cluster = where.cluster(weights.device)
    settings = sampling.settings(n) | structure.settings()
    routing.check()
    load = opt.load_arguments(models, tokenizers, weights, servers, templates)
    load |= {"max_rows": max_rows}
    from baco.batch.answering import LoadSpec, broke_off
    from baco.batch.formats import check_format
    from baco.batch.job import carry_out
    from baco.batch.rows import prompt_template as read_template
    from baco.batch.rows import read_rows
    from baco.batch.shards import Batch, begun_backend, check_directory
    from baco.evaluation.plan import provenance

    checked = check_format(form)
    out = out.absolute()
    check_directory(out)
    load |= opt.given({"backend": where.decodes or begun_backend(out)})
    template = None if prompt_template is None else read_template(prompt_template)
    rows = read_rows(inputs, template, keep_columns=dataset)
    asked = Batch(
        rows,
        LoadSpec(load, where.threads),
        routing.choose,
        settings,
        checked,
        shard_rows,
        dataset=dataset,
        template=None if template is None else template.source,
    )
    command = shlex.join(["baco", *context.obj])
    opt.quiet_libraries()
    with _started(cluster) as executor:
        job = asked.begin(out, executor, {"command": command, **provenance()})
        with job.held(), answering("prompts", len(rows)) as bar:
            results = sorted(
                carry_out(job, job.worker, executor, bar), key=lambda result: result.shard.start
            )
    if (date := job.spec.manifest.get("date")) is not None:
        note(f"the prompts hold the date {date}")
    if as_json:
        summary = {"out": str(out), "rows": len(rows), "shards": len(job.spec.output.shards())}
        print_json(summary | {"made": len(results), "seed": job.spec.settings["seed"]})
    else:
        note(f"{len(rows)} prompts answered in {out}")
    if broken := [result for result in results if result.broken]:
        count = sum(result.broken for result in broken)
        raise broke_off(count, len(rows), out, broken[0].error)


@contextmanager
def _started(cluster: "Cluster | None") -> "Iterator[LocalExecutor | RayExecutor]":
    """The executor: this process, or a cluster that is connected during the block."""
    if cluster is None:
        from baco.batch.job import LocalExecutor

        yield LocalExecutor()
        return
    with cluster.reached() as share:
        from baco.batch.ray_executor import RayExecutor

        cards = f", {share.gpus:g} GPUs each" if share.gpus else ""
        note(f"{share.workers} replica{'s' if share.workers > 1 else ''}{cards}")
        yield RayExecutor(share)
