"""What the operator of a server decides."""

import ipaddress
from dataclasses import dataclass

from baco.errors import BacoError

LOOPBACK = ("127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits, doors and logs of a server.

    Attributes:
        api_keys: bearer tokens of which a client must show one; empty: no key is asked for.
        cors_origins: web origins whose pages may call; empty: none but the server's own.
        max_open: prompts that may be open at once, waiting ones included; more are answered 429.
        max_n: answers that one request may ask for, over all its prompts.
        max_tokens: longest answer that a request may ask for, in tokens.
        max_logprobs: most likely tokens that a request for a text's continuation may ask for at
            a position.
        max_body: bytes of a request's body.
        timeout: seconds that a request may take, waiting included.
        log_prompts: also write prompts into the access log.
        header_timeout: seconds that a request's header may take.
        body_timeout: seconds that a request's body may take, and a client to take what is sent.
        max_connections: connections that may be open; None: as many as the process may open files.
        max_incomplete: connections whose request may be incomplete; None: half of those, at most
            1,024.
        max_incomplete_per_address: the same of one address; None: as many as in all.
        trusted_proxies: addresses and networks of proxies that say for whom they ask; the bound of
            an address does not hold for them.
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

    def __post_init__(self) -> None:
        if not all(self.api_keys):
            raise BacoError("an API key is empty: give one of some length, or none")
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise BacoError(
                    f"trusted proxy {proxy!r}: give an address or a network, as in 10.0.0.0/8"
                ) from error

    def trusts(self, address: str) -> bool:
        """Is an address that of a proxy that is trusted?"""
        own = ipaddress.ip_address(address.partition("%")[0])
        return any(own in ipaddress.ip_network(proxy) for proxy in self.trusted_proxies)
