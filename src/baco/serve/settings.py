"""What the operator of a server decides."""

from dataclasses import dataclass

from baco.errors import BacoError


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

    def __post_init__(self) -> None:
        if not all(self.api_keys):
            raise BacoError("an API key is empty: give one of some length, or none")
