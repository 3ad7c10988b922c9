"""Lines to a file descriptor, from a loop that must never wait for it.

`write` appends to a list under a lock that is held for a microsecond. A thread of its own takes the list at most
`delay` seconds later and writes it in one call: one wake-up per batch, never per line. What does not fit into
`capacity_bytes` is dropped and counted, and a line says so once there is room again. When the reader is gone for good
(a broken pipe) everything is dropped and counted; a full disk costs what was written while it was full.
"""

from __future__ import annotations

import errno
import io
import os
import select
import threading
from collections.abc import Callable
from typing import IO, Any, Final

_PER_LINE: Final = 64
"""What a waiting line costs beyond its bytes."""

_GONE: Final = frozenset((errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ENOTCONN))


class LineWriter:
    """`notice(count)` gives the line that reports dropped lines. Every line ends with its own newline.

    A stream without a descriptor (a capturing test runner's) is written as text. `close` does not close the stream.
    Safe in any thread, and from a destructor: the lock is reentrant, because collecting garbage inside it can log.
    """

    def __init__(
        self,
        stream: IO[Any],
        notice: Callable[[int], bytes],
        *,
        capacity_bytes: int = 8 << 20,
        batch_bytes: int = 64 << 10,
        delay: float = 0.05,
    ) -> None:
        self.dropped = 0
        """Lines lost so far."""
        self._stream = stream
        self._fd = _descriptor(stream)
        self._notice = notice
        self._capacity = capacity_bytes
        self._batch = batch_bytes
        self._delay = delay
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._drained = threading.Condition(self._lock)
        self._lines: list[bytes] = []
        self._pending = 0  # bytes, those being written included
        self._idle = False
        self._hurry = False
        self._closing = False
        self._gone = False
        self._noticed = 0
        self._notice_due = False
        self._mid_line = False
        self._thread: threading.Thread | None = None

    def write(self, line: bytes, *, urgent: bool = False) -> None:
        """Never blocks and never raises. `urgent` lines, and all before them, are written at once."""
        cost = len(line) + _PER_LINE
        with self._lock:
            if self._gone or self._closing:
                self.dropped += 1
                return
            if self._thread is None:
                self._start()
            if self._pending + cost > self._capacity:
                self.dropped += 1
                self._notice_due = True
            else:
                self._lines.append(line)
                self._pending += cost
            if (urgent or self._pending >= self._batch) and not self._hurry:
                self._hurry = True
                self._work.notify()
            elif self._idle:
                self._work.notify()
            self._idle = False

    def flush(self, timeout: float = 2.0) -> bool:
        """Waits (blocking) until all is written, at most `timeout` seconds; False if it was not."""
        with self._lock:
            self._hurry = True
            self._work.notify()
            return self._drained.wait_for(lambda: not self._pending, timeout)

    def close(self, timeout: float = 2.0) -> bool:
        """Writes what is left (blocking), at most `timeout` seconds. Lines that come later are dropped. Idempotent."""
        with self._lock:
            self._closing = True
            self._work.notify()
            thread = self._thread
        if thread is not None:
            thread.join(timeout)
        with self._lock:
            if self._fd is not None and (thread is None or not thread.is_alive()):
                os.close(self._fd)
                self._fd = None
            return not self._pending

    def _start(self) -> None:
        """Not at construction: whoever only prints a version starts no thread. Out of threads: the next line tries."""
        thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return
        self._thread = thread

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._lines or (self._notice_due and not self._gone) or self._closing):
                    self._idle = True
                    self._work.wait()
                self._idle = False
                if not (self._hurry or self._closing):
                    self._work.wait_for(lambda: self._hurry or self._closing, self._delay)
                lines, self._lines = self._lines, []
                count = 0 if self._gone else self.dropped - self._noticed
                self._hurry = self._notice_due = False
                last = self._closing
            if lines or count:
                self._put(lines, count)
            if last:
                return

    def _put(self, lines: list[bytes], dropped: int) -> None:
        """Writes one batch and does the sums, whatever became of it."""
        data = b"".join(lines)
        if dropped:
            data += self._notice(dropped)
        if self._mid_line:
            data = b"\n" + data
        written, gone = self._push(data)
        lost = 0
        if written < len(data):
            whole = data.count(b"\n", 0, written) - self._mid_line if written else 0
            lost = max(0, len(lines) - max(0, whole))
            if written:
                self._mid_line = data[written - 1 : written] != b"\n"
        else:
            self._mid_line = False
        with self._lock:
            self._gone = self._gone or gone
            self._pending -= len(lines) * _PER_LINE + sum(map(len, lines))
            self.dropped += lost
            if written == len(data):
                self._noticed += dropped
            self._drained.notify_all()

    def _push(self, data: bytes) -> tuple[int, bool]:
        """Bytes that were written, and whether the reader is gone for good."""
        if self._fd is None:
            return self._push_text(data)
        written = 0
        view = memoryview(data)
        while written < len(data):
            try:
                written += os.write(self._fd, view[written:])
            except BlockingIOError:  # Somebody who shares this terminal or pipe made it non-blocking.
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError as exc:
                return written, exc.errno in _GONE
        return written, False

    def _push_text(self, data: bytes) -> tuple[int, bool]:
        try:
            self._stream.write(data.decode("utf-8", "replace"))
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream is closed.
            return 0, True
        return len(data), False


def _descriptor(stream: IO[Any]) -> int | None:
    try:
        stream.flush()
        # A copy, because it is ours to close: the number of a closed descriptor may be a client's socket by now.
        return os.dup(stream.fileno())
    except (OSError, ValueError, AttributeError, io.UnsupportedOperation):
        return None
