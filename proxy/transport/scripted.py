"""A transport without a network: requests go to a `Handler` in this process.

It is the fake that ships with the transport port, and what the provider kind `mock` runs on. Its answers keep the
port's promises to the letter: deadlines on the loop's clock, UpstreamTimeout where nothing came, UpstreamBroken where
the body cannot be completed, cancellation at every await. As on a real wire, steps fall due on their own schedule: a
reader that was slow finds the next ones waiting.
"""

from __future__ import annotations

import asyncio

from proxy.errors import ConnectFailed, UpstreamBroken, UpstreamTimeout
from proxy.transport.answer import NEVER, End, Handler, Outcome, Serving
from proxy.transport.base import Request
from proxy.types import Headers

_BROKEN = {
    End.RESET: ("The upstream reset the connection.", "reset"),
    End.CLOSE: ("The upstream closed the connection before its answer was complete.", "closed"),
}


class ScriptedTransport:
    """One per handler. Has no pool and no limit; `aclose` breaks what is under way and refuses what comes after."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._lines: set[_Line] = set()
        self._closed = False

    async def send(self, request: Request, deadline: float) -> ScriptedResponse:
        if self._closed:
            raise ConnectFailed("The transport is closed.", reason="network")
        serving = self._handler.handle(request.method, request.target, request.headers, request.body)
        line = _Line(serving, self._lines)
        try:
            await line.head(deadline)
        except BaseException:  # cancellation included: whoever leaves here leaves nothing behind
            line.hang_up()
            raise
        return ScriptedResponse(serving, line, bodiless=request.method == b"HEAD")

    async def aclose(self) -> None:
        self._closed = True
        for line in list(self._lines):
            line.break_off()


class ScriptedResponse:
    __slots__ = ("_line", "headers", "status")

    def __init__(self, serving: Serving, line: _Line, *, bodiless: bool) -> None:
        answer = serving.answer
        headers: Headers = list(answer.headers)
        if serving.request_id:
            headers.append((b"x-request-id", serving.request_id))
        if answer.length is None:
            headers.append((b"transfer-encoding", b"chunked"))
        else:
            headers.append((b"content-length", b"%d" % answer.length))
        self.status = answer.status
        self.headers = headers
        self._line = line
        if bodiless:
            line.finish()

    async def read(self, deadline: float) -> bytes:
        line = self._line
        try:
            return await line.next(deadline)
        except UpstreamTimeout:
            line.hang_up()
            raise

    async def aclose(self) -> None:
        self._line.hang_up()


class _Line:
    """The way from one serving to its reader: which step is next, when it is due, and how it ended."""

    __slots__ = ("_complete", "_due", "_error", "_lines", "_loop", "_next", "_serving", "_waiting")

    def __init__(self, serving: Serving, lines: set[_Line]) -> None:
        self._serving = serving
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time()
        self._next = 0
        self._complete = False
        self._error: tuple[str, str] | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._lines = lines
        lines.add(self)

    async def head(self, deadline: float) -> None:
        answer = self._serving.answer
        if answer.delay == NEVER:
            await self._ended(deadline)
        await self._until(self._due + answer.delay, deadline)

    async def next(self, deadline: float) -> bytes:
        """The next step's bytes; b"" when the body is complete."""
        if self._complete:
            return b""
        answer = self._serving.answer
        if self._error is None and self._next < len(answer.steps):
            delay, data = answer.steps[self._next]
            await self._until(self._due + delay, deadline)
            self._next += 1
            return data
        return await self._ended(deadline)

    def finish(self) -> None:
        self._complete = True
        self._leave(Outcome.FINISHED)

    def hang_up(self) -> None:
        """The reader is gone. Idempotent, also after the end."""
        if self._error is None and not self._complete:
            self._error = ("The response was closed.", "closed")
            self._leave(Outcome.GONE)

    def break_off(self) -> None:
        """The transport is closing: wakes the reader, if one waits, to an error."""
        self.hang_up()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def _ended(self, deadline: float) -> bytes:
        end = self._serving.answer.end
        if self._error is None:
            if self._serving.answer.whole:
                self.finish()
                return b""
            if end is End.STALL:
                await self._until(NEVER, deadline)
            self._error = _BROKEN[end]
            self._leave(Outcome.CUT)
        raise UpstreamBroken(self._error[0], reason=self._error[1])

    async def _until(self, due: float, deadline: float) -> None:
        """Waits until `due`. Raises UpstreamTimeout at `deadline` if that is earlier, UpstreamBroken once closed."""
        if due > deadline:
            await self._sleep(deadline)
            if self._error is None:
                raise UpstreamTimeout("The upstream sent nothing in time.")
        elif due > self._loop.time():
            await self._sleep(due)
        else:
            await asyncio.sleep(0)  # a turn of the loop for each read, as a socket would take
        if self._error is not None:
            raise UpstreamBroken(self._error[0], reason=self._error[1])
        self._due = due

    async def _sleep(self, when: float) -> None:
        self._waiting = self._loop.create_future()
        timer = self._loop.call_at(when, _wake, self._waiting) if when != NEVER else None
        try:
            await self._waiting
        finally:
            self._waiting = None
            if timer is not None:
                timer.cancel()

    def _leave(self, outcome: Outcome) -> None:
        self._lines.discard(self)
        self._serving.tally.close(self._next, outcome)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
