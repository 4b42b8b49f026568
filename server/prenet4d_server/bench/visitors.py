"""Open pages without a browser: as many websockets that take everything the page's server sends.

``python -m prenet4d_server.bench.visitors URL COUNT``; says ``ready`` once all are open.
"""

from __future__ import annotations

import asyncio
import sys

from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect

from prenet4d_server.priority import run_when_idle

_OPEN_TIMEOUT_S = 60.0


async def visit(url: str, opened: asyncio.Event) -> None:
    """Open the page and take what comes, for ever."""
    page = HTTPRequest(url, connect_timeout=_OPEN_TIMEOUT_S, request_timeout=_OPEN_TIMEOUT_S)
    answer = await AsyncHTTPClient().fetch(page)
    token = answer.body.decode().split('"token":"')[1].split('"')[0]
    request = HTTPRequest(
        url.replace("http:", "ws:") + "/ws",
        headers={"Origin": url, "Sec-WebSocket-Protocol": f"bokeh, {token}"},
        connect_timeout=_OPEN_TIMEOUT_S,
        request_timeout=_OPEN_TIMEOUT_S,
    )
    connection = await websocket_connect(request, compression_options={}, max_message_size=1 << 28)
    while await connection.read_message() is not None:
        opened.set()
    raise ConnectionError("The page's server has closed the connection.")


async def main(url: str, count: int) -> None:
    """Open so many pages, one after the other as people do, and keep them open."""
    async with asyncio.TaskGroup() as visitors:
        for _ in range(count):
            opened = asyncio.Event()
            visitors.create_task(visit(url, opened))
            await opened.wait()
        print("ready", flush=True)


if __name__ == "__main__":
    run_when_idle()  # browsers run on other machines: the measured one must not pay for these
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
