"""``baco pair``: a pair as files."""

from pathlib import Path
from typing import Annotated

import typer

from baco.cli import options as opt
from baco.cli.console import note
from baco.errors import BacoError

pair = typer.Typer(help="A pair as files.", no_args_is_help=True)


@pair.callback()
def _group() -> None:
    pass


@pair.command(epilog="Example: baco pair export my-pair --pair demo")
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="New folder to write.")],
    name: opt.PairName = None,
    base: opt.BaseName = None,
    aligned: opt.AlignedName = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the halves' files; they are linked to otherwise.")
    ] = False,
    trust_remote_code: opt.TrustRemoteCode = None,
) -> None:
    """Write a pair as one folder that vLLM serves like a model: vllm serve DIR."""
    from baco.backends.vllm.folder import export_pair
    from baco.models.known_pairs import DEMO, KnownPair, find_pair

    if (base is None) != (aligned is None):
        raise BacoError("give both --base and --aligned, or neither and --pair")
    if base is not None and aligned is not None:
        if name is not None:
            raise BacoError(f"give --pair {name}, or --base and --aligned, not both")
        known = KnownPair(f"{base} + {aligned}", base, aligned)
    else:
        known = find_pair(name if name is not None else DEMO)
    made = export_pair(known, directory, copy=copy, trust_remote_code=bool(trust_remote_code))
    held = f" --dtype {known.dtype}" if known.dtype else ""
    note(f"{made.name}, {made.vocabulary.size} tokens; serve it: vllm serve {directory}{held}")
