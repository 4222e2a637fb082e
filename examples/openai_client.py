"""Use a pair through OpenAI's client: whole answers, then a streamed one with its sources.

Without --url the script starts `baco serve` for the pair and ends it afterwards.
It needs: pip install 'baco[serve]' openai
"""

import argparse
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from openai import OpenAI, OpenAIError
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice

EXAMPLE = "example: python examples/openai_client.py --url http://127.0.0.1:8000"


def main() -> None:
    """Use a running server, or start one."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("prompt", nargs="?", default="Recommend a summer destination")
    parser.add_argument("--url", help="address of a server that runs")
    parser.add_argument("--pair", default="demo", help="pair of the server to start (demo)")
    parser.add_argument("--router", default="P-Punc:0.4", help="router and threshold (P-Punc:0.4)")
    parser.add_argument("-n", type=int, default=4, help="whole answers to ask for (4)")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same answers (1)")
    args = parser.parse_args()
    with nullcontext(args.url) if args.url else serving(args.pair) as url:
        key = os.environ.get("BACO_API_KEY", "none")
        client = OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key=key)
        try:
            ask(client, args.prompt, args.router, args.n, args.seed)
        except OpenAIError as error:
            sys.exit(f"openai_client: {url}: {error}")


def ask(client: OpenAI, prompt: str, router: str, n: int, seed: int) -> None:
    """Print n whole answers with their base share, and one streamed with its sources."""
    reply = client.chat.completions.create(
        model="baco",
        messages=[{"role": "user", "content": prompt}],
        n=n,
        seed=seed,
        extra_body={"router": router},
    )
    for choice in reply.choices:
        print(f"{base_share(provenance(choice))}: {choice.message.content}")

    print("\nstreamed, with the base model's words in brackets:")
    stream = client.chat.completions.create(
        model=f"baco/{router}",  # the router can also be a part of the model's name
        messages=[{"role": "user", "content": prompt}],
        seed=seed,
        stream=True,
    )
    by_base = False
    for chunk in stream:
        for part in chunk.choices:
            baco = provenance(part)
            for text, source in baco.get("sources", ()):
                if (source == "base") != by_base:
                    by_base = not by_base
                    print("[" if by_base else "]", end="")
                print(text, end="", flush=True)
            if part.finish_reason:
                print("]" if by_base else "")
                print(f"{base_share(baco)}, seed {baco['seed']}")


def provenance(choice: Choice | ChunkChoice) -> dict[str, Any]:
    """What BACo adds to a choice: sources, base_share, switches, router and seed."""
    # A stream's first chunk has none.
    baco: dict[str, Any] = (choice.model_extra or {}).get("baco", {})
    return baco


def base_share(baco: dict[str, Any]) -> str:
    """The base share in words; a combiner mixes both models, and then there is none."""
    share = baco["base_share"]
    return "mixed" if share is None else f"base share {share:.0%}"


@contextmanager
def serving(pair: str) -> Iterator[str]:
    """Run `baco serve` on a free port; gives its address when it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "baco", "serve", "--pair", pair, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not healthy(f"http://127.0.0.1:{port}"):
            if server.poll() is not None:
                sys.exit(server.returncode)  # baco has said why
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def healthy(url: str) -> bool:
    """Does the server answer?"""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main()
