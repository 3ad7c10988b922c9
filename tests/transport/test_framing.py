"""The rules of framing, as tables."""

from __future__ import annotations

import pytest

from proxy.transport.framing import ends_exactly, framing
from proxy.types import Headers

LENGTH = (b"content-length", b"5")
CHUNKED = (b"transfer-encoding", b"Chunked")


@pytest.mark.parametrize(
    ("status", "headers", "head_only", "expected"),
    [
        (200, [LENGTH], False, "length"),
        (200, [CHUNKED], False, "chunked"),
        (200, [], False, "close"),
        (200, [LENGTH], True, "empty"),
        (200, [], True, "empty"),
        (204, [], False, "empty"),
        (304, [LENGTH], False, "empty"),
        (200, [LENGTH, CHUNKED], False, None),
        (200, [LENGTH, LENGTH], False, None),
        (200, [CHUNKED, CHUNKED], False, None),
        (200, [(b"transfer-encoding", b"gzip")], False, None),
        (200, [(b"transfer-encoding", b"gzip, chunked")], False, None),
        (204, [LENGTH, CHUNKED], False, None),
    ],
)
def test_framing(status: int, headers: Headers, expected: str | None, *, head_only: bool) -> None:
    assert framing(status, headers, head_only=head_only) == expected


@pytest.mark.parametrize(
    ("data", "body", "expected"),
    [
        (b"...hello", b"hello", True),
        (b"...hello\r\n", b"hello", False),
        (b"...hello\n", b"hello\n", True),
        (b"...hello\n\r\n", b"hello\n", False),
        (b"\r\n\r\n\n", b"\n", False),  # cannot be told from a surplus
        (b"2\r\nok\r\n0\r\n\r\n", None, True),
        (b"0\r\n\r\n", None, True),
        (b"0\r\n\r\n\r\n", None, False),
        (b"\r\n\r\n", None, False),  # cannot be told
        (b"\n", None, False),
        (b"X: y\r\n\r\n", None, True),
    ],
)
def test_ends_exactly(data: bytes, body: bytes | None, *, expected: bool) -> None:
    assert ends_exactly(data, body) is expected
