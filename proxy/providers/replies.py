"""Replies that are no event streams: one body at once, or bytes passed through."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

from proxy.errors import UpstreamBroken
from proxy.providers.headers import by_name
from proxy.providers.refusals import Meaning, too_long_in
from proxy.transport.base import Response
from proxy.types import Event, Headers, TooLong, Usage

MAX_BODY_BYTES = 128 * 1024 * 1024
"""Of one plain reply. The largest legitimate one known: 2,048 embeddings of 3,072 floats, 75 MiB as text."""


_BLANKS: Final = 65_536
_COUNTED_BYTES: Final = 16 * 1024 * 1024
"""Of a body that is passed through: of a larger one nobody reads what it says of its usage. Four large images."""


def content_coding(named: Mapping[bytes, bytes]) -> bytes:
    """How the body is compressed; b"" when it is not."""
    if b"content-encoding" not in named:
        return b""
    coding = named[b"content-encoding"].strip().lower()
    return b"" if coding == b"identity" else coding


async def first_piece(response: Response, deadline: float) -> bytes:
    """The body up to where it shows what it is: some servers send blanks first. b"" when there is none."""
    start = b""
    while not start.strip() and len(start) < _BLANKS:
        piece = await response.read(deadline)
        if not piece:
            break
        start += piece
    return start


async def read_whole(response: Response, deadline: float, limit: int = MAX_BODY_BYTES, *, start: bytes = b"") -> bytes:
    """The whole body, decompressed. `start` of it was read before.

    Raises UpstreamBroken (too_large, encoding, …) and UpstreamTimeout.
    """
    piece = start or await response.read(deadline)
    pieces = []
    size = 0
    while piece:
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise UpstreamBroken("The provider's reply is too large.", reason="too_large")
        piece = await response.read(deadline)
    body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    coding = content_coding(by_name(response.headers))
    return _inflate(body, coding, limit) if coding else body


def _inflate(body: bytes, coding: bytes, limit: int) -> bytes:
    """We ask for `identity`; a server that compresses all the same mostly uses gzip."""
    if coding not in (b"gzip", b"x-gzip", b"deflate"):
        raise UpstreamBroken("The provider used a content encoding that was not asked for.", reason="encoding")
    inflater = zlib.decompressobj(wbits=47)
    try:
        plain = inflater.decompress(body, limit)
    except zlib.error as error:
        raise UpstreamBroken("The provider's compressed reply is damaged.", reason="encoding") from error
    if inflater.unconsumed_tail:
        raise UpstreamBroken("The provider's reply is too large.", reason="too_large")
    if not inflater.eof:
        raise UpstreamBroken("The provider's compressed reply is damaged.", reason="encoding")
    return plain


class PlainReply:
    """One whole body: exactly one event. The connection is free already."""

    failed = False
    __slots__ = (
        "_event",
        "body",
        "headers",
        "length",
        "meaning",
        "status",
        "stream",
        "upstream_request_id",
    )

    def __init__(
        self,
        status: int,
        headers: Headers,
        body: bytes,
        *,
        usage: Usage | None = None,
        upstream_request_id: str = "",
        terminator: int = 0,
        meaning: Meaning | None = None,
    ) -> None:
        """`terminator`: the body is a finished event stream (a plain answer to a wish for one) that ends in a
        terminator of so many bytes. `meaning`: of a refusal, what is wrong."""
        self.status = status
        self.headers = headers
        self.stream = terminator > 0
        self.length = None if terminator else len(body)
        self.upstream_request_id = upstream_request_id
        self.body = body
        self.meaning = meaning
        self._event: Event | None = Event(body, usage, terminator, last=True)

    @property
    def events(self) -> PlainReply:
        return self

    def __aiter__(self) -> PlainReply:
        return self

    @property
    def too_long(self) -> TooLong | None:
        return too_long_in(self.body) if self.meaning == "context_length" else None

    async def __anext__(self) -> Event:
        event, self._event = self._event, None
        if event is None:
            raise StopAsyncIteration
        return event

    async def aclose(self) -> None:
        """Nothing is held."""


class RawReply:
    """Bytes passed through as they come, of any type and size. Only its framing tells a whole body from a cut one."""

    stream = False
    too_long = None
    failed = False

    def __init__(
        self,
        response: Response,
        headers: Headers,
        *,
        idle: float,
        upstream_request_id: str,
        usage_in: Callable[[bytes], Usage | None] | None = None,
    ) -> None:
        """`usage_in` reads the usage out of the whole body, which is kept for it while it passes; None: nobody asks."""
        self.status = response.status
        self.headers = headers
        self.upstream_request_id = upstream_request_id
        length = by_name(response.headers).get(b"content-length", b"")
        # Without a body, a length tells of another answer (304) or must not be there (204).
        self.length = int(length) if length.isdigit() and self.status not in (204, 304) else None
        self._response = response
        self._idle = idle
        self._now = asyncio.get_running_loop().time
        self._usage_in = usage_in
        self._kept: list[bytes] = []
        self._size = 0

    @property
    def events(self) -> AsyncIterator[Event]:
        return self

    def __aiter__(self) -> RawReply:
        return self

    async def __anext__(self) -> Event:
        piece = await self._response.read(self._now() + self._idle)
        if self._usage_in is not None:
            self._size += len(piece)
            self._kept.append(piece)
            if self._size > _COUNTED_BYTES:
                self._usage_in = None
                self._kept.clear()
            elif not piece or self._size == self.length:
                usage, self._usage_in = self._usage_in(b"".join(self._kept)), None
                self._kept.clear()
                if piece or usage is not None:
                    return Event(piece, usage)  # an empty one at the end of a body whose length nobody knew
        if not piece:
            raise StopAsyncIteration
        return Event(piece)

    async def aclose(self) -> None:
        await self._response.aclose()
