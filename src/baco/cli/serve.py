"""``baco serve``: an OpenAI-compatible server and its page."""

import ipaddress
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from baco.cli import options as opt
from baco.cli.console import note
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.serve.settings import Settings

KEY_VARIABLE = "BACO_API_KEY"


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where the server listens, and its limits."""

    host: opt.Host = "127.0.0.1"
    port: opt.Port = 8000
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar=KEY_VARIABLE,
            show_default=False,
            help="Key that clients must send. Repeatable. Better set in the environment.",
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", help="Origin whose pages may call the server. Repeatable."),
    ] = None
    max_rows: Annotated[
        int,
        typer.Option("--max-rows", min=1, help="Answers decoded at the same time; others wait."),
    ] = 256
    max_open: Annotated[
        int,
        typer.Option(
            "--max-open", min=1, help="Prompts accepted at the same time; others get status 429."
        ),
    ] = 512
    max_n: Annotated[int, typer.Option("--max-n", min=1, help="Answers per request.")] = 128
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")
    ] = 4096
    max_logprobs: Annotated[
        int,
        typer.Option(
            "--max-logprobs",
            min=0,
            help="Largest number of most likely tokens that a client may ask for per position.",
        ),
    ] = 20
    max_body: Annotated[
        int, typer.Option("--max-body", min=1, help="Largest request body, in bytes.")
    ] = 2**20
    header_timeout: Annotated[
        float,
        typer.Option("--header-timeout", min=0.001, help="Seconds for a request's header."),
    ] = 10.0
    body_timeout: Annotated[
        float,
        typer.Option(
            "--body-timeout",
            min=0.001,
            help="Seconds for a request's body, and for a client to receive what is sent.",
        ),
    ] = 60.0
    max_connections: Annotated[
        int | None,
        typer.Option(
            "--max-connections",
            min=1,
            show_default="what ulimit -n leaves",
            help="Connections open at once.",
        ),
    ] = None
    max_incomplete: Annotated[
        int | None,
        typer.Option(
            "--max-incomplete",
            min=1,
            show_default="half of those, at most 1024",
            help="Connections that may have sent an incomplete request.",
        ),
    ] = None
    max_incomplete_per_address: Annotated[
        int | None,
        typer.Option(
            "--max-incomplete-per-address",
            min=1,
            show_default="no bound",
            help="The same limit for one address; trusted proxies are exempt.",
        ),
    ] = None
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-proxy",
            show_default="127.0.0.1 and ::1",
            help="Address or network whose X-Forwarded-For header is trusted. Repeatable.",
        ),
    ] = None
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.001, help="Longest time for a request, in seconds.")
    ] = 600.0
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds for open requests after SIGTERM.")
    ] = 30.0
    router_file: Annotated[
        list[str] | None,
        typer.Option(
            "--router-file",
            show_default="none",
            help="File that routers of requests may name, as in Slop:phrases.txt. Repeatable.",
        ),
    ] = None
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Also write prompts into the access log.")
    ] = False

    def settings(self) -> "Settings":
        """The server's settings; the other options are not the application's."""
        from baco.serve.settings import LOOPBACK, Settings

        values = asdict(self)
        for name in ("host", "port", "max_rows", "grace"):
            del values[name]
        return Settings(
            api_keys=tuple(values.pop("api_key") or ()),
            cors_origins=tuple(values.pop("cors_origin") or ()),
            trusted_proxies=tuple(values.pop("trusted_proxy") or LOOPBACK),
            router_files=tuple(values.pop("router_file") or ()),
            **values,
        )


@opt.grouped()
def serve(
    *,
    models: opt.PairOptions,
    tokenizers: opt.TokenizerOptions,
    server: ServerOptions,
    weights: opt.WeightOptions,
    backend: opt.Backend = None,
    servers: opt.BackendOptions,
    templates: opt.TemplateOptions,
) -> None:
    """Serve a pair behind OpenAI's API, with a page at / that shows which model wrote each word.

    One line of JSON per request goes to standard output.
    """
    try:
        from baco.serve.app import create_app
        from baco.serve.middleware import log_to_streams
        from baco.serve.server import Server
        from baco.sockets import address_of, bind
    except ImportError as error:
        raise BacoError(
            f"the server needs {error.name}: install it with pip install 'baco[serve]'"
        ) from error
    if not os.environ.get(KEY_VARIABLE, "any").strip():
        raise BacoError(f"{KEY_VARIABLE} is empty: put a key into it, or unset it to ask for none")
    settings = server.settings()
    bound = bind(server.host, server.port)  # before two models are loaded for a taken address
    loaded = opt.load(
        models,
        tokenizers,
        weights,
        servers,
        templates,
        backend=backend,
        max_rows=server.max_rows,
    )
    loaded.decoder()  # a pair that cannot decode ends the command before the first request
    today = opt.date_in_prompts(loaded)
    if today is not None and loaded.pair.renderer.date is None:
        note(f"prompts contain the current date, today {today}: --date {today} keeps it")
    app = create_app(loaded, settings)
    log_to_streams()
    address, taken = bound.getsockname()[:2]
    if not settings.api_keys and not ipaddress.ip_address(address).is_loopback:
        note(f"anyone who reaches port {taken} can use it: set {KEY_VARIABLE} to require a key")
    ready = f"{loaded.pair.name} at http://{address_of(bound)}"
    Server(app, server.grace, lambda: note(ready)).run(sockets=[bound])
