"""One model behind OpenAI's completions API, for benchmarks.two_servers and for tests.

    python -m benchmarks.model_server MODEL [--dtype D] [--device D] [--texts N] [--rereads]

The server prints the port it listens on. Tokens are named ``token_id:5``, as vLLM names them on
request. Its KV cache keeps the last N texts, so a request that continues one of them reads only the
new tokens, as in vLLM and SGLang; with ``--rereads`` every request is read whole.
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

from benchmarks import launch

_COUNT = Annotated[int, Field(ge=1)]


class CompletionRequest(BaseModel):
    """A completion request."""

    prompt: list[int]
    max_tokens: _COUNT = 16
    temperature: Annotated[float, Field(ge=0)] = 1.0
    logprobs: Annotated[int, Field(ge=1, le=20)] = 1


@dataclass(slots=True, eq=False)
class _CachedText:
    """Token ids that were read, and their keys and values."""

    ids: list[int] = field(default_factory=list)
    cache: DynamicCache = field(default_factory=DynamicCache)

    def keep(self, tokens: int) -> None:
        """Drop all but the first ``tokens``."""
        if not tokens:
            self.cache = DynamicCache()
        elif tokens < len(self.ids):
            self.cache.crop(tokens - len(self.ids))  # negative: tokens to cut from the end
        del self.ids[tokens:]


class ServedModel:
    """A model that continues token ids.

    Args:
        model: a causal LM of ``transformers``.
        texts: the number of texts whose keys and values are kept.
        rereads: read every text whole.
    """

    def __init__(self, model: Any, *, texts: int = 1, rereads: bool = False) -> None:
        self._model, self._most, self._rereads = model, texts, rereads
        self._texts: list[_CachedText] = []

    @torch.inference_mode()
    def logprobs(self, text: list[int]) -> torch.Tensor:
        """Log-probabilities of the token after ``text``, float32 [V]."""
        cached = self._cached(text[:-1])
        unread = torch.tensor([text[len(cached.ids) :]], device=self._model.device)
        output = self._model(
            input_ids=unread, past_key_values=cached.cache, use_cache=True, logits_to_keep=1
        )
        cached.ids = list(text)
        row: torch.Tensor = output.logits[0, -1].float().log_softmax(dim=-1)
        return row

    def _cached(self, text: list[int]) -> _CachedText:
        """The cached text with the longest common prefix, cut to that prefix.

        A new one where the cut would lose tokens and there is room for one more text.
        """
        if self._rereads:
            return _CachedText()
        best = max(self._texts, key=lambda kept: _common(kept.ids, text), default=_CachedText())
        shared = _common(best.ids, text)
        if best not in self._texts or (shared < len(best.ids) and len(self._texts) < self._most):
            self._texts.append(best := _CachedText())
            return best
        best.keep(shared)
        return best

    def complete(self, request: CompletionRequest) -> dict[str, Any]:
        """The answer to a request, in the form of OpenAI's API."""
        text, tokens, logprobs, tops = list(request.prompt), [], [], []
        for _ in range(request.max_tokens):
            row = self.logprobs(text)
            token = int(row.argmax())
            if request.temperature > 0:
                token = int((row / request.temperature).softmax(dim=-1).multinomial(1))
            top = row.topk(request.logprobs)
            text.append(token)
            tokens.append(f"token_id:{token}")
            logprobs.append(float(row[token]))
            likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            tops.append({f"token_id:{i}": value for i, value in likeliest})
        details = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops}
        choice = {"index": 0, "text": "", "logprobs": details, "finish_reason": "length"}
        return {"object": "text_completion", "model": "one", "choices": [choice]}


def _common(left: list[int], right: list[int]) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))


def application(served: ServedModel) -> FastAPI:
    """The API over one model."""
    app = FastAPI()

    # Requests run one after the other, so the model runs in the event loop's own thread.
    @app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> dict[str, Any]:
        return served.complete(request)

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
    served = ServedModel(model, texts=given.texts, rereads=given.rereads)
    # asyncio sets TCP_NODELAY only on sockets whose protocol is named.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    config = uvicorn.Config(application(served), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


def _exit_with_parent() -> None:
    """Exit when the process that started this one closes standard input or dies."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    launch(main)
