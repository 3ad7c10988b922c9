"""Counting long texts in slices, within bounds of memory and time. Pure but for the clock it costs.

Why slices: a worker thread that is told to stop can stop between two of them; a run of blanks too long for the
tokenizer's regular expression never reaches it whole; and no single word grows so long that merging it gets slow.

What a cut costs: between two words or after a line end nothing, the tokenizer splits there itself. Only a slice
without such a place is cut inside a piece, and then the sum differs from the count of the whole by at most
`CUT_ERROR` tokens per cut (in 46,000 random texts it was never more than 3).

What a cap costs: of a text longer than `EXACT_CHARS`, evenly spread slices are counted and scaled up. When many
texts together exceed it, the rest is taken at the ratio of tokens to characters found so far. Neither makes more tokens
of a text than it has bytes in UTF-8, as no exact count does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from threading import Event
from typing import Final

from proxy.tokens.vocabularies import Vocabulary

SLICE_CHARS: Final = 16_384
CUT_ERROR: Final = 8
"""Tokens by which one cut inside a piece may change a count."""
EXACT_CHARS: Final = 2_000_000
"""Characters that one tally counts exactly; about 0.1 to 0.5 s of one core."""
SAMPLE_SLICES: Final = 32
TEXT_CHARS: Final = 64
"""What a text costs beside its length, in characters' worth of time: keeps a million one-letter texts in bounds."""

_LOOK_BACK: Final = 1024
_LAST_BOUNDARY: Final = re.compile(r"(?s:.*)(?:\S(?= \S)|\n(?=[^\s/]))")


class Abandoned(Exception):
    """The one who asked for the count has left."""


def slices(text: str, size: int = SLICE_CHARS) -> Iterator[str]:
    """The text in order, in parts of at most `size` characters, cut where the tokenizer cuts if there is such a place
    among the last 1,024 characters of the part."""
    start, end = 0, len(text)
    while end - start > size:
        limit = start + size
        boundary = _LAST_BOUNDARY.match(text, max(start, limit - _LOOK_BACK), limit + 1)
        cut = boundary.end() if boundary else limit
        yield text[start:cut]
        start = cut
    if start < end:
        yield text[start:]


class Tally:
    """Adds up the tokens of the texts of one request. Used by one thread at a time.

    `stop` is set by another thread: the next slice then raises Abandoned.
    """

    __slots__ = ("_chars", "_left", "_rest", "_stop", "_tokens", "_vocabulary", "calls", "guesses")

    def __init__(self, vocabulary: Vocabulary, stop: Event | None = None) -> None:
        self._vocabulary = vocabulary
        self._stop = stop
        self._left = EXACT_CHARS
        self._chars = 0
        self._tokens = 0
        self._rest = 0  # of the last guess: a million short texts must not each be rounded
        self.calls = 0
        """Slices that the tokenizer has worked on."""
        self.guesses = 0
        """Texts whose answer depends on what was counted before them: not to be remembered."""

    def add(self, text: str) -> int:
        """Tokens of a text: exact up to the error of cuts, or extrapolated beyond the caps of this module."""
        size = len(text)
        if not size:
            return 0
        if size > EXACT_CHARS:
            return self._sample(text)
        if size > self._left and self._chars:
            self.guesses += 1
            guess, self._rest = divmod(size * self._tokens + self._rest, self._chars)
            return min(guess, _bytes_of(text))
        if size <= SLICE_CHARS:
            return self._slice(text)
        return sum(self._slice(part) for part in slices(text))

    def _sample(self, text: str) -> int:
        room = len(text) - SLICE_CHARS
        counted = 0
        for number in range(SAMPLE_SLICES):
            start = room * number // (SAMPLE_SLICES - 1)
            counted += self._slice(text[start : start + SLICE_CHARS])
        return min(-(-counted * len(text) // (SAMPLE_SLICES * SLICE_CHARS)), _bytes_of(text))

    def _slice(self, text: str) -> int:
        if self._stop is not None and self._stop.is_set():
            raise Abandoned
        tokens = self._vocabulary.count(text)
        size = len(text)
        self.calls += 1
        self._left -= size + TEXT_CHARS
        self._chars += size
        self._tokens += tokens
        return tokens


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
