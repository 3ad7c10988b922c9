"""What a request may look like on the wire. Pure: bytes in, a verdict out.

`httptools` checks the grammar: tokens, line ends, two or malformed lengths, a length beside `Transfer-Encoding`. It is
silent about the rest, and the rest is where two programs in a row read one request in two ways. So here everything
that could mean two things is refused, never repaired:

- one `Host`, well formed (HTTP/1.0 may leave it out); one framing; no `Transfer-Encoding` before HTTP/1.1;
- an origin-form target whose path reads the same however often it is decoded: no dot segments, no escape that
  survives decoding, no backslash, no control characters, valid UTF-8.
  An escaped slash is let by: model names hold them;
- no `Upgrade` in any form: nothing here speaks another protocol;
- no name with an underscore that a CGI-like reader would take for a header that matters (`content_length`).

A verdict is what the target means, or the error to answer with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from urllib.parse import unquote_to_bytes

from proxy.edge.refusals import (
    AMBIGUOUS_PATH,
    BODY_TOO_LARGE,
    FRAMING,
    FRAMING_1_0,
    HOST_COUNT,
    HOST_FORM,
    NOT_ORIGIN_FORM,
    UNDERSCORE,
    UPGRADE,
    URL_TOO_LONG,
    VERSION,
)
from proxy.errors import ProxyError
from proxy.types import Headers


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one client connection. Sizes in bytes, times in seconds."""

    head_bytes: int = 32_768
    """Target plus header fields, each with its separators."""
    header_count: int = 100
    url_bytes: int = 8192
    head_seconds: float = 10.0
    """From the connection, or from the first byte of a later request, to the end of its head."""
    body_bytes: int = 20_971_520
    body_seconds: float = 30.0
    """From the end of the head to the end of the body. Time in which we ourselves do not read does not count."""
    write_seconds: float = 60.0
    """In which a client must take something of an answer that waits for it."""
    keep_alive_seconds: float = 75.0
    """How long a connection may rest after an answer."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a request asks for: the decoded path, and path and query as sent."""

    path: str
    raw: bytes
    query: bytes


_TWINS: Final = frozenset(
    name.replace(b"-", b"_")
    for name in (
        b"content-length",
        b"content-type",
        b"content-encoding",
        b"transfer-encoding",
        b"x-api-key",
        b"api-key",
        b"x-request-id",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-breakwater-run-id",
        b"x-breakwater-timeout-ms",
    )
)
WATCHED: Final = _TWINS | {b"host", b"content-length", b"transfer-encoding", b"upgrade", b"expect"}
"""The names (lower case) that `judge` wants to see."""

_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_HOST_BYTES: Final = 261  # 255 of a DNS name, a colon, five digits
_CACHED_BYTES: Final = 256
_AMBIGUOUS = re.compile(r"[\x00-\x1f\x7f\\]|%[0-9A-Fa-f]{2}")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")

_FRAMING_BYTES: Final = 16_384
_FRAMING_RATIO: Final = 8  # one-byte chunks need five


def judge(target: bytes, named: Headers, version: str, limits: Limits) -> Target | ProxyError:
    """Verdict on a head. `named`: the fields in `WATCHED`, lower-case names, in order. `version`: such as `1.1`."""
    host: bytes | None = None
    length: bytes | None = None
    coding: bytes | None = None
    for name, value in named:
        if name == b"host":
            if host is not None:
                return HOST_COUNT
            host = value
        elif name == b"content-length":
            if length is not None:
                return FRAMING
            length = value
        elif name == b"transfer-encoding":
            if coding is not None:
                return FRAMING
            coding = value.strip().lower()
        elif name == b"upgrade":
            return UPGRADE
        elif name in _TWINS:
            return UNDERSCORE
    if version != "1.1" and version != "1.0":
        return VERSION
    if coding is not None and (version == "1.0" or coding != b"chunked" or length is not None):
        return FRAMING_1_0 if version == "1.0" else FRAMING
    if host is None:
        if version == "1.1":
            return HOST_COUNT
    elif len(host) > _HOST_BYTES or not _is_host(host):
        return HOST_FORM
    if length is not None and int(length) > limits.body_bytes:
        return BODY_TOO_LARGE
    if len(target) > limits.url_bytes:
        return URL_TOO_LONG
    return _read_known(target) if len(target) <= _CACHED_BYTES else read_target(target)


@lru_cache(maxsize=256)
def _is_host(host: bytes) -> bool:
    return _HOST.fullmatch(host.strip()) is not None


def read_target(target: bytes) -> Target | ProxyError:
    """Splits and decodes an origin-form target."""
    if target[:1] != b"/" or target[:2] == b"//" or b"#" in target:
        return NOT_ORIGIN_FORM
    raw, _, query = target.partition(b"?")
    if _BAD_ESCAPE.search(raw):
        return AMBIGUOUS_PATH
    try:
        path = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        return AMBIGUOUS_PATH
    if _AMBIGUOUS.search(path):
        return AMBIGUOUS_PATH
    # `/..;x/` is a dot segment to servers that know path parameters.
    if any(segment.partition(";")[0] in (".", "..") for segment in path.split("/")):
        return AMBIGUOUS_PATH
    return Target(path, raw, query)


_read_known = lru_cache(maxsize=1024)(read_target)  # clients ask for a handful of targets, over and over


def head_size(target: bytes, headers: Headers) -> int:
    """Bytes of a head: its target, and each field with colon, blank and line end."""
    return len(target) + sum(len(name) + len(value) + 4 for name, value in headers)


class ChunkAudit:
    """Bounds what a chunked body carries beside its data: sizes, extensions, trailers.

    Two bounds per message: on the sum, in proportion to the data; and on what comes in a row without any data, which
    is how a trailer grows.
    """

    __slots__ = ("_barren", "_body", "_wire")

    def __init__(self, head: int) -> None:
        """`head`: bytes of the head, which came with the first read that is counted."""
        self._wire = self._barren = -head
        self._body = 0

    def exceeded(self, read: int, body: int) -> bool:
        """To be asked after each read, with its bytes, and the bytes of data in all reads so far."""
        self._wire += read
        self._barren = 0 if body != self._body else self._barren + read
        self._body = body
        return self._barren > _FRAMING_BYTES or self._wire - body > _FRAMING_BYTES + _FRAMING_RATIO * body
