"""Text as a reader would see it: JSON, URL and `\\x` escapes undone, with the way back to the original positions.

A secret that was quoted once or twice on its way into a message (`sk\\u002dabc`, `a%2Fb`, JSON inside JSON) is found
in the undone text and replaced in the original. Each round undoes one layer.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

Span = tuple[int, int]

_ROUNDS: Final = 3

_ESCAPE: Final = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}"
    rb"|%[0-9a-fA-F]{2}|\\[\"'\\/bfnrt]"
)
_SHORT: Final = {ord("b"): b"\b", ord("f"): b"\f", ord("n"): b"\n", ord("r"): b"\r", ord("t"): b"\t"}


class View:
    """One reading of a text."""

    __slots__ = ("_ends", "_sources", "_starts", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._starts: list[int] = []
        """Where each undone escape stands in `data`; `_ends` one past it, `_sources` its own place in the text below:
        first byte and one past the last."""
        self._ends: list[int] = []
        self._sources: list[Span] = []

    def undone(self) -> View | None:
        """The same with one layer of escapes less; None if there are none."""
        found = list(_ESCAPE.finditer(self.data))
        if not found:
            return None
        pieces: list[bytes] = []
        below = at = 0
        view = View(b"")
        for match in found:
            start, end = match.span()
            plain = _undo(match.group())
            pieces += (self.data[below:start], plain)
            at += start - below
            view._starts.append(at)
            at += len(plain)
            view._ends.append(at)
            view._sources.append((start, end))
            below = end
        pieces.append(self.data[below:])
        view.data = b"".join(pieces)
        return view

    def below(self, span: Span) -> Span:
        """Where `span` of this reading stands in the one it was made from. Half an escape counts as a whole one."""
        return self._place(span[0], last=False), self._place(span[1] - 1, last=True)

    def _place(self, at: int, *, last: bool) -> int:
        """Of the byte at `at`: its position below, or with `last` one past it."""
        index = bisect_right(self._starts, at) - 1
        if index < 0:
            return at + last
        if at < self._ends[index]:
            return self._sources[index][last]
        return self._sources[index][1] + at - self._ends[index] + last


def views(data: bytes) -> Iterator[tuple[bytes, list[View]]]:
    """The text as it is, then with its escapes undone, layer by layer; with each the views to go back through."""
    yield data, []
    view, way = View(data), list[View]()
    for _ in range(_ROUNDS):
        if b"\\" not in view.data and b"%" not in view.data:
            return
        deeper = view.undone()
        if deeper is None:
            return
        view = deeper
        way = [view, *way]
        yield view.data, way


def original(span: Span, way: list[View]) -> Span:
    for view in way:
        span = view.below(span)
    return span


def _undo(escape: bytes) -> bytes:
    if escape[0:1] == b"%":
        return bytes((int(escape[1:], 16),))
    kind = escape[1]
    if kind == ord("u"):
        units = bytes.fromhex(escape.replace(rb"\u", b"").decode())
        return units.decode("utf-16-be", "surrogatepass").encode("utf-8", "surrogatepass")
    if kind == ord("x") and len(escape) == 4:
        return bytes((int(escape[2:], 16),))
    return _SHORT.get(kind, escape[1:])
