"""A server process for the tests of the end: `python site.py DRAIN_MS GRACE_MS [--stuck] [--port PORT]`.

Prints `ready PORT` for each of its two listeners, then a line for whatever happens to it. Its application streams:
`/ticks` until it has ticked a while after the drain began, `/endless` until it is interrupted, `/flood` faster than
anyone reads, `/burst` with 24 MB as its last event.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from typing import Any

from proxy.edge.head import Limits
from proxy.edge.server import Listener, ListenFailed, Server, run

TICK = b"data: tick\n\n"


class App:
    def __init__(self, *, stuck: bool) -> None:
        self._stuck = stuck
        self._ready = True
        self._draining = asyncio.Event()
        self._interrupted = asyncio.Event()
        self._streams: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        path = scope["path"]
        if path == "/readyz":
            status = 503 if self._draining.is_set() else 200
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        scope["extensions"]["breakwater"].on_lost(lambda reason: print("lost", reason, flush=True))
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            await self._stream(path, send)
        finally:
            self._streams.discard(task)

    async def _stream(self, path: str, send: Any) -> None:
        async def event(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        tick = TICK * (10_000 if path == "/flood" else 1)
        ticks = 0
        while not self._interrupted.is_set() and ticks < 30:
            await event(tick)
            if path != "/flood":
                await asyncio.sleep(0.05)
            if path == "/ticks" and self._draining.is_set():
                ticks += 1
        if self._interrupted.is_set():
            last = TICK * 2_000_000 if path == "/burst" else b""
            await event(last + b"data: error\n\n", more=False)
        else:
            await event(b"data: [DONE]\n\n", more=False)

    def begin_drain(self) -> None:
        print("draining", flush=True)
        self._draining.set()

    async def interrupt_all(self) -> None:
        print("interrupting", len(self._streams), flush=True)
        if self._stuck:
            try:
                await asyncio.Event().wait()
            finally:
                print("let go", flush=True)
        self._interrupted.set()
        if self._streams:
            await asyncio.wait(self._streams)


async def main(drain_ms: int, grace_ms: int, stuck: bool, port: int) -> None:
    app = App(stuck=stuck)
    server = Server(
        app,
        [Listener(app, "127.0.0.1", port), Listener(app, "127.0.0.1", 0)],
        limits=Limits(),
        drain_ms=drain_ms,
        grace_ms=grace_ms,
        on_ready=lambda host, real: print("ready", real, flush=True),
    )
    await server.serve()
    print("served", flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)
    logging.getLogger("asyncio").setLevel(logging.INFO)
    options = argparse.ArgumentParser()
    options.add_argument("drain_ms", type=int)
    options.add_argument("grace_ms", type=int)
    options.add_argument("--stuck", action="store_true")
    options.add_argument("--port", type=int, default=0)
    try:
        run(main(**vars(options.parse_args())))
    except ListenFailed as failure:
        sys.exit(f"error: {failure}")
