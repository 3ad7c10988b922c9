"""Ownership in Redis, over the connection of the budget store. Keys: `{bw:<namespace>}o:<digest of the id>`."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from proxy.store.base import StoreUnavailable
from proxy.store.link import Link
from proxy.store.ownership import KEPT_MS, Owner, digest_of

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Owner).decode


class RedisOwnership:
    """`Ownership`. Whoever opened the link closes it. `script`: the digest of `claim.lua`, which the link knows."""

    def __init__(self, link: Link, prefix: bytes, script: bytes) -> None:
        self._link = link
        self._prefix = prefix + b"o:"
        self._script = script

    async def claim(self, object_id: str, owner: Owner) -> Owner:
        # An owner is written as a list that begins with its tenant, and a JSON text ends where it says that it ends: no
        # other tenant's owner begins in the same way.
        beginning = b"[" + _encode(owner.tenant) + b","
        key = self._key(object_id)
        return _owner(await self._link.submit((b"EVALSHA", self._script, 1, key, _encode(owner), beginning, KEPT_MS)))

    async def owner(self, object_id: str) -> Owner | None:
        answer = await self._link.submit((b"GET", self._key(object_id)))
        return None if answer is None else _owner(answer)

    def _key(self, object_id: str) -> bytes:
        return self._prefix + digest_of(object_id).hex().encode()


def _owner(answer: Any) -> Owner:
    try:
        return _decode(answer)
    except (msgspec.DecodeError, TypeError) as error:
        raise StoreUnavailable("corrupt") from error
