"""A bounded memory of counts, so that a turn of a long conversation costs its new message only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Generic, TypeVar

T = TypeVar("T")

DEFAULT_ENTRIES: Final = 65_536
"""About 170 bytes each: 11 MB when full."""


class Memo(Generic[T]):
    """The least recently used go first, half of them at a time.

    Two generations: new and re-used entries live in the young one; when that has grown to half the bound it becomes
    the old one, and what was old is forgotten. A hit in the young generation is one dictionary look-up, and no step
    needs a lock: threads that collide can at worst forget an entry, never mix up two.
    """

    __slots__ = ("_half", "_old", "_young")

    def __init__(self, entries: int = DEFAULT_ENTRIES) -> None:
        if entries < 2:
            raise ValueError("a memo holds at least two entries")
        self._half = entries // 2
        self._young: dict[bytes, T] = {}
        self._old: dict[bytes, T] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, key: bytes) -> T | None:
        value = self._young.get(key)
        if value is None:
            value = self._old.get(key)
            if value is not None:
                self.put(key, value)
        return value

    def get_all(self, keys: Sequence[bytes]) -> list[T | None]:
        """As `get` of each, at a third of its cost where they are young."""
        found: list[T | None] = list(map(self._young.get, keys))
        if None in found:
            for position, value in enumerate(found):
                if value is None:
                    found[position] = self.get(keys[position])
        return found

    def put(self, key: bytes, value: T) -> None:
        young = self._young
        if len(young) >= self._half:
            self._old = young
            self._young = young = {}
        young[key] = value
