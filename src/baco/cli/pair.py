"""``baco pair``: a pair as files."""

from pathlib import Path
from typing import Annotated

import typer

from baco.cli import options as opt
from baco.cli.console import note

pair = typer.Typer(help="A pair as files.", no_args_is_help=True)


@pair.callback()
def _group() -> None:
    pass


@pair.command(epilog="Example: baco pair export my-pair --pair demo")
@opt.grouped()
def export(
    *,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="New folder to write.")],
    models: opt.PairOptions,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the models' files instead of linking to them.")
    ] = False,
    trust_remote_code: opt.TrustRemoteCode = None,
) -> None:
    """Write a pair as one folder that vLLM serves like a model: vllm serve DIR."""
    from baco.backends.vllm.folder import export_pair
    from baco.models.known_pairs import choose_pair

    opt.quiet_libraries()
    known = choose_pair(**models.arguments())
    pair = export_pair(known, directory, copy=copy, trust_remote_code=bool(trust_remote_code))
    held = f" --dtype {known.dtype}" if known.dtype else ""
    note(f"{pair.name}, {pair.vocabulary.size} tokens; serve it: vllm serve {directory}{held}")
