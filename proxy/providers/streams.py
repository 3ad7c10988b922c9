"""The stream contract: what a provider's event stream must look like, and what becomes of one that does not.

Events pass as they come. Per event one shallow decode (0.4 us) tells what matters: is it JSON at all, does it carry
usage, is it an error, is it the terminator. Nothing is re-encoded; where we asked for usage on our own account, the
usage chunk is left out and `,"usage":null` cut from the others.

A stream ends in exactly one of three ways::

    terminator    chat, completions: [DONE]      responses: response.completed | .incomplete | .failed
    error event   the provider's own, where clients of its API know it (see errors.StreamInterrupted)
    StreamInterrupted   it stopped early, died, stalled, or sent what is no event of the dialect
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from proxy.errors import StreamInterrupted, UpstreamBroken, UpstreamError, UpstreamTimeout
from proxy.providers.opening import MAX_HELD_BYTES, Promises, all_bring
from proxy.providers.refusals import interrupted, is_fault
from proxy.providers.reshape import lenient, without_null_usage
from proxy.tokens.usage import usage_of
from proxy.transport.base import Response
from proxy.transport.sse import EventTooLarge, Splitter, events
from proxy.types import Event, Headers, Usage

_ABSENT = msgspec.Raw(b"")
_LAST_NULL_USAGE = b',"usage":null}'
_DRAIN_SECONDS = 0.25
"""How long a finished stream may take to end its body too, so that its connection can serve again."""
NO_ERROR = frozenset({b"null", b"{}", b"[]", b'""', b"false", b"0"})
"""Values of an `error` member that mean none: servers send them with every chunk, and SDKs do not raise on them."""
_TERMINAL = frozenset({"response.completed", "response.incomplete", "response.failed"})


class _Chunk(msgspec.Struct):
    usage: msgspec.Raw = _ABSENT
    error: msgspec.Raw = _ABSENT
    choices: msgspec.Raw = _ABSENT


class _Typed(msgspec.Struct):
    type: str = ""
    error: msgspec.Raw = _ABSENT


class _Terminal(msgspec.Struct):
    class Body(msgspec.Struct):
        usage: msgspec.Raw = _ABSENT

    response: Body


_chunk = msgspec.json.Decoder(_Chunk).decode
_typed = msgspec.json.Decoder(_Typed).decode
_terminal = msgspec.json.Decoder(_Terminal).decode
_NOT_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


class Interrupted(Exception):
    """Internal: the event at hand ends the stream badly. `event` as in StreamInterrupted."""

    def __init__(self, message: str, event: bytes | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.event = event


class Verdict:
    """What one event means: bytes to pass on (b"" to leave it out), usage it told, whether it ends the stream."""

    __slots__ = ("failed", "last", "passed", "usage")

    def __init__(self, passed: bytes, usage: Usage | None = None, last: bool = False, failed: bool = False) -> None:
        """`failed`: it is an error, told by an event of the dialect's own."""
        self.passed = passed
        self.usage = usage
        self.last = last
        self.failed = failed


def judge_chunk(asked_usage: bool, raw: bytes, data: bytes) -> Verdict | None:
    """One event of a chat or legacy completion; None for the ordinary case: pass it as it is. Raises Interrupted."""
    _check_text(raw)
    if data.startswith(b"[DONE]"):
        return Verdict(raw, last=True)
    try:
        chunk = lenient(_chunk, data)
    except _NOT_JSON:
        raise Interrupted("The provider sent an event that is not valid JSON.") from None
    if chunk.error is not _ABSENT and bytes(chunk.error) not in NO_ERROR:
        raise _provider_error(raw, chunk.error)
    if chunk.usage is _ABSENT:
        return None
    if bytes(chunk.usage) == b"null":
        if not asked_usage:
            return None
        return Verdict(raw.replace(data, without_null_usage(data), 1))
    usage = usage_of(chunk.usage)
    drop = asked_usage and bytes(chunk.choices).strip(b"[] \n\r\t") in (b"", b"null")
    return Verdict(b"" if drop else raw, usage)


