"""The limits that the parser does not know, and what it would take for HTTP/1.1 though it is not."""

from __future__ import annotations

import asyncio

import pytest

from tests.transport.wire import MAX_HEAD, Outcome, read_with_ours

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
EMPTY = b"Content-Length: 0\r\n\r\n"
STEP = 5000


def cuts(data: bytes) -> list[list[bytes]]:
    """In one read, and in many."""
    return [[data], [data[at : at + STEP] for at in range(0, len(data), STEP)]]


@pytest.mark.parametrize(
    "data",
    [
        OK + b"X: " + b"a" * (MAX_HEAD - 100) + b"\r\n" + EMPTY,
        OK + b"X: a\r\n" * 199 + EMPTY,
        CHUNKED + b"5;" + b"a" * (MAX_HEAD - 100) + b"\r\nhello\r\n" + b"0\r\n\r\n",
        CHUNKED + b"0\r\nX: " + b"a" * (MAX_HEAD - 100) + b"\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + OK + EMPTY,
    ],
    ids=["head", "headers", "extension", "trailer", "interim"],
)
def test_up_to_the_limit(loop: asyncio.AbstractEventLoop, data: bytes) -> None:
    for pieces in cuts(data):
        outcome = read_with_ours(loop, pieces)
        assert (outcome.complete, outcome.kept) == (True, True)


@pytest.mark.parametrize(
    "data",
    [
        OK + b"X: " + b"a" * MAX_HEAD + b"\r\n" + EMPTY,
        OK + b"X: a\r\n" * 200 + EMPTY,
        OK + b"X: " + b"a" * MAX_HEAD,
        b"HTTP/1.1 200 " + b"O" * MAX_HEAD,
        CHUNKED + b"5;" + b"a" * MAX_HEAD,
        CHUNKED + b"0\r\nX: " + b"a" * MAX_HEAD,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
    ],
    ids=["head", "headers", "endless header", "endless reason", "endless extension", "endless trailer", "interim"],
)
def test_beyond_the_limit(loop: asyncio.AbstractEventLoop, data: bytes) -> None:
    for pieces in cuts(data):
        outcome = read_with_ours(loop, pieces)
        assert (outcome.refused, outcome.complete, outcome.kept) == (True, False, False)


@pytest.mark.parametrize(
    "data",
    [
        OK + b"Transfer-Encoding: chunked\t\r\n\r\n0\r\n\r\n",  # the parser overlooks it, and would pass the chunks on
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/0.9 200 OK\r\n",
        b"HTTP/2.0 200 OK\r\n" + EMPTY,
        b"HTTP/1.1 099 Low\r\n" + EMPTY,
        b"\r\n" + OK + EMPTY,
        b"RTSP/1.0 200 OK\r\n" + EMPTY,
        b"ICE/1.0 200 OK\r\n" + EMPTY,
    ],
)
def test_not_http(loop: asyncio.AbstractEventLoop, data: bytes) -> None:
    for pieces in ([data], [bytes([byte]) for byte in data]):
        assert read_with_ours(loop, pieces) == Outcome(refused=True)
