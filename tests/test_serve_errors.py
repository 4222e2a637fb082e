"""OpenAI's own client raises the matching exception for each kind of error."""

import threading
import time
from collections.abc import Iterator

import openai
import pytest
import uvicorn
from fastapi import FastAPI

from baco.errors import BacoError
from baco.serve import errors
from baco.serve.engine_thread import QueueFullError


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    app = FastAPI()
    errors.install(app)

    @app.get("/v1/models/wrong")
    async def wrong() -> None:
        raise BacoError("temperature is -1: use 0 or more")

    @app.get("/v1/models/full")
    async def full() -> None:
        raise QueueFullError

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield openai.OpenAI(api_key="any", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0)
    server.should_exit = True
    thread.join()


def test_bad_input_is_a_bad_request_with_its_one_line(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature is -1: use 0 or more"):
        client.models.retrieve("wrong")


def test_a_full_queue_is_a_429_with_retry_after(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as refused:
        client.models.retrieve("full")
    assert int(refused.value.response.headers["Retry-After"]) > 0