def pass_ordinary(asked_usage: bool, block: bytes) -> bytes | None:
    """What nearly every read brings, at a third of the price: one whole event, on one line, with nothing for us in it.

    The bytes to pass on; None for anything else, which is then judged event by event.
    """
    if not block.startswith(b"data: {") or not block.endswith(b"}\n\n") or block.find(b"\n") != len(block) - 2:
        return None
    data = block[6:-2]
    try:
        if not data.isascii():
            data.decode()
        chunk = _chunk(data)
    except _NOT_JSON:
        return None
    if chunk.error is not _ABSENT:
        return None
    if chunk.usage is _ABSENT:
        return block
    if asked_usage:
        return block[:-16] + b"}\n\n" if data.endswith(_LAST_NULL_USAGE) else None
    return block if bytes(chunk.usage) == b"null" else None


def judge_response_event(raw: bytes, data: bytes) -> Verdict | None:
    """One event of a response. Its own terminators end it; a `[DONE]` that a server adds does too."""
    _check_text(raw)
    if data.startswith(b"[DONE]"):
        return Verdict(raw, last=True)
    try:
        event = lenient(_typed, data)
        if event.type in _TERMINAL:
            usage = usage_of(lenient(_terminal, data).response.usage)
            return Verdict(raw, usage, last=True, failed=event.type == "response.failed")
    except _NOT_JSON:
        raise Interrupted("The provider sent an event that is not valid JSON.") from None
    if event.type == "error":
        raise Interrupted("The provider ended the stream with an error.", raw)
    if event.error is not _ABSENT and bytes(event.error) not in NO_ERROR:
        raise _provider_error(raw, event.error)
    return None


def _check_text(raw: bytes) -> None:
    """Raises Interrupted for what is no UTF-8, wherever in an event it stands: SDKs decode each line, and trip over it
    with an error that is none of theirs."""
    if not raw.isascii():
        try:
            raw.decode()
        except UnicodeDecodeError:
            raise Interrupted("The provider sent an event that is not valid UTF-8.") from None


def _provider_error(raw: bytes, error: msgspec.Raw) -> Interrupted:
    """An error object with members is raised by every SDK; any other form is not, and is replaced by ours."""
    text = bytes(error)
    raised = text[:1] == b"{" and text.strip(b"{} \n\r\t")
    return Interrupted("The provider ended the stream with an error.", raw if raised else None)


def _joined(held: list[Event]) -> Event:
    """Several pushes as one."""
    if len(held) == 1:
        return held[0]
    usage = next((event.usage for event in reversed(held) if event.usage is not None), None)
    return Event(b"".join([event.data for event in held]), usage, held[-1].terminator if held else 0)


