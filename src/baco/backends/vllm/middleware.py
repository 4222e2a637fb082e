"""For ``vllm serve DIR --middleware baco.backends.vllm.middleware.TwoPrompts``: chats are rendered
twice, as BACo renders them, before vLLM reads the request.

Without it both models of a pair read the aligned model's chat template.
"""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from baco.backends.vllm.folder import read_pair
from baco.backends.vllm.options import Limits, pair_prompt
from baco.errors import BacoError
from baco.models.pair import Pair
from baco.sampling.params import MAX_SEED
from baco.sampling.seeds import noise_seed
from baco.text.prompts import openai_message

_PATH = "/v1/chat/completions"
# Fields of other types than here are vLLM's to refuse.
_CHECKED_FIELDS = ("chat_template_kwargs", "continue_final_message", "kv_transfer_params")
# The prompts are rendered here, and vLLM's search passes no router on.
_WITHOUT_EFFECT = (
    "chat_template",
    "documents",
    "reasoning_effort",
    "truncate_prompt_tokens",
    "use_beam_search",
)
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class TwoPrompts:
    """An ASGI middleware.

    It puts the token ids of both prompts into the body: the aligned model's where vLLM accepts a
    tokenised prompt, the base model's beside the pair's other arguments.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self._pair: Pair | None = None
        self._lock = threading.Lock()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Change the body of a chat completion; pass everything else on unchanged."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path != _PATH:
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            changed = await asyncio.to_thread(self._changed, body)
        except BacoError as error:
            await _refuse(send, str(error))
            return
        headers = [h for h in scope["headers"] if h[0].lower() != b"content-length"]
        headers.append((b"content-length", str(len(changed)).encode()))
        replayed = False

        async def replay() -> dict[str, Any]:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": changed, "more_body": False}

        await self.app(scope | {"headers": headers}, replay, send)

    def _changed(self, body: bytes) -> bytes:
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            return body  # vLLM reports the error
        if not isinstance(fields, dict) or not isinstance(fields.get("messages"), list):
            return body
        extra = fields.get("vllm_xargs") or {}
        if not isinstance(extra, dict) or "baco_base_prompt_ids" in extra:
            return body
        variables, continued, transfer = (fields.get(name) for name in _CHECKED_FIELDS)
        if not isinstance(variables, dict | None) or not isinstance(continued, bool | None):
            return body
        if not isinstance(transfer, dict | None):
            return body
        for name in _WITHOUT_EFFECT:
            if fields.get(name):
                raise BacoError(f"{name} has no effect with BACo's middleware: leave it out")
        messages = [openai_message(message) for message in fields["messages"]]
        prompt = self._served_pair().renderer.render(
            messages, template_args=variables, continue_final=continued
        )
        ids, arguments = pair_prompt(prompt.base_ids, prompt.aligned_ids, prompt.digest)
        fields["kv_transfer_params"] = {**(transfer or {}), "prompt_token_ids": ids}
        fields["vllm_xargs"] = {**extra, **arguments}
        seed = fields.get("seed")
        if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed <= MAX_SEED:
            # vLLM draws alike for every prompt of one seed.
            fields["seed"] = noise_seed(seed, prompt.digest)
        return json.dumps(fields).encode()

    def _served_pair(self) -> Pair:
        with self._lock:
            if self._pair is None:
                if Limits.here.folder is None:
                    raise BacoError("this vLLM serves no pair: leave out BACo's middleware")
                self._pair = read_pair(Limits.here.folder, Limits.here.trust_remote_code)
            return self._pair


async def _refuse(send: Send, message: str) -> None:
    """Send a 400 in vLLM's own form."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
