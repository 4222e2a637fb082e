"""One half of a pair behind OpenAI's completions API, as servers of a single model offer it.

    python -m baco.bench.server MODEL [--dtype D] [--device D] [--texts N] [--rereads]

It prints the port it listens on. Tokens are named ``token_id:5``, as vLLM names them on request.
What it read for a request is kept, of so many texts at once, and only what follows is read for the
next one, as vLLM and SGLang do; ``--rereads`` reads every request whole, as simpler servers do.
"""

import argparse
import os
import socket
import sys
import threading
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

_COUNT = Annotated[int, Field(ge=1)]


class Asked(BaseModel):
    """A completion request."""

    prompt: list[int]
    max_tokens: _COUNT = 16
    temperature: Annotated[float, Field(ge=0)] = 1.0
    logprobs: Annotated[int, Field(ge=1, le=20)] = 1


@dataclass(slots=True, eq=False)
class _Text:
    """What was read of a text, and its keys and values."""

    read: list[int] = field(default_factory=list)
    cache: DynamicCache = field(default_factory=DynamicCache)

    def keep(self, tokens: int) -> None:
        """Forget all but the first tokens."""
        if not tokens:
            self.cache = DynamicCache()
        elif tokens < len(self.read):
            self.cache.crop(tokens - len(self.read))  # so many tokens off its end
        del self.read[tokens:]


class Speaker:
    """A model that continues token ids.

    Args:
        model: a causal LM of ``transformers``.
        texts: of how many it keeps what it read.
        rereads: read every text whole.
    """

    def __init__(self, model: Any, *, texts: int = 1, rereads: bool = False) -> None:
        self._model, self._most, self._rereads = model, texts, rereads
        self._texts: list[_Text] = []

    @torch.inference_mode()
    def logprobs(self, text: list[int]) -> torch.Tensor:
        """Log-probabilities of the token after ``text``, float32 [V]."""
        known = self._known(text[:-1])
        fresh = torch.tensor([text[len(known.read) :]], device=self._model.device)
        output = self._model(
            input_ids=fresh, past_key_values=known.cache, use_cache=True, logits_to_keep=1
        )
        known.read = list(text)
        row: torch.Tensor = output.logits[0, -1].float().log_softmax(dim=-1)
        return row

    def _known(self, text: list[int]) -> _Text:
        """The kept text that shares most with a new one, cut to what they share; a fresh one where
        that would cut another short and there is room.
        """
        if self._rereads:
            return _Text()
        best = max(self._texts, key=lambda one: _common(one.read, text), default=_Text())
        shared = _common(best.read, text)
        if best not in self._texts or (shared < len(best.read) and len(self._texts) < self._most):
            self._texts.append(best := _Text())
            return best
        best.keep(shared)
        return best

    def complete(self, asked: Asked) -> dict[str, Any]:
        """The answer to a request, as OpenAI's API spells it."""
        text, tokens, said, tops = list(asked.prompt), [], [], []
        for _ in range(asked.max_tokens):
            row = self.logprobs(text)
            token = int(row.argmax())
            if asked.temperature > 0:
                token = int((row / asked.temperature).softmax(dim=-1).multinomial(1))
            top = row.topk(asked.logprobs)
            text.append(token)
            tokens.append(f"token_id:{token}")
            said.append(float(row[token]))
            each = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            tops.append({f"token_id:{i}": value for i, value in each})
        told = {"tokens": tokens, "token_logprobs": said, "top_logprobs": tops}
        choice = {"index": 0, "text": "", "logprobs": told, "finish_reason": "length"}
        return {"object": "text_completion", "model": "half", "choices": [choice]}


def _common(left: list[int], right: list[int]) -> int:
    """Length of the longest common beginning."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))


def application(speaker: Speaker) -> FastAPI:
    """The API over one model."""
    app = FastAPI()

    # One model does one thing at a time: it runs in the loop's own thread.
    @app.post("/v1/completions")
    async def completions(asked: Asked) -> dict[str, Any]:
        return speaker.complete(asked)

    return app


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--rereads", action="store_true")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=given.dtype, trust_remote_code=False
    )
    model = model.to(given.device).eval()
    speaker = Speaker(model, texts=given.texts, rereads=given.rereads)
    # Named as TCP, so that asyncio sends small answers at once (TCP_NODELAY).
    place = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    place.bind(("127.0.0.1", 0))
    place.listen()
    threading.Thread(target=_until_left, daemon=True).start()
    sys.stdout.write(f"{place.getsockname()[1]}\n")
    sys.stdout.flush()
    config = uvicorn.Config(application(speaker), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[place])


def _until_left() -> None:
    """End with the process that started this one, however that ends."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
