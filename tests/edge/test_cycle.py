"""How a response is written: head and body together, framed as the client's version allows, and nothing injected."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.edge.head import Limits

from .raw import Site, Wire, serving

BIG = b"x" * 200_000
HOST = b"Host: a\r\n"

Message = dict[str, Any]


def head(*headers: tuple[bytes, bytes], status: int = 200) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data: bytes = b"", *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


LENGTH = b"content-length"
GOOD: dict[str, list[Message]] = {
    "/plain": [head((LENGTH, b"5")), body(b"hello")],
    "/pieces": [head((LENGTH, b"5")), body(b"he", more=True), body(b"llo", more=True), body()],
    "/chunks": [head(), body(b"he", more=True), body(b"", more=True), body(b"llo")],
    "/late-end": [head(), body(b"hello", more=True), body()],
    "/big": [head((LENGTH, b"%d" % len(BIG))), body(BIG)],
    "/big-chunk": [head(), body(BIG)],
    "/empty": [head((LENGTH, b"0")), body()],
    "/nothing": [head(status=204), body()],
    "/close": [head((LENGTH, b"2"), (b"connection", b"close")), body(b"ok")],
}
BAD: dict[str, list[Message]] = {
    "/injected-value": [head((b"x-a", b"1\r\nx-evil: 1"), (LENGTH, b"2")), body(b"ok")],
    "/injected-name": [head((b"x-a: 1\r\nx-evil", b"1"), (LENGTH, b"2")), body(b"ok")],
    "/bare-lf": [head((b"x-a", b"1\nx-evil: 1"), (LENGTH, b"2")), body(b"ok")],
    "/bare-cr": [head((b"x-a", b"1\rx-evil: 1"), (LENGTH, b"2")), body(b"ok")],
    "/nul": [head((b"x-a", b"1\0"), (LENGTH, b"2")), body(b"ok")],
    "/own-framing": [head((b"transfer-encoding", b"chunked")), body(b"ok")],
    "/too-long": [head((LENGTH, b"2")), body(b"long")],
    "/too-short": [head((LENGTH, b"9")), body(b"short")],
    "/body-first": [body(b"ok")],
    "/two-heads": [head(), head(), body(b"ok")],
    "/after-the-end": [head((LENGTH, b"2")), body(b"ok"), body(b"more")],
}


async def app(site: Site, scope: Message, receive: Any, send: Any) -> None:
    for message in (GOOD | BAD)[scope["path"]]:
        await send(message)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving(app, Limits()) as running:
        yield running


def get(path: str, *, method: str = "GET", version: str = "1.1", extra: bytes = b"") -> bytes:
    return f"{method} {path} HTTP/{version}\r\n".encode() + HOST + extra + b"\r\n"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/plain", b"hello"),
        ("/pieces", b"hello"),
        ("/chunks", b"hello"),
        ("/late-end", b"hello"),
        ("/big", BIG),
        ("/big-chunk", BIG),
        ("/empty", b""),
    ],
)
def test_every_way_to_send_a_body_arrives_whole_and_keeps_the_connection(
    site: Site, path: str, expected: bytes
) -> None:
    with site.wire() as wire:
        for _ in range(2):
            wire.send(get(path))
            assert wire.answer().body == expected


def test_head_and_body_leave_in_one_write(site: Site) -> None:
    with site.wire() as wire:
        for path in ("/plain", "/chunks"):
            wire.send(get(path))
            first = wire.socket.recv(65536)
            assert first.startswith(b"HTTP/1.1 200")
            assert b"he" in first.partition(b"\r\n\r\n")[2]
            if path == "/chunks" and not first.endswith(b"0\r\n\r\n"):
                wire.until(b"0\r\n\r\n")


def test_a_head_request_gets_the_head_alone(site: Site) -> None:
    with site.wire() as wire:
        wire.send(get("/big", method="HEAD") + get("/plain"))
        status, headers = wire.head()
        assert (status, headers["content-length"]) == (200, str(len(BIG)))
        assert wire.answer().body == b"hello"


def test_no_content_has_no_framing(site: Site) -> None:
    with site.wire() as wire:
        wire.send(get("/nothing") + get("/plain"))
        status, headers = wire.head()
        assert status == 204
        assert not {"content-length", "transfer-encoding"} & headers.keys()
        assert wire.answer().body == b"hello"


@pytest.mark.parametrize(("path", "expected"), [("/chunks", b"hello"), ("/plain", b"hello"), ("/nothing", b"")])
def test_http_1_0_gets_no_chunks_and_a_close(site: Site, path: str, expected: bytes) -> None:
    with site.wire() as wire:
        wire.send(get(path, version="1.0"))
        _, headers = wire.head()
        assert "transfer-encoding" not in headers
        assert headers["connection"] == "close"
        assert wire.rest() == expected


@pytest.mark.parametrize("ask", [get("/close"), get("/plain", extra=b"Connection: close\r\n")])
def test_a_close_is_said_once_and_done(site: Site, ask: bytes) -> None:
    with site.wire() as wire:
        wire.send(ask)
        everything = wire.rest()
        assert everything.lower().count(b"connection: close") == 1


@pytest.mark.parametrize("path", sorted(BAD))
def test_what_would_break_the_framing_is_never_written(site: Site, path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1, logger="uvicorn.error")  # it says so at length
    with Wire(site.port) as wire:
        wire.send(get(path))
        everything = wire.rest() if path != "/after-the-end" else wire.answer().body
        assert b"x-evil" not in everything
        assert b"\0" not in everything
        if path.startswith(("/injected", "/bare", "/nul", "/own", "/body-first")):
            assert everything.startswith(b"HTTP/1.1 500")
            assert b'"code":"internal_error"' in everything
