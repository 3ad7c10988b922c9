"""Server-sent events, sans IO: bytes in, whole events out.

The grammar (WHATWG HTML, section 9.2)::

    stream = [BOM] event*          field line = name [":" [" "] value] EOL
    event  = line* EOL             comment    = ":" anything EOL
    EOL    = CR LF | LF | CR

A read brings whatever the network made of it: half an event, a CR without its LF, forty events at once. `Splitter` cuts
the stream behind the last complete event of each read and keeps the rest, so that what is passed on is always whole and
what is held is never more than one incomplete event. Bytes are never changed here.

A blank line that ends in CR may be the first half of a CRLF. Unless a lone CR has been used as a line end before
(`\\r\\r`), the cut waits for the next byte; otherwise the LF would be left to lead the next block, which is harmless to
every parser but would put a stray byte behind a terminator.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_EVENT_BYTES = 16 * 1024 * 1024
"""An event larger than this is not a model's: image events are the largest seen, at a few MiB."""

_BOUNDARY = re.compile(rb"\n\n|\n\r\n|\r\r\n|\r\r|\n\r(?=[^\n])")
_BOM = b"\xef\xbb\xbf"


class EventTooLarge(Exception):
    """An event grew beyond `MAX_EVENT_BYTES` without ending."""


class Splitter:
    """Cuts a byte stream behind its last complete event. `feed` is linear in the bytes fed, whatever their pieces."""

    __slots__ = ("_held", "_started", "idle")

    def __init__(self) -> None:
        self._held = bytearray()
        self._started = False
        self.idle = False
        """The last read ended where an event ended: a read that is whole events needs no `feed`."""

    def feed(self, piece: bytes) -> bytes:
        """All events completed by `piece`, as one block of bytes; b"" when none is. Raises EventTooLarge."""
        if not self._started:
            self._started = True
            self._held += piece
            if len(self._held) < 3 and _BOM.startswith(self._held):
                self._started = False
                return b""
            if self._held.startswith(_BOM):
                # The official Python SDK silently loses the first chunk behind a byte order mark.
                del self._held[:3]
            piece, self._held = bytes(self._held), bytearray()
        if not self._held and piece.endswith(b"\n\n"):
            self.idle = True
            return piece
        block = self._cut(piece)
        self.idle = not self._held
        return block

    def _cut(self, piece: bytes) -> bytes:
        held = self._held
        searched = max(len(held) - 3, 0)
        held += piece
        end = _last_boundary(held, searched)
        if end < 0:
            if len(held) > MAX_EVENT_BYTES:
                raise EventTooLarge
            return b""
        block = bytes(held[:end])
        del held[:end]
        return block

    @property
    def rest(self) -> bytes:
        """The bytes behind the last complete event."""
        return bytes(self._held)

    @property
    def held(self) -> bytes:
        """The incomplete event at the end, if any. Line ends alone are none."""
        return self.rest.strip(b"\r\n")


def _last_boundary(data: bytearray, start: int) -> int:
    """Where the last complete event ends, or -1. Only boundaries that end behind `start` count."""
    if data.find(b"\r", start) < 0 and not (start and data[start - 1] == 0x0D):
        found = data.rfind(b"\n\n", start)
        return found + 2 if found >= 0 else -1
    end = -1
    for match in _BOUNDARY.finditer(data, start):
        end = match.end()
    return end


def events(block: bytes) -> Iterator[tuple[bytes, bytes, bytes | None]]:
    """Each event of a block as `(raw, name, data)`.

    `raw` are its bytes with its blank line, `name` its `event:` field (b"" when absent), `data` its data lines joined
    with LF, or None when it has none (comments, `id:`, `retry:`). The raws joined are the block.
    """
    if block.startswith(b"data: ") and block.endswith(b"\n\n") and b"\r" not in block:
        # What nearly every provider sends: one data line an event.
        start = 0
        while start < len(block):
            end = block.find(b"\n\n", start) + 2
            if end == 1:  # an odd line end behind the last event
                yield block[start:], b"", None
                return
            line = block[start : end - 2]
            if b"\n" in line or not line.startswith(b"data: "):
                yield _parse(block[start:end])
            else:
                yield block[start:end], b"", line[6:]
            start = end
        return
    start = 0
    for match in _BOUNDARY.finditer(block):
        yield _parse(block[start : match.end()])
        start = match.end()
    if start < len(block):
        yield _parse(block[start:])


def _parse(raw: bytes) -> tuple[bytes, bytes, bytes | None]:
    name = b""
    data: list[bytes] = []
    for line in raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    return raw, name, b"\n".join(data) if data else None
