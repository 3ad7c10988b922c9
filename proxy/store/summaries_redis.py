"""Summaries in Redis, over the connection of the budget store. Keys: `{bw:<namespace>}sum:<digest>`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxy.store.base import StoreUnavailable
from proxy.store.link import Link
from proxy.store.summaries import KEPT_SECONDS, checked_key, decoded, encoded


class RedisSummaries:
    """`SummaryStore`. Whoever opened the link closes it."""

    def __init__(self, link: Link, prefix: bytes) -> None:
        self._link = link
        self._prefix = prefix + b"sum:"

    async def find(self, keys: Sequence[bytes]) -> tuple[int, str] | None:
        if not keys:
            return None
        answer = await self._link.submit((b"MGET", *[self._key(key) for key in keys]))
        for place, data in enumerate(answer):
            # What is no summary is as good as none: the others are not to suffer from it.
            text = None if data is None else decoded(data)
            if text is not None:
                return place, text
        return None

    async def keep(self, key: bytes, text: str) -> str:
        # Two commands in one write, because SET has no NX together with GET before Redis 7.
        words = (b"SET", self._key(key), encoded(text), b"EX", KEPT_SECONDS, b"NX")
        written = self._link.submit(words)
        read = self._link.submit((b"GET", self._key(key)))
        try:
            await written
            data: Any = await read
        finally:
            for one in (written, read):
                if not one.cancel() and not one.cancelled():
                    one.exception()  # seen here: the first failure is the one that was raised
        if data is None:
            return text  # evicted, or over just now
        kept = decoded(data)
        if kept is None:
            raise StoreUnavailable("corrupt")
        return kept

    def _key(self, key: bytes) -> bytes:
        return self._prefix + checked_key(key).hex().encode()
