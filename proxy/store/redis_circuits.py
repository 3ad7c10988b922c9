"""The breaker's store that all replicas share: one Lua script a verb, on the connection of the store of budgets.

Beside the keys of budgets, under the same tag: `circuit-processes`, a hash of who lives, and `circuits`, a hash of
records by `provider/model` (no name of a provider has a slash). The time is the server's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from proxy.fault_tolerance.base import (
    ALIVE_MS,
    LEASE_MS,
    Action,
    Granted,
    Outcome,
    Place,
    Probe,
    Report,
    View,
    Vote,
)
from proxy.store.base import StoreUnavailable
from proxy.store.link import Link
from proxy.store.scripts import Scripts

_T = TypeVar("_T")


class _Record(msgspec.Struct):
    """As the scripts keep it; `circuits.lua` says what the letters mean. Lua has no integers: they may come as 1.0."""

    s: str
    g: float
    u: float
    k: float
    h: bool
    w: dict[str, str]
    v: dict[str, str]
    o: str
    e: float


class _Answer(msgspec.Struct):
    now: float
    record: _Record | None = None
    number: float = 0


class _Told(msgspec.Struct):
    now: float
    live: int
    views: dict[str, _Record]
    lost: list[tuple[str, float]] | dict[str, Any]
    """An empty list comes as an empty object: Lua cannot tell them apart."""


_answer = msgspec.json.Decoder(_Answer).decode
_told = msgspec.json.Decoder(_Told).decode
_encode = msgspec.json.Encoder().encode


class RedisCircuits:
    """`BreakerStore` in Redis or Valkey. `link` and its end are its owner's. `clock` as in `RedisStore`."""

    def __init__(self, link: Link, prefix: bytes, scripts: Scripts, clock: Callable[[], int] | None = None) -> None:
        self._link = link
        self._scripts = scripts
        self._clock = clock
        self._keys = (prefix + b"circuit-processes", prefix + b"circuits")

    async def report(
        self, process: str, votes: Sequence[Vote], probes: Sequence[Probe], since_ms: int, *, alive_ms: int = ALIVE_MS
    ) -> Report:
        said = {_name(vote.place): (vote.generation, vote.open_ms, vote.why, vote.restores) for vote in votes}
        mine = [(_name(probe.place), probe.number) for probe in probes]
        arguments = (process, alive_ms, since_ms, LEASE_MS, _encode(said), _encode(mine))
        told = _read(_told, await self._run(self._scripts.report, *arguments))
        lost = () if isinstance(told.lost, Mapping) else tuple(Probe(_place(n), int(number)) for n, number in told.lost)
        views = tuple(_view(_place(name), record, told.now) for name, record in told.views.items())
        return Report(views, told.live, int(told.now), lost)

    async def lease(
        self, place: Place, process: str, generation: int, *, early: bool, lease_ms: int = LEASE_MS
    ) -> Granted | View:
        raw = await self._run(self._scripts.lease, _name(place), process, generation, int(early), lease_ms)
        answer = _read(_answer, raw)
        return Granted(int(answer.number)) if answer.record is None else _view(place, answer.record, answer.now)

    async def conclude(
        self, place: Place, process: str, number: int, outcome: Outcome, *, open_ms: int, generation: int
    ) -> View:
        arguments = (_name(place), process, number, outcome, open_ms, generation)
        return self._viewed(place, await self._run(self._scripts.conclude, *arguments))

    async def command(self, place: Place, action: Action, who: str) -> View:
        return self._viewed(place, await self._run(self._scripts.command, _name(place), action, who))

    def _viewed(self, place: Place, raw: bytes) -> View:
        answer = _read(_answer, raw)
        assert answer.record is not None
        return _view(place, answer.record, answer.now)

    async def _run(self, digest: bytes, *arguments: bytes | str | int) -> bytes:
        wall_ms = 0 if self._clock is None else self._clock()
        found: bytes = await self._link.submit((b"EVALSHA", digest, 2, *self._keys, wall_ms, *arguments))
        return found


def _read(decode: Callable[[bytes], _T], raw: bytes) -> _T:
    try:
        return decode(raw)
    except msgspec.DecodeError as error:
        raise StoreUnavailable("corrupt") from error


def _name(place: Place) -> str:
    return f"{place[0]}/{place[1]}"


def _place(name: str) -> Place:
    provider, _, model = name.partition("/")
    return provider, model


def _view(place: Place, record: _Record, now: float) -> View:
    return View(
        place,
        record.s != "closed",
        int(record.g),
        int(record.u - now),
        int(record.k),
        record.h,
        tuple(sorted(record.w.items())),
        tuple(sorted(record.v.items())),
        record.o,
        int(record.e - now) if record.o else 0,
    )
