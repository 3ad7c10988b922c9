"""The prompt cache of the mock: which beginning of a prompt was sent before. Pure bookkeeping, bounded.

A prompt is a chain of units: what stands before its messages (tools, instructions), then each message. Prompts that
begin alike share the nodes of a tree, and a node is found by the digest of all that leads to it, so a prompt costs one
look-up for each unit that it shares with an earlier one. Where it parts from all of them, the next units of those
earlier ones stand there in order of their text: the one with the most in common is a neighbour of the new one.

The least recently used leaves go first. A parent is always used after its children, so what is dropped is a leaf.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from proxy.providers.mock.text import Count

STEP: Final = 128
"""Tokens: a cached prefix is told in whole steps, rounded down."""
LEAST: Final = 1024
"""Tokens: a shorter common prefix is not cached."""

_MOST_UNITS: Final = 200_000
_MOST_CHARACTERS: Final = 67_108_864


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a prompt that is the same as a part of an earlier one, or has its beginning in common with it."""

    digest: bytes
    """Of all its content."""
    tokens: int
    head: str
    """What must be equal before its text is compared: a role."""
    head_tokens: int
    text: str

    @classmethod
    def of(cls, value: Any, tokens: int, head: str, head_tokens: int, text: str) -> Unit:
        """`value` is the JSON of the part; the order of members and white space make no difference to its digest."""
        digest = hashlib.blake2b(orjson.dumps(value, option=orjson.OPT_SORT_KEYS), digest_size=16)
        return cls(digest.digest(), tokens, head, head_tokens, text)

    @property
    def place(self) -> tuple[str, str]:
        """Where it stands among the units that follow the same prefix."""
        return self.head, self.text


@dataclass(slots=True)
class _Node:
    parent: bytes | None
    place: tuple[str, str]
    next: list[tuple[str, str]] = field(default_factory=list)
    """Places of the units that followed, in order."""


class Prefixes:
    """What was sent, per owner. One thread at a time."""

    def __init__(self, units: int = _MOST_UNITS, characters: int = _MOST_CHARACTERS) -> None:
        """Remembers as many `units`, and as many `characters` of their texts."""
        self._nodes: OrderedDict[bytes, _Node] = OrderedDict()
        self._most_units = units
        self._most_characters = characters
        self._characters = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def cached(self, owner: bytes, units: Sequence[Unit], count: Count) -> int:
        """Tokens of the longest beginning that this prompt shares with an earlier one of `owner`, as a provider tells
        them; from now on this prompt is an earlier one, too."""
        key = hashlib.blake2b(owner, digest_size=16).digest()
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = _Node(None, ("", ""))
        chain = [key]
        shared = 0
        known = True
        for unit in units:
            parent, key = key, hashlib.blake2b(key + unit.digest, digest_size=16).digest()
            below = self._nodes.get(key) if known else None
            if below is not None:
                shared += unit.tokens
            else:
                if known:
                    shared += _in_common(unit, node.next, count)
                    known = False
                below = self._add(key, parent, node, unit)
            chain.append(key)
            node = below
        for key in reversed(chain):
            self._nodes.move_to_end(key)
        self._shrink()
        return shared // STEP * STEP if shared >= LEAST else 0

    def _add(self, key: bytes, parent: bytes, above: _Node, unit: Unit) -> _Node:
        node = self._nodes[key] = _Node(parent, unit.place)
        insort(above.next, unit.place)
        self._characters += len(unit.text)
        return node

    def _shrink(self) -> None:
        while len(self._nodes) > self._most_units or self._characters > self._most_characters:
            _, leaf = self._nodes.popitem(last=False)
            self._characters -= len(leaf.place[1])
            if leaf.parent is not None:
                followers = self._nodes[leaf.parent].next
                del followers[bisect_left(followers, leaf.place)]


def _in_common(unit: Unit, others: Sequence[tuple[str, str]], count: Count) -> int:
    """Tokens at the beginning of `unit` that it shares with one of `others`."""
    at = bisect_left(others, unit.place)
    longest = -1
    for head, text in others[max(at - 1, 0) : at + 1]:
        if head == unit.head:
            longest = max(longest, _characters_in_common(text, unit.text))
    if longest < 0:
        return 0
    if longest == len(unit.text):
        return min(unit.head_tokens + count(unit.text), unit.tokens)
    # The last token before the difference may well reach over it.
    return unit.head_tokens + max(count(unit.text[:longest]) - 1, 0)


def _characters_in_common(one: str, other: str) -> int:
    """At the beginning of both; found by halves, since a loop over characters is slow where a message is a file."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low
