"""Finds configured secrets in bytes, however many there are, at a cost that does not depend on their number.

The text is cut into words of 8 bytes at multiples of 8. Whatever lies in it for 15 bytes or more covers one such word
whole, at one of 8 offsets from its own start; so 8 words of each secret in a hash table are enough to notice every
occurrence, and one look-up per 8 bytes of text to rule them all out. Only after a hit is the text really searched.
"""

from __future__ import annotations

import base64
import re
import struct
import sys
from collections.abc import Iterable
from typing import Final

from proxy.observability.unescape import Span

MIN_LENGTH: Final = 8
"""Shorter values are not looked for: they would turn up in ordinary words. (Keys have at least 16 characters.)"""

_WORD: Final = 8
_SURE: Final = 2 * _WORD - 1
_CHUNK: Final = 1 << 16
_UNPACK: Final = tuple([struct.Struct(f"{words}Q").unpack_from for words in range(128)])
"""Bytes to that many words: for the short texts of a log line."""

_QUOTED: Final = frozenset("\"'\\")
_LETTERS_WRITTEN_OUT: Final = re.compile(rb"\\[ux/]|%[0-9a-fA-F]{2}")
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/_\-]*={0,2}")
_BASE64_BYTES: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/_-")


class KnownSecrets:
    """`values` as configured. Each is looked for as it is and in base64 (any alignment, both alphabets)."""

    __slots__ = ("_encoded", "_marks", "_quoted", "_short", "_words")

    def __init__(self, values: Iterable[str]) -> None:
        self._words: dict[int, tuple[bytes, ...]] = {}
        self._short: tuple[bytes, ...] = ()
        self._encoded: set[bytes] = set()
        self._quoted = False
        for value in sorted(set(values)):
            secret = value.encode("utf-8", "surrogatepass")
            if len(value) >= MIN_LENGTH:
                self._learn(secret)
                self._quoted = self._quoted or not value.isprintable() or not _QUOTED.isdisjoint(value)
                if b" " in secret:
                    self._learn(secret.replace(b" ", b"+"))  # as a form field; other URL encoding is undone before
                for form in _base64_cores(secret):
                    self._encoded.add(form)
                    self._learn(form)
        self._marks = frozenset(self._words)  # a set answers `isdisjoint` faster than the view of a dict's keys

    def _learn(self, form: bytes) -> None:
        if len(form) < _SURE:
            self._short += (form,)
            return
        for at in range(_WORD):
            word = int.from_bytes(form[at : at + _WORD], sys.byteorder)
            self._words[word] = (*self._words.get(word, ()), form)

    def absent(self, data: bytes) -> bool:
        """No form of any secret is in `data`. A False may be wrong, a True never is."""
        for form in self._short:
            if form in data:
                return False
        words = len(data) // _WORD
        if not self._marks or not words:
            return True
        if words < len(_UNPACK):
            return self._marks.isdisjoint(_UNPACK[words](data))
        view = memoryview(data)[: words * _WORD]
        for start in range(0, len(view), _CHUNK):
            if not self._marks.isdisjoint(view[start : start + _CHUNK].cast("Q").tolist()):
                return False
        return True

    def plain(self, data: bytes) -> bool:
        """No escape in `data` can hide a secret of ours: most undo to quotes and line ends, which keys do not have."""
        return not (self._quoted and b"\\" in data) and _LETTERS_WRITTEN_OUT.search(data) is None

    def find(self, data: bytes) -> list[Span]:
        """Every occurrence; of a base64 form the whole run of base64 around it: its edges hold parts of the secret."""
        spans: list[Span] = []
        for form in self._candidates(data):
            at = data.find(form)
            while at >= 0:
                span = (at, at + len(form))
                if form in self._encoded:
                    span = _run_around(data, span)
                spans.append(span)
                at = data.find(form, span[1])
        return spans

    def _candidates(self, data: bytes) -> set[bytes]:
        forms = set(self._short)
        words = memoryview(data)[: len(data) // _WORD * _WORD].cast("Q").tolist()
        for word in self._marks.intersection(words):
            forms.update(self._words[word])
        return forms


def _base64_cores(secret: bytes) -> set[bytes]:
    """The characters of base64 that depend on the secret alone, for its three alignments in the encoded data."""
    cores = set()
    for pad in range(3):
        encoded = base64.b64encode(b"\0" * pad + secret)
        first, last = -(-pad * 8 // 6), (pad + len(secret)) * 8 // 6
        core = encoded[first:last]
        cores |= {core, core.translate(bytes.maketrans(b"+/", b"-_"))}
    return cores


def _run_around(data: bytes, span: Span) -> Span:
    start, end = span
    while start and data[start - 1] in _BASE64_BYTES:
        start -= 1
    run = _BASE64.match(data, end)
    return start, run.end() if run else end