class StreamReply:
    """A provider's event stream. `first()` must be awaited once before its events are taken."""

    too_long = None

    __slots__ = (
        "_begun",
        "_ended",
        "_failed",
        "_idle",
        "_judge",
        "_now",
        "_ordinary",
        "_promises",
        "_ready",
        "_response",
        "_scrub",
        "_splitter",
        "_terminated",
        "failed",
        "headers",
        "status",
        "upstream_request_id",
    )

    stream = True
    length: int | None = None

    def __init__(
        self,
        response: Response,
        headers: Headers,
        *,
        judge: Callable[[bytes, bytes], Verdict | None],
        ordinary: Callable[[bytes], bytes | None] | None = None,
        promises: Promises = all_bring,
        idle: float,
        terminated: bool,
        upstream_request_id: str,
        scrub: Callable[[bytes], bytes],
    ) -> None:
        """`judge(raw, data)` knows the dialect, and `ordinary(block)` a shorter way for its commonest event;
        `promises(data)` tells events that bring nothing yet; `idle` is the longest silence in seconds; `terminated`:
        the dialect has a terminator, without which a clean end is a broken one."""
        self.status = response.status
        self.headers = headers
        self.upstream_request_id = upstream_request_id
        self._response = response
        self._splitter = Splitter()
        self._judge = judge
        self._ordinary = ordinary
        self._promises = promises
        self._idle = idle
        self._terminated = terminated
        self._scrub = scrub
        self._now = asyncio.get_running_loop().time
        self._ready: Event | None = None
        self._begun = False
        """An event with content has come."""
        self._ended = False
        self.failed = False
        self._failed: StreamInterrupted | None = None

    async def first(self, deadline: float, start: bytes = b"") -> None:
        """Waits for the first event with content. What came before it waits with it, but for comments: we send our own.

        `start` of the body was read before. Once there was an event of any kind, `idle` holds as well.

        Raises UpstreamTimeout, UpstreamBroken, and StreamInterrupted for a stream that begins with an error.
        """
        held: list[Event] = []
        size, latest = 0, deadline
        while not (self._begun or self._ended or size > MAX_HELD_BYTES):
            piece, start = start or await self._response.read(deadline), b""
            if not piece:
                if not self._terminated:
                    self._ended = True
                    if self._splitter.rest:
                        held.append(Event(self._splitter.rest))
                    break
                raise UpstreamBroken("The provider ended its stream before the first event.", reason="closed")
            event = self._take(piece, opening=True)
            if event is not None:
                held.append(event)
                size += len(event.data)
            if held:
                deadline = min(latest, self._now() + self._idle)
            if self._failed is not None and not self._begun:
                raise self._failed
        if held or self._terminated:
            self._ready = _joined(held)

    @property
    def events(self) -> StreamReply:
        return self

    def __aiter__(self) -> StreamReply:
        return self

    async def __anext__(self) -> Event:
        if self._ready is not None:
            event, self._ready = self._ready, None
            return event
        while not self._ended:
            if self._failed is not None:
                raise self._failed
            try:
                piece = await self._response.read(self._now() + self._idle)
            except UpstreamTimeout as error:
                raise StreamInterrupted("The provider sent nothing for too long.") from error
            except UpstreamError as error:
                raise StreamInterrupted("The connection to the provider broke in the middle of the stream.") from error
            if not piece:
                return self._at_end()
            if self._ordinary is not None and self._splitter.idle and (passed := self._ordinary(piece)) is not None:
                return Event(passed)
            event_or_none = self._take(piece)
            if event_or_none is not None:
                return event_or_none
        await self._drain()
        raise StopAsyncIteration

    def _at_end(self) -> Event:
        if not self._terminated:
            self._ended = True
            if self._splitter.rest:  # without a dialect, the framing alone tells whether a body is whole
                return Event(self._splitter.rest)
            raise StopAsyncIteration
        if self._splitter.held:
            event = self._take(b"\n\n")  # some leave out the blank line behind the terminator, and SDKs then miss it
            if event is not None and self._ended:
                return event
        raise StreamInterrupted("The provider ended the stream before it was complete.")

    def _take(self, piece: bytes, *, opening: bool = False) -> Event | None:
        """The events that `piece` completes, as one push. A failure among them waits until those before it are out.

        `opening`: nothing was forwarded yet."""
        try:
            block = self._splitter.feed(piece)
        except EventTooLarge:
            self._failed = StreamInterrupted("The provider sent an event that is too large.")
            return None
        if not block:
            return None
        passed: list[bytes] = []
        changed = opening
        usage: Usage | None = None
        terminator = 0
        try:
            for raw, _, data in events(block):
                if data is None:
                    if not opening or self._begun:
                        if self._terminated:
                            _check_text(raw)
                        passed.append(raw)
                    continue
                verdict = self._judge(raw, data)
                if opening and not self._begun:
                    self._begun = self._begins(verdict, raw, data)
                if verdict is None:
                    passed.append(raw)
                    continue
                changed = True
                passed.append(verdict.passed)
                usage = verdict.usage or usage
                if verdict.last:
                    self._ended = True
                    self.failed = verdict.failed and is_fault(raw)
                    terminator = len(raw)
                    break
        except Interrupted as stop:
            changed = True
            self._failed = interrupted(stop.message, self._scrub(stop.event) if stop.event is not None else None)
        data_out = b"".join(passed) if changed else block
        return Event(data_out, usage, terminator) if data_out or usage else None

    def _begins(self, verdict: Verdict | None, raw: bytes, data: bytes) -> bool:
        """Whether an event that nothing with content went before brings some. Raises Interrupted."""
        if verdict is not None and verdict.failed:
            raise Interrupted("The provider answered with an error.", raw)
        if verdict is not None and (verdict.last or not verdict.passed):
            return False
        return not self._promises(data)

    async def _drain(self) -> None:
        """After the terminator: lets the body end, so that the connection is reusable. What still comes is ignored."""
        deadline = self._now() + _DRAIN_SECONDS
        try:
            while await self._response.read(deadline):
                pass
        except UpstreamError:
            pass

    async def aclose(self) -> None:
        await self._response.aclose()
