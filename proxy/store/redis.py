"""The budget store that all replicas share: verbs become calls of Lua scripts, and their answers become values.

Redis runs a script from beginning to end with nothing in between, so a verb is one atomic step for every process. The
time is the server's own, so that no replica's clock matters. Redis 6.2 and later, and Valkey.

All keys begin with `{bw:<namespace>}`, and so share one slot of a cluster; after it

    epoch               the life of the store, and its steady clock         s:<kind>:<length>:<name>   a scope's windows
    leases              sorted set of live reservations by end of lease     r:<id>                     a reservation
    outbox              stream of records                                   u:<hour>[:<length>:<tenant>]   roll-ups
    collects            while a cold store is seeded                        o:<digest>                 an object's owner
    keys                hash of the keys made at run time                   processes   sorted set of live processes
    circuits, circuit-processes   see `redis_circuits`                      sum:<digest>               a summary

Names of tenants and keys come after their length, and ids are our own hexadecimal digits: no name, whatever it holds,
makes the key of another. Answers are one packed string each: a letter, then 64-bit integers, little-endian.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec

from proxy.budget.amounts import WINDOWS, Amounts, Row
from proxy.budget.clocks import DAY_MS
from proxy.store.address import NAMESPACE, parse_address
from proxy.store.base import (
    ID_CHARS,
    OUTBOX_RECORDS,
    ROLLUP_FIELDS,
    ROLLUP_KEPT_MS,
    ROLLUP_MS,
    SEED_MS,
    Balance,
    Beat,
    Cold,
    Dimension,
    Ended,
    Entry,
    Granted,
    Outcome,
    Record,
    Refused,
    Remembered,
    Reservation,
    Scope,
    Seeded,
    Server,
    Settled,
    Settlement,
    StoreUnavailable,
    UsageRow,
    checked_amounts,
    checked_entries,
    checked_id,
    checked_scopes,
)
from proxy.store.connection import Words
from proxy.store.dial import Dialer
from proxy.store.info import server_of
from proxy.store.ledger import grouped, outbox_place, overflow, tally_values
from proxy.store.link import Link, StateListener
from proxy.store.ownership_redis import RedisOwnership
from proxy.store.redis_circuits import RedisCircuits
from proxy.store.registry import MAX_KEYS, KeyRegistry
from proxy.store.registry_redis import RedisRegistry
from proxy.store.scripts import Scripts
from proxy.store.summaries_memory import MemorySummaries, NearSummaries
from proxy.store.summaries_redis import RedisSummaries

_JSON: Final = b"json"
_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(tuple[str, ...]).decode
_TRIPLE: Final = struct.Struct("<3d")
_COUNTS: Final = struct.Struct("<8d")
_LIMITS: Final = struct.Struct("<8d")
_MEMORY: Final = struct.Struct("<9d")
_ROW: Final = struct.Struct("<17q")
_NUMBER: Final = struct.Struct("<q")
_REFUSAL: Final = struct.Struct("<7q")
_OUTCOMES: Final[dict[int, Outcome]] = {ord("S"): "settled", ord("A"): "already", ord("L"): "late", ord("U"): "unknown"}
_COLD, _GRANTED, _OVER, _REFUSED, _ENDED = b"CGORE"
_row: Final = tuple.__new__  # `Row._make` does the same at three times the time
_PREPARED: Final = 10_000
_SLOW_SECONDS: Final = 2.0
"""Reading many roll-ups takes its time, on a connection of its own, so that no reservation waits behind it."""
_HOURS_AT_ONCE: Final = 64


class _Prepared:
    """What a tuple of scopes comes to on the wire."""

    __slots__ = ("keys", "limits", "places", "scopes")

    def __init__(self, scopes: tuple[Scope, ...], prefix: bytes) -> None:
        self.scopes = scopes
        self.places = checked_scopes(scopes)
        self.keys = tuple(prefix + b"s:" + place.encode() for place in self.places)
        self.limits = tuple(_packed_limits(scope) for scope in scopes)


class RedisStore:
    """`BudgetStore` in Redis or Valkey. Made within the event loop that uses it; connects at the first call.

    `url` as in `address`; `timeout_ms`: how long a call may take; `listener` hears when the store goes away and comes
    back. `tombstone_ms`: how long an ended reservation is known as such, longer than any settle can be late.
    `clock`: wall milliseconds that take the place of the server's time, for tests alone: replicas must share one.
    Raises ValueError for a URL or namespace that will not do.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "0",
        timeout_ms: int = 50,
        setup_ms: int = 1000,
        tombstone_ms: int = 900_000,
        records: int = OUTBOX_RECORDS,
        listener: StateListener | None = None,
        clock: Callable[[], int] | None = None,
    ) -> None:
        if not NAMESPACE.fullmatch(namespace):
            raise ValueError("a namespace is 1 to 64 letters, digits, '.', '_' or '-'")
        tag = f"bw:{namespace}".encode()
        self._prefix = b"{" + tag + b"}"
        self._scripts = Scripts()
        address = parse_address(url)
        timeout = timeout_ms / 1000

        def link(seconds: float, heard: StateListener | None) -> Link:
            dialer = Dialer(address, tag=tag, setup=max(setup_ms / 1000, seconds))
            return Link(dialer, timeout=seconds, texts=self._scripts.texts, listener=heard)

        self._link = link(timeout, listener)
        self._slow = link(max(timeout, _SLOW_SECONDS), None)
        self._clock = clock
        self._keys = (self._prefix + b"epoch", self._prefix + b"leases", self._prefix + b"outbox")
        self._reservations = self._prefix + b"r:"
        self._rollups = self._prefix + b"u:"
        self._common: Words = (self._reservations, tombstone_ms, records)
        self._prepared: dict[tuple[Scope, ...], _Prepared] = {}

    @property
    def circuits(self) -> RedisCircuits:
        """The breaker's store on this store's connection. It ends with this store."""
        return RedisCircuits(self._link, self._prefix, self._scripts, self._clock)

    # -- verbs -------------------------------------------------------------------------------------------------------

    async def reserve(self, reservation: Reservation) -> Granted | Refused | Ended | Cold:
        known = checked_id(reservation.id).encode()
        amounts = checked_amounts(reservation.ask)
        prepared = self._prepare(reservation.scopes)
        charged = 1 if reservation.on_lost == "charge" else 0
        answer = await self._run(
            self._scripts.reserve,
            (self._reservations + known, *prepared.keys),
            (known, reservation.lease_ms, charged, *amounts, *prepared.limits),
        )
        return _verdict(answer, prepared.scopes)

    async def top_up(
        self,
        reservation_id: str,
        ask: Amounts,
        scopes: tuple[Scope, ...],
        leave: tuple[tuple[Scope, Amounts], ...] = (),
    ) -> Granted | Refused | Ended | Cold:
        known = checked_id(reservation_id).encode()
        amounts = checked_amounts(ask)
        prepared = self._prepare(scopes)
        left = self._prepare(tuple(scope for scope, _ in leave)) if leave else None
        if left is not None and not set(left.keys).isdisjoint(prepared.keys):
            raise ValueError("a scope is either covered or left")
        used = (_TRIPLE.pack(*checked_amounts(amount)) for _, amount in leave)
        answer = await self._run(
            self._scripts.top_up,
            (self._reservations + known, *prepared.keys, *(left.keys if left is not None else ())),
            (len(prepared.keys), *amounts, *prepared.limits, *used),
        )
        return _verdict(answer, prepared.scopes)

    async def settle(self, settlement: Settlement) -> Settled | Cold:
        known = checked_id(settlement.id).encode()
        actual = _TRIPLE.pack(*checked_amounts(settlement.actual))
        prepared = self._prepare(settlement.scopes)
        own: Sequence[bytes] = (actual,) * len(prepared.keys)
        if settlement.apart:
            apart = {scope.place: _TRIPLE.pack(*checked_amounts(used)) for scope, used in settlement.apart}
            own = [apart.get(place, actual) for place in prepared.places]
        arguments: list[bytes | str | int] = [known, self._rollups, ROLLUP_KEPT_MS, ROLLUP_FIELDS, actual, *own]
        for entry in checked_entries(settlement.entries):
            arguments.extend(_entry_words(entry))
        answer = await self._run(self._scripts.settle, (self._reservations + known, *prepared.keys), tuple(arguments))
        if answer[0] == _COLD:
            return _cold(answer, prepared.scopes)
        return Settled(_OUTCOMES[answer[0]], _balances(answer, 9, prepared.scopes), _NUMBER.unpack_from(answer, 1)[0])

    async def extend(self, reservation_ids: Sequence[str], lease_ms: int) -> tuple[str, ...] | Cold:
        ids = tuple(checked_id(each) for each in reservation_ids)
        answer = await self._run(self._scripts.extend, (), (lease_ms, *ids))
        return Cold() if answer[0] == _COLD else tuple(ids[place] for place in _numbers(answer))

    async def balance(self, scopes: Sequence[Scope]) -> tuple[Balance, ...] | Cold:
        prepared = self._prepare(tuple(scopes))
        answer = await self._run(self._scripts.balance, prepared.keys, ())
        return _cold(answer, prepared.scopes) if answer[0] == _COLD else _balances(answer, 9, prepared.scopes)

    async def seed(
        self, remembered: Sequence[Remembered], collect_ms: int = SEED_MS, held: Sequence[Reservation] = ()
    ) -> Seeded:
        told = {self._prefix + b"s:" + each.scope.place.encode(): _packed_memory(each) for each in remembered}
        prepared = [self._prepare(each.scopes) for each in held]
        for each in prepared:
            for key in each.keys:
                told.setdefault(key, _packed_memory())
        places = {key: place for place, key in enumerate(told, 1)}
        given = tuple(
            checked_id(one.id).encode() + _packed_held(one, [places[key] for key in each.keys])
            for one, each in zip(held, prepared, strict=True)
        )
        keys = (self._prefix + b"collects", *told, *(self._reservations + one[:ID_CHARS] for one in given))
        answer = await self._run(self._scripts.seed, keys, (collect_ms, len(told), *told.values(), *given))
        wait_ms, first = _numbers(answer)
        return Seeded(wait_ms, bool(first))

    async def beat(self, process_id: str, life_ms: int) -> Beat:
        words: Words = (checked_id(process_id), life_ms)
        processes, epoch = _numbers(await self._run(self._scripts.beat, (self._prefix + b"processes",), words))
        return Beat(processes, epoch)

    async def server(self) -> Server | None:
        try:
            (answer,) = await self._read([(b"INFO",)])
        except StoreUnavailable as error:
            if error.reason == "refused":
                return None  # Not everybody may ask, and everything else works without.
            raise
        return server_of(answer)

    async def usage(self, since_ms: int, until_ms: int, by: Sequence[Dimension]) -> list[UsageRow]:
        # A day on either side: the hours were named by the server's clock, and this is ours.
        now_ms = time.time_ns() // 1_000_000 if self._clock is None else self._clock()
        first = -(-max(since_ms, now_ms - ROLLUP_KEPT_MS - DAY_MS) // ROLLUP_MS)
        last = -(-min(until_ms, now_ms + DAY_MS) // ROLLUP_MS)
        sums: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
        for start in range(first, last, _HOURS_AT_ONCE):
            hours = [b"%s%d" % (self._rollups, hour) for hour in range(start, min(start + _HOURS_AT_ONCE, last))]
            tenants = await self._read([(b"SMEMBERS", hour) for hour in hours])
            places = [hour + b":" + name for hour, names in zip(hours, tenants, strict=True) for name in names]
            for fields in await self._read([(b"HGETALL", place) for place in places]):
                sums.extend(_rollup(fields))
        return grouped(sums, by)

    async def outbox(self, after: str, count: int) -> list[Record]:
        milliseconds, sequence = outbox_place(after)
        start = f"({milliseconds}-{sequence}" if after else "-"
        (answer,) = await self._read([(b"XRANGE", self._keys[2], start, b"+", b"COUNT", count)])
        return [Record(each.decode(), _recorded(words)) for each, words in answer]

    def registry(self, most: int = MAX_KEYS) -> KeyRegistry:
        """The keys that are made at run time, at most so many, in the same place. Open as long as the store."""
        return RedisRegistry(self._slow, self._scripts, self._prefix, clock=self._clock, most=most)

    def ownership(self) -> RedisOwnership:
        """Whose the objects are that providers keep, over the same connection."""
        return RedisOwnership(self._link, self._prefix, self._scripts.claim)

    def summaries(self) -> NearSummaries:
        """Summaries of what was removed from conversations, over the same connection, behind a memory of their own."""
        return NearSummaries(MemorySummaries(), RedisSummaries(self._link, self._prefix))

    async def aclose(self) -> None:
        await self._link.aclose()
        await self._slow.aclose()

    # -- the wire ----------------------------------------------------------------------------------------------------

    def _prepare(self, scopes: tuple[Scope, ...]) -> _Prepared:
        prepared = self._prepared.get(scopes)
        if prepared is None:
            if len(self._prepared) >= _PREPARED:
                self._prepared.clear()
            prepared = self._prepared[scopes] = _Prepared(scopes, self._prefix)
        return prepared

    def _run(self, digest: bytes, keys: tuple[bytes, ...], arguments: Words) -> Awaitable[bytes]:
        wall_ms = 0 if self._clock is None else self._clock()
        return self._link.submit(
            (b"EVALSHA", digest, 3 + len(keys), *self._keys, *keys, wall_ms, *self._common, *arguments)
        )

    async def _read(self, commands: Sequence[Words]) -> list[Any]:
        answers = [self._slow.submit(command) for command in commands]
        try:
            return [await answer for answer in answers]
        finally:
            for answer in answers:
                if not answer.cancel() and not answer.cancelled():
                    answer.exception()  # seen here: the first failure is the one that was raised


def _packed_limits(scope: Scope) -> bytes:
    limits = scope.limits.bounds()
    return _LIMITS.pack(*limits, 1 if scope.enforced else 0)


def _packed_memory(each: Remembered | None = None) -> bytes:
    return _MEMORY.pack(*each.windows, *each.spent, *each.minute) if each is not None else bytes(_MEMORY.size)


def _packed_held(one: Reservation, places: list[int]) -> bytes:
    charged = 1 if one.on_lost == "charge" else 0
    return struct.pack(f"<{5 + len(places)}d", one.lease_ms, charged, *checked_amounts(one.ask), *places)


def _entry_words(entry: Entry) -> tuple[bytes | str | int, ...]:
    """As `settle.lua` takes them. A record is one word: fifty would cost more than all the rest."""
    counts = _COUNTS.pack(*tally_values(entry.usage))
    if not entry.record:
        return (*_fields(entry.dimensions), counts, 0)
    return (*_fields(entry.dimensions), counts, 2, _JSON, _encode(entry.record))


@lru_cache(4096)
def _fields(dimensions: tuple[str, ...]) -> tuple[str, str, str]:
    """Their tenant as part of a key, their field, and the one that takes what has no room."""
    tenant = dimensions[0]
    return f"{len(tenant)}:{tenant}", _field(dimensions), _field(overflow(tenant))


def _recorded(words: Sequence[bytes]) -> tuple[str, ...]:
    """Names and values in turn, of a record of ours or of one that a script wrote by itself."""
    return _decode(words[1]) if words[0] == _JSON else tuple(word.decode() for word in words)


def _field(dimensions: tuple[str, ...]) -> str:
    """Dimensions as one text that no other dimensions have: each behind its length."""
    return "".join(f"{len(each)}:{each}" for each in dimensions)


def _dimensions(field: str) -> tuple[str, ...]:
    found = []
    while field:
        length, _, rest = field.partition(":")
        found.append(rest[: int(length)])
        field = rest[int(length) :]
    return tuple(found)


def _rollup(answer: list[bytes]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """The fields and counts of one HGETALL."""
    pairs = iter(answer)
    for field, counts in zip(pairs, pairs, strict=True):
        yield _dimensions(field.decode()), tuple(int(count) for count in _COUNTS.unpack(counts))


def _verdict(answer: bytes, scopes: tuple[Scope, ...]) -> Granted | Refused | Ended | Cold:
    kind = answer[0]
    if kind == _GRANTED:
        return Granted(_balances(answer, 9, scopes), _NUMBER.unpack_from(answer, 1)[0])
    if kind == _REFUSED:
        return _refusal(answer, scopes)
    if kind == _OVER:
        balances = _balances(answer, 9 + _REFUSAL.size, scopes)
        return Granted(balances, _NUMBER.unpack_from(answer, 1)[0], _refusal(answer, scopes))
    return Ended() if kind == _ENDED else _cold(answer, scopes)


def _refusal(answer: bytes, scopes: tuple[Scope, ...]) -> Refused:
    scope, window, limit, used, reserved, wait, reset = _REFUSAL.unpack_from(answer, 9)
    return Refused(scopes[scope], WINDOWS[window], limit, used, reserved, None if wait < 0 else wait, reset)


def _balances(answer: bytes, start: int, scopes: tuple[Scope, ...]) -> tuple[Balance, ...]:
    rows = _ROW.iter_unpack(memoryview(answer)[start:])
    return tuple([Balance(scope, _row(Row, row)) for scope, row in zip(scopes, rows, strict=True)])


def _numbers(answer: bytes) -> tuple[int, ...]:
    return struct.unpack_from(f"<{len(answer) // 8}q", answer, 1)


def _cold(answer: bytes, scopes: tuple[Scope, ...]) -> Cold:
    return Cold(tuple(scopes[place] for place in _numbers(answer)))
