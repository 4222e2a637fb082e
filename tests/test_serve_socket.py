"""The socket that a server listens at."""

import asyncio
import socket

from baco.sockets import bind


def test_small_chunks_leave_at_once() -> None:
    """With Nagle's algorithm on, a client that acknowledges late sees every chunk 40 ms late."""

    async def accepted() -> int:
        no_delay: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def look(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            taken = writer.get_extra_info("socket")
            no_delay.set_result(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        bound = bind("127.0.0.1", 0)
        async with await asyncio.start_server(look, sock=bound):
            _, writer = await asyncio.open_connection(*bound.getsockname())
            seen = await no_delay
            writer.close()
        return seen

    assert asyncio.run(accepted()) == 1
