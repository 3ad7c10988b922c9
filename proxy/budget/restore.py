"""What a ledger's files say was spent in the hour, day and month of now: for a process whose memory begins at zero.

Files are read backwards from their end, a block at a time, until the month begins: the newest records matter to most
windows. Reading is bounded in time, and its memory by a block and by the number of tenants, keys and providers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from proxy.budget.amounts import MAX_SUM
from proxy.budget.clocks import DAY_MS, HOUR_MS, month_of
from proxy.budget.records import time_text
from proxy.money import nano_of
from proxy.store.base import Remembered, Scope

BLOCK_BYTES: Final = 262_144
SECONDS: Final = 10.0
"""How long reading may keep a process from being ready."""
_MAX_LINE: Final = 1_048_576
_HOUR_CHARS, _DAY_CHARS, _MONTH_CHARS = len("2026-01-31T23"), len("2026-01-31"), len("2026-01")


class _Line(msgspec.Struct, gc=False):
    """What matters of a line. Lines of lost reservations name no tenant: they are counted for all together."""

    time: str
    cost_usd: str | None = None
    tenant: str = ""
    key: str = ""
    provider: str = ""


_decode = msgspec.json.Decoder(_Line).decode


class Restored(NamedTuple):
    remembered: list[Remembered]
    records: int
    """Records of this month."""
    complete: bool
    """False: there was not enough time, or a file could not be read; windows may be below what was spent."""


class Sums:
    """Adds up lines. Pure: `now_ms` names the windows, by the beginnings that all times in them share."""

    def __init__(self, now_ms: int) -> None:
        self.records = 0
        self._now_ms = now_ms
        now = time_text(now_ms)
        self._hour, self._day, self.month = now[:_HOUR_CHARS], now[:_DAY_CHARS], now[:_MONTH_CHARS]
        self._spent: dict[tuple[str, str, str], list[int]] = {}

    def add(self, lines: Iterable[bytes]) -> bool:
        """False if all that could be read is of earlier months. What is no line of ours counts as nothing."""
        older = False
        found = 0
        for text in lines:
            try:
                line = _decode(text)
                nano = nano_of(line.cost_usd or "0")
            except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
                continue
            when = line.time
            if when[:_MONTH_CHARS] != self.month:
                older = older or when < self.month
                continue
            found += 1
            sums = self._spent.setdefault((line.tenant, line.key, line.provider), [0, 0, 0])
            sums[2] += nano
            if when[:_DAY_CHARS] == self._day:
                sums[1] += nano
                if when[:_HOUR_CHARS] == self._hour:
                    sums[0] += nano
        self.records += found
        return found > 0 or not older

    def remembered(self) -> list[Remembered]:
        """For every scope that something was spent in."""
        day = self._now_ms // DAY_MS
        windows = (self._now_ms // HOUR_MS, day, month_of(day))
        scopes: dict[str, tuple[Scope, list[int]]] = {}
        for (tenant, key, provider), spent in self._spent.items():
            for scope in _scopes(tenant, key, provider):
                _, total = scopes.setdefault(scope.place, (scope, [0, 0, 0]))
                for index in range(3):
                    total[index] = min(total[index] + spent[index], MAX_SUM)
        return [Remembered(scope, windows, (hour, day, month)) for scope, (hour, day, month) in scopes.values()]


def _scopes(tenant: str, key: str, provider: str) -> Iterator[Scope]:
    yield Scope("global", "")
    if tenant:
        yield Scope("tenant", tenant)
        if key:
            yield Scope("key", f"{tenant}/{key}")
    if provider:
        yield Scope("provider", provider)


def restored(
    paths: Iterable[Path],
    now_ms: int,
    clock: Callable[[], float],
    *,
    seconds: float = SECONDS,
    block: int = BLOCK_BYTES,
) -> Restored:
    """Reads one ledger's files, the newest first. Blocking. `clock` reads seconds. Raises nothing of the files'."""
    sums = Sums(now_ms)
    until = clock() + seconds
    seen: set[tuple[int, int]] = set()
    complete = True
    for path in paths:
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_dev, status.st_ino) in seen:
                    continue  # It was renamed while we read.
                seen.add((status.st_dev, status.st_ino))
                for lines in _backwards(file.fileno(), status.st_size, block):
                    if not sums.add(lines):
                        return Restored(sums.remembered(), sums.records, complete)
                    if clock() > until:
                        return Restored(sums.remembered(), sums.records, False)
        except FileNotFoundError:
            continue
        except OSError:
            complete = False
    return Restored(sums.remembered(), sums.records, complete)


def _backwards(file: int, size: int, block: int) -> Iterator[list[bytes]]:
    """The complete lines of a file, a block at a time from its end. A last line that is torn is left out."""
    rest: bytes | None = None  # None until the last line feed was seen
    at = size
    while at > 0:
        start = max(at - block, 0)
        data = os.pread(file, at - start, start)
        at = start
        if rest is None:
            cut = data.rfind(b"\n")
            if cut < 0:
                continue
            data = data[:cut]
            rest = b""
        data += rest
        first = data.find(b"\n") if at else -1
        if at and first < 0:
            rest = data if len(data) <= _MAX_LINE else b""
            continue
        rest = data[:first] if at else b""
        yield data[first + 1 :].split(b"\n")
