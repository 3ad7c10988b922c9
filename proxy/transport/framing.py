"""HTTP/1.1 framing without a socket: how a request is written, how the body of a response is delimited.

Rules for what comes back (RFC 9112, section 6), stricter where a proxy must not guess:

    HEAD, 204, 304                  no body, whatever the headers say
    Transfer-Encoding               exactly one, exactly `chunked`, in HTTP/1.1; never beside Content-Length
    Content-Length                  that many bytes (the parser refuses two of them)
    neither                         until the server closes; such a connection is never used again
"""

from __future__ import annotations

from typing import Final, Literal

from proxy.transport.base import Request
from proxy.types import Headers

Framing = Literal["empty", "length", "chunked", "close"]

_FRAMING_HEADERS: Final = frozenset((b"content-length", b"transfer-encoding"))
_METHODS_WITH_BODY: Final = frozenset((b"POST", b"PUT", b"PATCH"))
_NEWLINE: Final = b"\r\n"


def request_head(request: Request, authority: bytes) -> bytes:
    """Request line and headers, ready to be followed by the body.

    Raises ValueError where a part could be read as another line or field: an injected request must not leave.
    """
    parts = [request.method, b" ", request.target, b" HTTP/1.1\r\nhost: ", authority]
    lines = 3 + len(request.headers)
    for name, value in request.headers:
        parts += (b"\r\n", name, b": ", value)
    if request.body or request.method in _METHODS_WITH_BODY:
        parts.append(b"\r\ncontent-length: %d" % len(request.body))
        lines += 1
    parts.append(b"\r\n\r\n")
    head = b"".join(parts)
    # Content never enters the message: it may be a credential.
    if head.count(b"\n") != lines or head.count(b"\r") != lines or b"\0" in head or b" " in request.target:
        raise ValueError("a request line or header holds a control character or a space")
    return head


def framing(status: int, headers: Headers, *, head_only: bool) -> Framing | None:
    """How the body of a final response is delimited; None if the response must be refused.

    `headers`: lower-case names. The caller refuses `chunked` in HTTP/1.0.
    """
    fields = [field for field in headers if field[0] in _FRAMING_HEADERS]
    kind: Framing
    if not fields:
        kind = "close"
    elif len(fields) > 1:
        return None
    elif fields[0][0] == b"content-length":
        kind = "length"
    elif fields[0][1].lower() == b"chunked":
        kind = "chunked"
    else:
        return None
    return "empty" if head_only or status == 204 or status == 304 else kind


def header_bytes(headers: Headers) -> int:
    """The least that these headers took on the wire."""
    return sum(len(name) + len(value) + 3 for name, value in headers)


def ends_exactly(data: bytes, body: bytes | None) -> bool:
    """Whether a read that completed a message ended with it, given that the parser saw nothing after it.

    The parser skips line breaks between messages, so a surplus of those alone goes unnoticed there.
    `body`: what this read brought of a body with a length; None where a message ends with its empty line.
    False also where the read does not tell: a connection too many is closed rather than one too few.
    """
    if body is None:
        return data.endswith(b"\r\n\r\n") and len(data) > 4 and data[-5] not in _NEWLINE
    if data[-1] not in _NEWLINE:
        return True
    own = len(body) - len(body.rstrip(_NEWLINE))
    return own < len(body) and own == len(data) - len(data.rstrip(_NEWLINE))
