"""Summaries in the memory of a single process, alone or in front of a store that all processes share.

Bounded in bytes; the least recently used go first. A restart forgets them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from proxy.store.base import StoreUnavailable
from proxy.store.summaries import KEPT_SECONDS, SummaryStore, checked_key, encoded

MOST: Final = 16 * 1024 * 1024
ENTRY_BYTES: Final = 512
"""What an entry takes beside its text, generously: a short text costs no less."""


class _Kept(NamedTuple):
    data: bytes
    until: float


class MemorySummaries:
    """`SummaryStore`. `clock` is monotonic (seconds); `most`: bytes."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, most: int = MOST) -> None:
        self._clock = clock
        self._most = most
        self._kept: dict[bytes, _Kept] = {}
        """The least recently used first."""
        self.size = 0
        """Bytes, never more than `most`."""

    def __len__(self) -> int:
        return len(self._kept)

    async def find(self, keys: Sequence[bytes]) -> tuple[int, str] | None:
        for place, key in enumerate(keys):
            text = self._get(checked_key(key))
            if text is not None:
                return place, text
        return None

    async def keep(self, key: bytes, text: str) -> str:
        return self.put(key, text)

    def put(self, key: bytes, text: str) -> str:
        """As `keep`, at once."""
        data = encoded(text)
        known = self._get(checked_key(key))
        if known is not None:
            return known
        self._kept[key] = _Kept(data, self._clock() + KEPT_SECONDS)
        self.size += len(data) + ENTRY_BYTES
        while self.size > self._most:
            self._drop(next(iter(self._kept)))
        return text

    def _get(self, key: bytes) -> str | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept.until <= self._clock():
            self._drop(key)
            return None
        del self._kept[key]  # to the end: it is the one used last
        self._kept[key] = kept
        return kept.data.decode()

    def _drop(self, key: bytes) -> None:
        self.size -= len(self._kept.pop(key).data) + ENTRY_BYTES


class NearSummaries:
    """`SummaryStore`: the memory of this process in front of a store that it shares with others.

    A text that was read or made here is read from here again: a session costs one round trip when its cut moves, none
    in between. While the shared store is away the session keeps the summary that it has, and pays for none twice. Two
    processes that made one for the same key meanwhile each stay with theirs.
    """

    def __init__(self, near: MemorySummaries, far: SummaryStore) -> None:
        self._near = near
        self.far = far

    async def find(self, keys: Sequence[bytes]) -> tuple[int, str] | None:
        here = await self._near.find(keys)
        earlier = keys if here is None else keys[: here[0]]
        if not earlier:
            return here
        try:
            there = await self.far.find(earlier)
        except StoreUnavailable:
            if here is None:
                raise
            return here
        if there is None:
            return here
        place, text = there
        return place, self._near.put(keys[place], text)

    async def keep(self, key: bytes, text: str) -> str:
        """Raises no StoreUnavailable: what the shared store does not take is kept here."""
        try:
            text = await self.far.keep(key, text)
        except StoreUnavailable:
            pass
        finally:
            kept = self._near.put(key, text)  # even if the caller leaves: the text was paid for
        return kept
