"""Text out of a seed: the words that the mock says, cut into the pieces that it streams.

Everything here is a function of its arguments: the same random source and the same counter give the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Final

Count = Callable[[str], int]
"""Tokens of a text."""

_WORDS: Final = (
    "water", "harbor", "stone", "light", "wind", "tide", "wall", "sand", "ship", "rope", "storm", "wave", "coast",
    "north", "south", "deep", "calm", "safe", "open", "slow", "first", "second", "last", "long", "small", "large",
    "clear", "cold", "warm", "early", "late", "round", "plain", "true", "quiet", "strong", "steady", "the", "the",
    "the", "a", "a", "of", "of", "to", "in", "and", "and", "with", "for", "from", "over", "under", "near", "before",
    "after", "between", "through", "until", "is", "was", "holds", "keeps", "breaks", "turns", "moves", "falls",
    "rises", "meets", "stands", "waits", "carries", "returns", "follows", "reaches", "shows", "every", "some",
    "most", "few", "both", "each", "other", "same", "own", "next", "day", "night", "hour", "year", "line", "point",
    "side", "end", "part", "place", "way",
)  # fmt: skip

_PIECE: Final = re.compile(r"\s{0,64}\S{1,24}|\s{1,64}")
"""One streamed piece: a word with the blanks before it, as tokenizers cut; bounded, so that a megabyte is cut too."""


def split(text: str) -> list[str]:
    """The pieces of a text, in order; joined they are the text again."""
    return _PIECE.findall(text)


def fragments(text: str, size: int = 12) -> list[str]:
    """Equal cuts of a JSON text, blind to its tokens: as tool arguments arrive."""
    return [text[i : i + size] for i in range(0, len(text), size)]


def prose(random: Random, pieces: int) -> list[str]:
    """So many pieces of sentences: each a word or a full stop."""
    out: list[str] = []
    left = 0
    while len(out) < pieces:
        if left == 0 and out:
            out.append(".")
            left = random.randint(6, 14)
            continue
        if left == 0:
            left = random.randint(6, 14)
        word = random.choice(_WORDS)
        start = not out or out[-1] == "."
        out.append(("" if not out else " ") + (word.capitalize() if start else word))
        left -= 1
    if pieces > 1:
        out[-1] = "."
    return out


def shorten(pieces: Sequence[str], limit: int | None, stop: Sequence[str], count: Count) -> tuple[list[str], bool]:
    """The pieces up to the first stop text and within `limit` tokens; and whether the limit cut them."""
    kept = list(pieces)
    if stop:
        text = "".join(kept)
        found = [at for at in (text.find(word) for word in stop) if at >= 0]
        if found:
            kept = take(kept, min(found))
    if limit is None:
        return kept, False
    total = 0
    for i, piece in enumerate(kept):
        total += count(piece)
        if total > limit:
            return kept[:i], True
    return kept, False


def take(pieces: Iterable[str], characters: int) -> list[str]:
    """The first so many characters, the last piece cut where they end."""
    out = []
    for piece in pieces:
        if characters <= 0:
            break
        out.append(piece[:characters])
        characters -= len(piece)
    return out


def running(pieces: Sequence[str], count: Count) -> list[int]:
    """Tokens of the text after each piece: never falling, the last equal to the count of the whole text."""
    total = count("".join(pieces)) if pieces else 0
    out = []
    so_far = 0
    for piece in pieces:
        so_far = min(so_far + count(piece), total)
        out.append(so_far)
    if out:
        out[-1] = total
    return out
