"""Providers to put behind the proxy: `breakwater mock` as a process, and scripts on a raw socket in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from tests.e2e.stack import BREAKWATER
from tests.transport.servers import Peer, Received, Script, Server, serve

PATIENCE = 30.0


class PortTaken(Exception):
    """Somebody else listens there."""


@dataclass(frozen=True)
class MockProcess:
    """`breakwater mock` that listens on `port`."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def served(self) -> int:
        """How many requests it has answered so far: what to give to `ledger`."""
        return int(self._books("limit=1")["last_id"])

    def ledger(self, since: int, model: str | None = None) -> list[dict[str, Any]]:
        """The requests after the first `since`, of one model if it is named."""
        entries = self._books(f"since={since}")["entries"]
        return [entry for entry in entries if model is None or entry["model"] == model]

    def _books(self, query: str) -> dict[str, Any]:
        with urlopen(f"http://127.0.0.1:{self.port}/__ledger?{query}", timeout=PATIENCE) as answer:
            return json.load(answer)


@contextlib.contextmanager
def mock_process(port: int = 0, script: Path | None = None) -> Iterator[MockProcess]:
    """Ready, and ended at the end. Raises PortTaken."""
    arguments = ["--script", str(script)] if script is not None else []
    process = subprocess.Popen(
        [BREAKWATER, "mock", "--port", str(port), *arguments], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline().decode()
        found = re.search(r":(\d+)/v1", line)
        if "cannot listen" in line:
            raise PortTaken
        assert found is not None, line + process.stderr.read().decode()
        yield MockProcess(int(found[1]))
    finally:
        process.terminate()
        process.wait(PATIENCE)
        process.stderr.close()


@contextlib.contextmanager
def scripted(script: Script) -> Iterator[Server]:
    """`script` on every connection of a real socket, on a loop and a thread of its own."""
    ready: threading.Event = threading.Event()
    over: list[Callable[[], None]] = []
    found: list[Server] = []
    failures: list[BaseException] = []

    async def main() -> None:
        end = asyncio.Event()
        loop = asyncio.get_running_loop()
        over.append(lambda: loop.call_soon_threadsafe(end.set))
        async with serve(script) as server:
            found.append(server)
            ready.set()
            await end.wait()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as failure:  # handed to the test
            failures.append(failure)
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        if failures:
            raise failures[0]
        yield found[0]
    finally:
        if over and thread.is_alive():
            over[0]()
        thread.join(PATIENCE)
    if failures:
        raise failures[0]


def base_url(server: Server) -> str:
    """What to write into a provider's configuration."""
    return f"http://127.0.0.1:{server.port}/v1"


def http(
    body: bytes,
    *headers: str,
    status: str = "200 OK",
    content_type: str = "application/json",
    length: int | None = None,
) -> bytes:
    """A whole answer with a Content-Length."""
    lines = [
        f"HTTP/1.1 {status}",
        f"content-length: {len(body) if length is None else length}",
        *([f"content-type: {content_type}"] if content_type else []),
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def sse(*events: bytes, headers: tuple[str, ...] = ()) -> bytes:
    """A whole event stream, chunked; each event is the value of its data line."""
    head = "\r\n".join(
        ["HTTP/1.1 200 OK", "content-type: text/event-stream", "transfer-encoding: chunked", *headers]
    ).encode()
    frames = [b"data: " + event + b"\n\n" for event in events]
    return head + b"\r\n\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames) + b"0\r\n\r\n"


def answering(answer: Callable[[Received], bytes]) -> Script:
    """Answers each request with the bytes that `answer` makes of it."""

    async def script(peer: Peer) -> None:
        while True:
            received = await peer.request()
            await peer.send(answer(received))

    return script
