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
@opt.grouped()
def export(
    *,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="New folder to write.")],
    models: opt.PairOptions,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the models' files instead of linking to them.")
    ] = False,
    gguf: Annotated[
        str | None,
        typer.Option(
            "--gguf",
            metavar="FORMAT",
            help="Write GGUF files for llama.cpp: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.",
        ),
    ] = None,
    converter: Annotated[
        str | None,
        typer.Option(
            "--converter",
            metavar="PATH",
            envvar="BACO_GGUF_CONVERTER",
            help="convert_hf_to_gguf.py of llama.cpp, for architectures that BACo does not write.",
        ),
    ] = None,
    trust_remote_code: opt.TrustRemoteCode = None,
) -> None:
    """Write a pair as one folder: that vLLM serves like a model, or of two GGUF files."""
    from baco.models.known_pairs import choose_pair

    opt.quiet_libraries()
    known = choose_pair(**models.arguments())
    trusted = bool(trust_remote_code)
    if gguf is not None:
        from baco.models.gguf_export import export_gguf

        if copy:
            raise BacoError("--copy is for folders of vLLM: GGUF files are always written anew")
        pair = export_gguf(
            known, directory, format=gguf, converter=converter, trust_remote_code=trusted
        )
        note(
            f"{pair.name}, {pair.vocabulary.size} tokens; try it: baco generate --pair {directory}"
        )
        return
    from baco.backends.vllm.folder import export_pair

    pair = export_pair(known, directory, copy=copy, trust_remote_code=trusted)
    held = f" --dtype {known.dtype}" if known.dtype else ""
    note(f"{pair.name}, {pair.vocabulary.size} tokens; serve it: vllm serve {directory}{held}")
