"""From bytes to requests: a parser with bounds. Sans-IO, so that it can be fed anything, split anywhere.

    IDLE ──first byte──▶ HEAD ──sink.begin──▶ BODY ──sink.body…, sink.complete──▶ IDLE

`httptools` bounds nothing, and copies a field again for every read that it takes: a field that never ends costs the
square of its length. So the bytes of a head are counted over its reads, and a head that comes in one read is measured
when it is complete. What is held is at most the bound and one read.
"""

from __future__ import annotations

from typing import Final, NoReturn, Protocol

import httptools

from proxy.edge.head import WATCHED, ChunkAudit, Limits, Target, head_size, judge
from proxy.edge.refusals import BODY_TOO_LARGE, CHUNK_FRAMING, HEAD_TOO_LARGE, MALFORMED, TOO_MANY_HEADERS
from proxy.errors import ProxyError
from proxy.types import Headers

IDLE: Final = 0
HEAD: Final = 1
BODY: Final = 2


class Stop(Exception):
    """Leaves the parser from within one of its callbacks, which turns it into an error of its own."""


class Sink(Protocol):
    """Takes what was read. May raise Stop: then nothing more is read, and `feed` returns MALFORMED."""

    def begin(self, method: str, version: str, target: Target, keep_alive: bool) -> None:
        """A head is complete and good. Its fields are in the reader's `headers`."""

    def body(self, data: bytes) -> None: ...

    def complete(self) -> None: ...


class Reader:
    """One connection's requests, one after the other. After a fault it reads nothing more."""

    __slots__ = (
        "_audit",
        "_begun",
        "_coded",
        "_fault",
        "_fields",
        "_head_more",
        "_limits",
        "_named",
        "_parser",
        "_read",
        "_sink",
        "_url",
        "body_bytes",
        "expects_continue",
        "headers",
        "phase",
    )

    def __init__(self, sink: Sink, limits: Limits) -> None:
        self._sink = sink
        self._limits = limits
        self._parser = httptools.HttpRequestParser(self)
        # What follows a request that closes its connection is ignored, not an error.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.phase = IDLE
        self.headers: Headers = []
        """Fields of the latest head, as far as they came: lower-case names, in order."""
        self.body_bytes = 0
        """Of the latest body, so far."""
        self.expects_continue = False
        self._fault: ProxyError | None = None
        self._url = b""
        self._fields: Headers = []  # where the parser's next field goes
        self._named: Headers = []  # the fields that decide about the head
        self._coded = False
        self._audit: ChunkAudit | None = None
        self._read = 0  # bytes of the read in hand
        self._begun = 0  # messages that began in it
        self._head_more = 0  # bytes of the later reads of a head that did not come in one

    def feed(self, data: bytes) -> ProxyError | None:
        """Returns what is wrong, if anything: with the head (`phase` is not BODY) or the body of the latest request.

        CHUNK_FRAMING is about the body, even if that is complete.
        """
        phase = self.phase
        self._read = len(data)
        self._begun = 0
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            return self._fault or MALFORMED
        if self._audit is not None and self._audit_exceeded(phase):
            return CHUNK_FRAMING
        if self.phase == HEAD:
            if phase == HEAD and self._begun == 0:
                self._head_more += self._read
            if self._head_more > self._limits.head_bytes:
                return HEAD_TOO_LARGE
        return None

    def _audit_exceeded(self, phase: int) -> bool:
        """A read with bytes of several messages is let by, bounded as it is: only the parser knows where they meet."""
        audit = self._audit
        assert audit is not None
        if self.phase != BODY:
            self._audit = None
        mixed = self._begun > (1 if phase == IDLE else 0)
        return not mixed and audit.exceeded(self._read, self.body_bytes)

    def close(self) -> None:
        """Lets go of the parser and the sink, which hold on to this object: nothing is left for the collector."""
        del self._parser, self._sink

    # --- the parser's callbacks -------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self.phase = HEAD
        self.headers = self._fields = []
        self.expects_continue = False
        self._url = b""
        self._named = []
        self._coded = False
        self._begun += 1
        self._head_more = 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in WATCHED:
            self._named.append((name, value))
            if name == b"transfer-encoding":
                self._coded = True
            elif name == b"expect" and value.lower() == b"100-continue":
                self.expects_continue = True
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        limits = self._limits
        parser = self._parser
        if len(self.headers) > limits.header_count:
            self._stop(TOO_MANY_HEADERS)
        in_one_read = self._begun > 0 and self._read <= limits.head_bytes
        if not in_one_read and head_size(self._url, self.headers) > limits.head_bytes:
            self._stop(HEAD_TOO_LARGE)
        version = parser.get_http_version()
        target = judge(self._url, self._named, version, limits)
        if isinstance(target, ProxyError):
            self._stop(target)
        if parser.should_upgrade():
            self._stop(MALFORMED)  # CONNECT: what follows it is not HTTP
        self.phase = BODY
        self.body_bytes = 0
        self._audit = ChunkAudit(head_size(self._url, self.headers)) if self._coded else None
        # What comes by `on_header` from now on is a trailer: nobody reads one, and it must never pass for a header.
        self._fields = []
        keep_alive = version == "1.1" and parser.should_keep_alive()
        self._sink.begin(parser.get_method().decode("ascii"), version, target, keep_alive)

    def on_body(self, data: bytes) -> None:
        self.body_bytes += len(data)
        if self.body_bytes > self._limits.body_bytes:
            self._stop(BODY_TOO_LARGE)
        self._sink.body(data)

    def on_message_complete(self) -> None:
        self.phase = IDLE
        self._sink.complete()

    def _stop(self, fault: ProxyError) -> NoReturn:
        self._fault = fault
        raise Stop
