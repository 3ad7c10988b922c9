"""The registry of keys in Redis: one hash beside the budgets, one script for each verb that changes it.

Ids are of our own making and digests are hexadecimal; what people write (a name, globs, a budget) stands inside a value
and never in the name of a Redis key or of a field.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, Final

import msgspec

from proxy.store.base import StoreUnavailable
from proxy.store.connection import Words
from proxy.store.link import Link
from proxy.store.registry import (
    KEPT_MS,
    MAX_KEYS,
    MAX_SECRETS,
    KeyRecord,
    KeyRefused,
    NewKey,
    Refusal,
    Secret,
    Snapshot,
    Stamp,
    is_key_id,
)
from proxy.store.scripts import Scripts

_STAMP: Final = b"stamp"
_REFUSALS: Final[dict[bytes, Refusal]] = {b"U": "unknown", b"R": "revoked", b"E": "expired", b"F": "full"}
_KEPT, _ALREADY = b"K", b"A"


class _Lasting(msgspec.Struct, frozen=True, omit_defaults=True):
    """What never changes of a key, as it is kept."""

    tenant: str
    name: str = ""
    models: tuple[str, ...] | None = None
    budget: str = ""


_lasting: Final = msgspec.json.Decoder(_Lasting)


class RedisRegistry:
    """`KeyRegistry` over a link that belongs to somebody else. `prefix` as of all keys of the store.

    The link should be one on which nobody's reservation waits: a snapshot of many keys takes its time. `clock` as of
    RedisStore; `nonce` makes a text that nobody has made before.
    """

    def __init__(
        self,
        link: Link,
        scripts: Scripts,
        prefix: bytes,
        *,
        clock: Callable[[], int] | None = None,
        most: int = MAX_KEYS,
        nonce: Callable[[], str] = lambda: secrets.token_hex(8),
    ) -> None:
        self._link = link
        self._scripts = scripts
        self._key = prefix + b"keys"
        self._clock = clock
        self._most = most
        self._nonce = nonce
        self._read: dict[str, tuple[bytes, KeyRecord]] = {}
        """As of the last snapshot: what is still written the same need not be read again."""

    async def create(self, new: NewKey) -> KeyRecord:
        if not is_key_id(new.id):
            raise ValueError("the id of a key is key_ and 16 hexadecimal digits")
        lasting = msgspec.json.encode(_Lasting(new.tenant, new.name, new.models, new.budget))
        return await self._change(
            self._scripts.key_create, new.id, new.digest.hex(), new.lives_ms or 0, lasting, self._most, KEPT_MS
        )

    async def revoke(self, key_id: str) -> tuple[KeyRecord, bool]:
        kind, text = await self._ask(self._scripts.key_revoke, key_id)
        return _record(key_id, text), kind == _KEPT

    async def rotate(self, key_id: str, digest: bytes, overlap_ms: int) -> KeyRecord:
        return await self._change(self._scripts.key_rotate, key_id, digest.hex(), overlap_ms, MAX_SECRETS)

    async def stamp(self) -> Stamp:
        text, now_ms = await self._with_time((b"HGET", self._key, _STAMP))
        return Stamp((text or b"").decode(), now_ms)

    async def snapshot(self) -> Snapshot:
        answer, now_ms = await self._with_time((b"HGETALL", self._key))
        pairs = iter(answer)
        fields = dict(zip(pairs, pairs, strict=True))
        stamp = Stamp(fields.pop(_STAMP, b"").decode(), now_ms)
        known = self._read
        self._read = {}
        for field, text in fields.items():
            key_id = field.decode("ascii", "replace")
            read = known.get(key_id)
            if read is None or read[0] != text:
                try:
                    read = text, _record(key_id, text)
                except StoreUnavailable:
                    continue  # Nobody can say whose it is, so it lets nobody in; the other keys go on.
            self._read[key_id] = read
        return Snapshot(stamp, {key_id: record for key_id, (_, record) in self._read.items()})

    # -- the wire ----------------------------------------------------------------------------------------------------

    async def _change(self, script: bytes, key_id: str, *arguments: bytes | str | int) -> KeyRecord:
        _, text = await self._ask(script, key_id, *arguments)
        return _record(key_id, text)

    async def _ask(self, script: bytes, key_id: str, *arguments: bytes | str | int) -> tuple[bytes, bytes]:
        if not is_key_id(key_id):
            raise KeyRefused("unknown")
        wall_ms = 0 if self._clock is None else self._clock()
        words: Words = (b"EVALSHA", script, 1, self._key, wall_ms, key_id, self._nonce(), *arguments)
        answer: bytes = await self._link.submit(words)
        kind = answer[:1]
        if kind not in (_KEPT, _ALREADY):
            raise KeyRefused(_REFUSALS[kind])
        return kind, answer[1:]

    async def _with_time(self, command: Words) -> tuple[Any, int]:
        """The command's answer, and the registry's time right after it."""
        wanted, time_of_day = self._link.submit(command), self._link.submit((b"TIME",))
        try:
            answer, (seconds, micros) = await wanted, await time_of_day
        finally:
            for one in (wanted, time_of_day):
                if not one.cancel() and not one.cancelled():
                    one.exception()  # seen here: the first failure is the one that was raised
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        return answer, now_ms if self._clock is None else self._clock()


def _record(key_id: str, text: bytes) -> KeyRecord:
    """Raises StoreUnavailable(corrupt)."""
    try:
        head, _, rest = text.partition(b"\n")
        created, expires, revoked, digests = head.decode("ascii").split(" ")
        lasting = _lasting.decode(rest)
        found = [one.split(":") for one in digests.split(",")]
        return KeyRecord(
            key_id,
            lasting.tenant,
            lasting.name,
            lasting.models,
            lasting.budget,
            int(created),
            int(expires) or None,
            int(revoked) or None,
            tuple([Secret(bytes.fromhex(digest), int(until) or None) for digest, until in found]),
        )
    except (ValueError, msgspec.DecodeError) as error:  # not UTF-8 and not a number are ValueErrors too
        raise StoreUnavailable("corrupt") from error
