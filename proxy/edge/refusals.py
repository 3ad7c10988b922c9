"""What the guard refuses with, and how that looks on the wire. No message quotes the client's bytes."""

from __future__ import annotations

import os
from typing import Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from proxy.edge.headers import request_id
from proxy.errors import InvalidRequest, ProxyError, RequestTimeout, RequestTooLarge, envelope
from proxy.types import Headers

MALFORMED: Final = InvalidRequest("The request is not well-formed HTTP/1.1.")
VERSION: Final = InvalidRequest("Only HTTP/1.1 and HTTP/1.0 are spoken here.")
UPGRADE: Final = InvalidRequest("This server does not switch protocols.")
HEAD_TOO_LARGE: Final = InvalidRequest("The header fields of the request are larger than this server accepts.")
TOO_MANY_HEADERS: Final = InvalidRequest("The request has more header fields than this server accepts.")
HEAD_TIMEOUT: Final = RequestTimeout("The head of the request did not arrive in time.")
URL_TOO_LONG: Final = InvalidRequest("The request target is longer than this server accepts.")
NOT_ORIGIN_FORM: Final = InvalidRequest("The request target must be an absolute path, such as /v1/models.")
AMBIGUOUS_PATH: Final = InvalidRequest("The path is ambiguous: dot segments, control characters, or encoded twice.")
HOST_COUNT: Final = InvalidRequest("The request needs exactly one Host header.")
HOST_FORM: Final = InvalidRequest("The Host header must be a host name or address with an optional port.")
UNDERSCORE: Final = InvalidRequest("A header name with an underscore resembles one that matters; write it with '-'.")
FRAMING: Final = InvalidRequest("The request needs one Content-Length, or 'Transfer-Encoding: chunked', or neither.")
FRAMING_1_0: Final = InvalidRequest("An HTTP/1.0 request cannot have a Transfer-Encoding.")
CHUNK_FRAMING: Final = InvalidRequest("The chunked body carries more extensions or trailers than this server accepts.")
BODY_TIMEOUT: Final = RequestTimeout("The body of the request did not arrive in time.")
BODY_TOO_LARGE: Final = RequestTooLarge("The request body is larger than this server accepts.")


def render(error: ProxyError, default_headers: Headers, sent: Headers) -> bytes:
    """The whole answer, which closes the connection. `sent`: the fields of the request, as far as they came."""
    own_id = next((value for name, value in sent if name == b"x-request-id"), None)
    body = envelope(error)
    headers: Headers = [
        *default_headers,
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id(own_id, os.urandom).encode()),
        (b"connection", b"close"),
    ]
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    return STATUS_LINE[error.status] + lines + b"\r\n" + body
