"""The settings of a server."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from baco.errors import BacoError

LOOPBACK = ("127.0.0.1", "::1")
# As browsers send it, in lower case and without a path; no other spelling would ever match.
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits, access and logs of a server.

    Attributes:
        api_keys: bearer tokens, one of which a client must send; empty: no key is needed.
        cors_origins: other web origins whose pages may call the server.
        max_open: open prompts, waiting ones included; one more is answered 429.
        max_n: answers per request, over all its prompts.
        max_tokens: tokens of an answer.
        max_logprobs: most likely tokens per position (``/v1/completions``).
        max_body: bytes of a request's body.
        timeout: seconds of a request, waiting included.
        log_prompts: also write prompts to the access log.
        header_timeout: seconds for a request's header to arrive.
        body_timeout: seconds for its body to arrive, and for a client to read what is sent.
        max_connections: open connections; None: as many as the process may open files.
        max_incomplete: connections whose request is incomplete; None: half of those, at most 1,024.
        max_incomplete_per_address: the same for one address; None: no limit of its own.
        trusted_proxies: addresses and networks of proxies whose X-Forwarded-For is believed; the
            limit per address does not apply to them.
        router_files: paths that the routers of requests may name.
    """

    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_open: int = 512
    max_n: int = 128
    max_tokens: int = 4096
    max_logprobs: int = 20
    max_body: int = 2**20
    timeout: float = 600.0
    log_prompts: bool = False
    header_timeout: float = 10.0
    body_timeout: float = 60.0
    max_connections: int | None = None
    max_incomplete: int | None = None
    max_incomplete_per_address: int | None = None
    trusted_proxies: tuple[str, ...] = LOOPBACK
    router_files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(self.api_keys):
            raise BacoError("an API key is empty: give one of some length, or none")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise BacoError(
                    f"origin {origin!r}: give it as browsers send it, as in https://mine.example "
                    "or http://localhost:3000, without a path; or * for all"
                )
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise BacoError(
                    f"trusted proxy {proxy!r}: give an address or a network, as in 10.0.0.0/8"
                ) from error
        for path in self.router_files:
            if not Path(path).is_file():
                raise BacoError(f"router file {path!r} is not a file: give the path of one")

    def trusts(self, address: str) -> bool:
        """Whether an address is a trusted proxy's."""
        own = ipaddress.ip_address(address.partition("%")[0])
        return any(own in ipaddress.ip_network(proxy) for proxy in self.trusted_proxies)
