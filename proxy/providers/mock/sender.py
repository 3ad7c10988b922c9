"""One answer after another onto one connection: at its pace, as far as its recipe goes, to the end it names.

    idle ──send──▶ waiting (delay) ──▶ sending ──▶ ended ──▶ idle | closing
                        ╰── the client leaves: the tally is told how far it got ──╯

A reset is a real RST: SO_LINGER 0 and abort, once the client's own kernel has every byte that was to come before it.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Callable
from typing import Final

from proxy.providers.mock.wire import Wire
from proxy.transport.answer import NEVER, End, Outcome, Serving

_LAST_WORDS_S: Final = 2.0
"""How long a refused client may take to read why, before the connection is closed under what it still sends."""
_LINGER_ZERO: Final = struct.pack("ii", 1, 0)
_LOOK_AGAIN_S: Final = 0.001
"""Between two looks at what the client's kernel has not acknowledged: nothing tells when that changes."""


class Sender:
    """Owned by a connection, which tells it what the loop tells the connection. `idle` is called after each answer."""

    __slots__ = (
        "_due", "_ending", "_idle", "_keep", "_last_words", "_loop", "_next", "_paused", "_serving", "_timer",
        "_transport", "_wire",
    )  # fmt: skip

    def __init__(self, transport: asyncio.Transport, idle: Callable[[], None]) -> None:
        self._transport = transport
        self._idle = idle
        self._loop = asyncio.get_running_loop()
        self._serving: Serving | None = None
        self._wire: Wire | None = None
        self._keep = True
        self._last_words = False
        self._next = 0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._ending: Outcome | None = None

    @property
    def busy(self) -> bool:
        """An answer is under way."""
        return self._serving is not None

    @property
    def ready(self) -> bool:
        """The next answer may be sent now."""
        return self._serving is None and not self._paused and not self._transport.is_closing()

    def send(self, serving: Serving, wire: Wire, *, keep: bool, last_words: bool = False) -> None:
        """Only when `ready`. `last_words`: the client may still be sending what will not be read."""
        self._serving = serving
        self._keep = keep
        self._last_words = last_words
        self._next = 0
        self._wire = None
        delay = serving.answer.delay
        if delay == NEVER:
            self._finish()
        elif delay > 0:
            self._timer = self._loop.call_later(delay, self._begin, wire)
        else:
            self._begin(wire)

    def reset(self) -> None:
        """Cuts the connection with an RST, whatever is under way."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None and not self._transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self._transport.abort()

    def lost(self) -> None:
        """The connection is gone."""
        self._stop_timer()
        if self._serving is not None:
            self._close_tally(Outcome.CUT if self._ending is Outcome.CUT else Outcome.GONE)

    def pause(self) -> None:
        """The client reads too slowly: the buffer is full."""
        self._paused = True

    def resume(self) -> None:
        """The buffer has drained."""
        self._paused = False
        if self._ending is not None:
            self._end()
        elif self._serving is None:
            self._idle()
        elif self._timer is None and self._wire is not None and self._next < len(self._wire.steps):
            self._tick()

    def _begin(self, wire: Wire) -> None:
        """Sends the head, and with it the whole body unless that is paced."""
        serving = self._serving
        assert serving is not None
        self._timer = None
        self._wire = wire
        head = wire.head
        if serving.request_id:
            head += b"x-request-id: " + serving.request_id + b"\r\n"
        head += b"\r\n" if self._keep else b"connection: close\r\n\r\n"
        if not wire.paced:
            self._transport.write(head + wire.whole)
            self._next = len(wire.steps)
            self._finish()
            return
        self._due = self._loop.time() + wire.delays[0]
        if wire.delays[0] > 0:
            self._transport.write(head)
            self._timer = self._loop.call_at(self._due, self._tick)
        else:
            self._tick(head)

    def _tick(self, ahead: bytes = b"") -> None:
        """Sends every step that is due. Called by the timer, and when a full buffer has drained."""
        self._timer = None
        if self._paused:
            return
        wire = self._wire
        assert wire is not None
        steps, delays = wire.steps, wire.delays
        at = self._next
        end = at + 1
        now = self._loop.time()
        while end < len(steps) and self._due + delays[end] <= now:
            self._due += delays[end]
            end += 1
        last = end == len(steps)
        data = steps[at] if end == at + 1 else b"".join(steps[at:end])
        self._next = end
        self._transport.write(ahead + data + wire.tail if last else ahead + data)
        if last:
            self._finish()
            return
        self._due += delays[end]
        self._timer = self._loop.call_at(self._due, self._tick)

    def _finish(self) -> None:
        """Everything is written that will be: what now, once the kernel has it?"""
        serving = self._serving
        assert serving is not None
        end = serving.answer.end
        if end is End.COMPLETE and not self._paused:
            self._close_tally(Outcome.FINISHED)
            if self._keep:
                self._idle()
            else:
                self._close()
        elif end is not End.STALL:
            self._ending = Outcome.FINISHED if serving.answer.whole else Outcome.CUT
            if end is End.RESET:
                self._transport.set_write_buffer_limits(0)  # paused until the last byte is with the kernel
            if not self._paused:
                self._end()

    def _end(self) -> None:
        """The kernel has the last byte."""
        self._timer = None
        serving, outcome = self._serving, self._ending
        assert serving is not None
        assert outcome is not None
        end = serving.answer.end
        if end is End.RESET and self._unacknowledged():
            self._timer = self._loop.call_later(_LOOK_AGAIN_S, self._end)  # a reset would take it back
            return
        self._ending = None
        self._close_tally(outcome)
        if end is End.RESET:
            self.reset()
        elif end is End.CLOSE or not self._keep:
            self._close()
        else:
            self._idle()

    def _unacknowledged(self) -> int:
        """Bytes that were written and that the client's kernel has not confirmed."""
        number = self._transport.get_extra_info("socket").fileno()
        return int(struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, b"\0\0\0\0"))[0])

    def _close(self) -> None:
        if not self._last_words:
            self._transport.close()
            return
        self._transport.write_eof()  # closing now would reset what the refused client has yet to read
        self._timer = self._loop.call_later(_LAST_WORDS_S, self._transport.close)

    def _close_tally(self, outcome: Outcome) -> None:
        serving = self._serving
        assert serving is not None
        self._serving = None
        serving.tally.close(self._next, outcome)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
