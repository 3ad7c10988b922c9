"""One connection to a Redis server: commands go out in order, answers come back in order, nobody can break the order.

The caller of a command waits on a future of its own. A caller that is cancelled leaves its command in the queue, and
the answer to it is dropped when it comes: so no answer ever reaches anybody but whoever asked. A connection on which
something went wrong (no answer in time, an answer that cannot be read) is closed and never used again.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Protocol

import hiredis

Words = tuple[bytes | str | int, ...]
"""A command's name and arguments."""

_MORE: Final = object()
LATE_SECONDS: Final = 0.002
"""A timeout is judged once more after this: when our own loop was held up, the answer may lie in the socket unread."""


class Fault(Exception):
    """An error that the server answered. Of its text only a code is kept, and where a redirection points to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        words = text.split(" ", 3)
        self.code = words[0]
        if self.code == "ERR" and (inner := _INNER.search(text)):
            self.code = inner[0]  # Redis 6.2 wraps what a command in a script answered
        self.target = words[2] if self.code == "MOVED" and len(words) > 2 else ""
        """`host:port`; an empty host means the server that said so."""


_INNER: Final = re.compile(
    r"\b(?:OOM|WRONGTYPE|READONLY|MISCONF|NOREPLICAS|LOADING|CLUSTERDOWN|MASTERDOWN|BUSY|NOPERM)\b"
)


def pack(words: Words) -> bytes:
    """As the protocol wants it. Raises UnicodeEncodeError for text that has no UTF-8."""
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # its stub takes tuples of length one
    return packed


class Command:
    """Something to send, and who waits for its answer."""

    __slots__ = ("answer", "packed", "since", "tries", "words")

    def __init__(self, words: Words, answer: asyncio.Future[Any], since: float) -> None:
        self.words = words
        self.packed = pack(words)  # here, so that a word that cannot be sent is the error of its caller alone
        self.answer = answer
        self.since = since
        """Loop time at which the wait began. A second try does not begin it anew."""
        self.tries = 0


class Owner(Protocol):
    """Who is told what a connection brings."""

    def answered(self, connection: Connection, command: Command, answer: Any) -> None:
        """`answer` is what the server said; a `Fault` for an error."""

    def broken(self, connection: Connection, unanswered: Sequence[Command], *, late: bool) -> None:
        """The connection is over. `late`: because an answer did not come in time."""


class Connection(asyncio.Protocol):
    """`timeout`: seconds that the oldest unanswered command may wait."""

    def __init__(self, owner: Owner, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        self.owner = owner
        self._loop = loop
        self.timeout = timeout
        self._reader = hiredis.Reader(replyError=Fault, notEnoughData=_MORE)
        self._waiting: deque[Command] = deque()
        self._transport: asyncio.WriteTransport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.over = False

    def send(self, commands: Sequence[Command]) -> None:
        """Writes all of them at once."""
        assert self._transport is not None
        self._waiting.extend(commands)
        self._transport.write(b"".join([command.packed for command in commands]))
        if self._timer is None:
            self._timer = self._loop.call_at(commands[0].since + self.timeout, self._judge, False)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def abort(self, *, late: bool = False) -> None:
        """Closes at once, and gives back what was not answered. Idempotent."""
        if self.over:
            return
        self.over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        unanswered = list(self._waiting)
        self._waiting.clear()
        self.owner.broken(self, unanswered, late=late)

    # -- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # of a stream, so it can be written to

    def data_received(self, data: bytes) -> None:
        reader, waiting = self._reader, self._waiting
        try:
            reader.feed(data)
            while not self.over:
                answer = reader.gets()
                if answer is _MORE:
                    break
                if not waiting:
                    self.abort()  # an answer that nobody asked for: the order is lost
                    return
                self.owner.answered(self, waiting.popleft(), answer)
        except hiredis.ProtocolError:
            self.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.abort()

    # -- time --------------------------------------------------------------------------------------------------------

    def _judge(self, again: bool) -> None:
        """One timer for all that wait: it looks at the oldest, and comes back for the next."""
        self._timer = None
        if not self._waiting:
            return
        due = self._waiting[0].since + self.timeout
        if self._loop.time() < due:
            self._timer = self._loop.call_at(due, self._judge, False)
        elif again:
            self.abort(late=True)
        else:
            self._timer = self._loop.call_later(LATE_SECONDS, self._judge, True)
