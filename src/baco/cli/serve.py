"""``baco serve``: an OpenAI-compatible server and its page."""

from typing import Annotated

import typer

from baco import BacoError
from baco.cli import options as opt


def serve(
    pair: opt.PairName = None,
    base: opt.BaseName = None,
    aligned: opt.AlignedName = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 takes a free one.")] = 8000,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    base_template: opt.BaseTemplate = None,
    chat_template: opt.ChatTemplate = None,
) -> None:
    """Serve a pair behind OpenAI's API, with a page at / that shows who wrote which word."""
    try:
        import uvicorn

        from baco.serve.app import create_app
    except ImportError as error:
        raise BacoError(
            f"the server needs {error.name}: install it with pip install 'baco[serve]'"
        ) from error
    baco = opt.load(
        pair,
        base,
        aligned,
        dtype=dtype,
        device=device,
        base_template=base_template,
        chat_template=chat_template,
    )
    uvicorn.run(create_app(baco), host=host, port=port)
