"""How the mock counts: with a real tokenizer, and each text once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Final

from proxy.providers.mock.text import Count
from proxy.tokens import memo
from proxy.tokens.slices import Tally
from proxy.tokens.vocabularies import SHARED


def real_counts(encoding: str = "o200k_base") -> Count:
    """Loads the vocabulary (0.3 s, once per process) and counts with it, long texts slice by slice.

    Raises KeyError for an unknown encoding, VocabularyError for a damaged installation.
    """
    vocabulary = SHARED.load(encoding)
    return lambda text: Tally(vocabulary).add(text)


_LONG_TEXTS: Final = 16_384


class Memo:
    """A counter that remembers its last answers: the same word or message is counted once.

    A long text is remembered by its digest, so that the hundred messages of a long conversation cost a turn little more
    than their hashing.
    """

    __slots__ = ("_count", "_known", "_long", "_longest", "_size")

    def __init__(self, count: Count, size: int = 4096, longest: int = 4096) -> None:
        """`longest`: characters of a text that is kept itself. Bounds the memory to about size x longest."""
        self._count = count
        self._known: OrderedDict[str, int] = OrderedDict()
        self._size = size
        self._longest = longest
        self._long: memo.Memo[int] = memo.Memo(max(size, _LONG_TEXTS))

    def __call__(self, text: str) -> int:
        if len(text) > self._longest:
            return self._of_long(text)
        known = self._known.get(text)
        if known is None:
            known = self._known[text] = self._count(text)
            if len(self._known) > self._size:
                self._known.popitem(last=False)
        return known

    def _of_long(self, text: str) -> int:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        known = self._long.get(digest)
        if known is None:
            known = self._count(text)
            self._long.put(digest, known)
        return known
