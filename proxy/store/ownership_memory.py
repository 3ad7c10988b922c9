"""Ownership in the memory of a single process. A restart forgets it.

Bounded: `most` objects. When they are there, the tenant that has most of them loses its oldest: nobody makes another
tenant's objects be forgotten by making many.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple

from proxy.store.ownership import KEPT_MS, Owner, digest_of

MOST: Final = 100_000


class _Kept(NamedTuple):
    owner: Owner
    until_ms: int


class MemoryOwnership:
    """`Ownership`. `clock` reads wall milliseconds."""

    def __init__(self, *, clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000, most: int = MOST) -> None:
        self._clock = clock
        self._most = most
        self._kept: dict[bytes, _Kept] = {}
        self._by_tenant: dict[str, dict[bytes, None]] = {}
        """Each tenant's objects, the one claimed longest ago first."""

    def __len__(self) -> int:
        return len(self._kept)

    async def claim(self, object_id: str, owner: Owner) -> Owner:
        digest = digest_of(object_id)
        known = self._find(digest)
        if known is not None:
            if known.tenant != owner.tenant:
                return known
            self._drop(digest)
        self._kept[digest] = _Kept(owner, self._clock() + KEPT_MS)
        self._by_tenant.setdefault(owner.tenant, {})[digest] = None
        if len(self._kept) > self._most:
            richest = max(self._by_tenant.values(), key=len)
            self._drop(next(iter(richest)))
        return owner

    async def owner(self, object_id: str) -> Owner | None:
        return self._find(digest_of(object_id))

    def _find(self, digest: bytes) -> Owner | None:
        kept = self._kept.get(digest)
        if kept is None:
            return None
        if kept.until_ms <= self._clock():
            self._drop(digest)
            return None
        return kept.owner

    def _drop(self, digest: bytes) -> None:
        tenant = self._kept.pop(digest).owner.tenant
        own = self._by_tenant[tenant]
        del own[digest]
        if not own:
            del self._by_tenant[tenant]
