"""The two applications that the proxy is measured against, each served by stock uvicorn (uvloop, httptools).

    python -m tests.bench.apps empty --port N
    python -m tests.bench.apps forward --port N --upstream http://127.0.0.1:M [--ca FILE]

`empty` reads the body and answers a constant: what HTTP in Python costs before anything is done. `forward` sends the
bytes on through the proxy's own HTTP/1.1 client and the answer back, piece by piece, without looking at either: what
being a proxy costs before being of use.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import urlsplit

import uvicorn
import uvloop

from proxy.transport.base import Origin, Request, Transport
from proxy.types import Headers
from tests.bench.payloads import plain_reply

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

DEADLINE_SECONDS: Final = 60.0
PASSED_ON: Final = frozenset({b"authorization", b"content-type", b"accept"})
FRAMING: Final = frozenset({b"transfer-encoding", b"connection", b"keep-alive", b"date", b"server"})


async def read_body(receive: Receive) -> bytes:
    message = await receive()
    if not message.get("more_body"):
        return bytes(message.get("body", b""))
    pieces = [message["body"]]
    while message.get("more_body"):
        message = await receive()
        pieces.append(message.get("body", b""))
    return b"".join(pieces)


def empty_app() -> App:
    """Whatever is asked, the same JSON."""
    body = plain_reply("bench")
    start = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
    }

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await send(start)
        await send({"type": "http.response.body", "body": body})

    return app


def forward_app(transport: Transport, origin: Origin) -> App:
    """Bytes in, bytes out. Everything but `/livez` goes to `origin`."""
    loop = asyncio.get_running_loop()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive)
        if scope["path"] == "/livez":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})
            return
        headers: Headers = [pair for pair in scope["headers"] if pair[0] in PASSED_ON]
        request = Request(origin, scope["method"].encode(), scope["raw_path"], headers, body)
        deadline = loop.time() + DEADLINE_SECONDS
        response = await transport.send(request, deadline)
        try:
            kept = [pair for pair in response.headers if pair[0] not in FRAMING]
            await send({"type": "http.response.start", "status": response.status, "headers": kept})
            while piece := await response.read(deadline):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body"})
        finally:
            await response.aclose()

    return app


def make_transport(ca: str | None) -> Transport:
    # Imported here: the empty app must not carry the client's weight, and must run without it.
    from proxy.transport.http1 import Http1Transport

    context = ssl.create_default_context(cafile=ca)
    return Http1Transport(max_connections=1000, connect_timeout=5.0, ssl_context=context)


async def serve(name: str, port: int, upstream: str, ca: str | None) -> None:
    transport = None
    if name == "empty":
        app = empty_app()
    else:
        url = urlsplit(upstream)
        assert url.hostname is not None
        assert url.port is not None
        transport = make_transport(ca)
        app = forward_app(transport, Origin(url.scheme, url.hostname, url.port))
    # Nothing but HTTP: no access log, no header middleware. What is compared with this has no excuse.
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        http="httptools",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
    )
    try:
        await uvicorn.Server(config).serve()
    finally:
        if transport is not None:
            await transport.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.bench.apps")
    parser.add_argument("name", choices=("empty", "forward"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", default="")
    parser.add_argument("--ca")
    options = parser.parse_args()
    uvloop.run(serve(options.name, options.port, options.upstream, options.ca))


if __name__ == "__main__":
    main()
