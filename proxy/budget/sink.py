"""The ledger as a file of JSON lines, and what a restarted process learns from it.

A sink follows the store's outbox. Each line carries the outbox's own id, so that after a restart the last line says
where to go on: nothing is written twice, and nothing is left out that the outbox still has. Of several processes with
one file, the one that holds its lock writes, and the others stand by.

A file that has reached its size is renamed to FILE.1, FILE.1 to FILE.2, and so on; the oldest is removed. Writing is
done in a thread, a batch at a time. A disk that is full is tried again: what the outbox keeps meanwhile is not lost.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from proxy.budget.clocks import DAY_MS, HOUR_MS, month_of, month_start
from proxy.budget.records import Value, decoded
from proxy.store.base import BudgetStore, Record, Remembered, Scope, StoreUnavailable

POLL_SECONDS: Final = 0.5
BATCH: Final = 1000
_TAIL_BYTES: Final = 65_536

_encode = msgspec.json.Encoder().encode


class LedgerFile:
    """The file itself: append, rotate, find the place to go on from. Blocking; one thread at a time."""

    def __init__(self, path: Path, *, max_bytes: int, keep: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._lock: int | None = None
        self._size = 0

    def acquire(self) -> bool:
        """Takes the lock of the file; False if another process has it. Raises OSError."""
        if self._lock is None:
            lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                return False
            except BaseException:
                os.close(lock)
                raise
            self._lock = lock
        return True

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)  # which lets go of it
            self._lock = None

    def last_id(self) -> str:
        """The outbox id of the last complete line; empty where there is none. A torn last line is cut off."""
        for path in (self.path, self._rotated(1)):
            with suppress(FileNotFoundError):
                found = self._last_id(path, repair=path is self.path)
                if found:
                    return found
        return ""

    def _last_id(self, path: Path, *, repair: bool) -> str:
        with path.open("r+b" if repair else "rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(size - _TAIL_BYTES, 0)
            file.seek(start)
            tail = file.read(_TAIL_BYTES)
            complete = tail.rfind(b"\n") + 1
            if repair and complete < len(tail):
                file.truncate(start + complete)
                size = start + complete
            if repair:
                self._size = size
        for line in reversed(tail[:complete].splitlines()):
            record = _line(line)
            if record is not None and isinstance(found := record.get("outbox"), str):
                return found
        return ""

    def append(self, records: Sequence[Record]) -> None:
        """Writes them all and asks the disk to keep them. Raises OSError; what was written of them is taken back."""
        data = b"".join([_encode({"outbox": one.id, **decoded(one.fields)}) + b"\n" for one in records])
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            before = os.lseek(file, 0, os.SEEK_END)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(file, view) :]
                os.fdatasync(file)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file, before)
                raise
            self._size = before + len(data)
        finally:
            os.close(file)
        if self._size >= self._max_bytes:
            self._rotate()

    def _rotate(self) -> None:
        for number in range(self._keep, 0, -1):
            source = self.path if number == 1 else self._rotated(number - 1)
            with suppress(FileNotFoundError):
                source.replace(self._rotated(number))
        self._size = 0

    def _rotated(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def lines(self, since_ms: int) -> Iterator[Mapping[str, Value]]:
        """Every readable record of this file and those it was renamed to, unless a file is older than `since_ms`."""
        for path in (self.path, *(self._rotated(number) for number in range(1, self._keep + 1))):
            try:
                if path.stat().st_mtime_ns // 1_000_000 < since_ms:
                    continue
                file = path.open("rb")
            except FileNotFoundError:
                continue
            with file:
                for line in file:
                    if (record := _line(line)) is not None:
                        yield record


def _line(text: bytes) -> dict[str, Value] | None:
    try:
        record = msgspec.json.decode(text, type=dict[str, str | int | bool])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return record


class FileSink:
    """Follows a store's outbox into a file. `aclose` writes what is still there."""

    def __init__(self, store: BudgetStore, file: LedgerFile, *, poll_seconds: float = POLL_SECONDS) -> None:
        self.file = file
        self.failures = 0
        """Attempts to write that the system refused, since the last one that succeeded."""
        self._store = store
        self._poll = poll_seconds
        self._after: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._working: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
            with suppress(OSError, StoreUnavailable):
                await self.drain()
        self.file.close()

    async def drain(self) -> int:
        """Writes what the outbox has. Returns how many records. Raises OSError and StoreUnavailable."""
        written = 0
        if self._working is not None:
            # Whoever was cancelled left a thread at work: what it does is not to be done again.
            await asyncio.gather(self._working, return_exceptions=True)
        if self._after is None:
            await self._work(self._begin())
        while self._after is not None and (records := await self._store.outbox(self._after, BATCH)):
            await self._work(self._write(records))
            written += len(records)
        return written

    async def _work(self, step: Coroutine[Any, Any, None]) -> None:
        self._working = asyncio.get_running_loop().create_task(step)
        await asyncio.shield(self._working)

    async def _begin(self) -> None:
        if await asyncio.to_thread(self.file.acquire):
            self._after = await asyncio.to_thread(self.file.last_id)

    async def _write(self, records: Sequence[Record]) -> None:
        await asyncio.to_thread(self.file.append, records)
        self._after = records[-1].id

    async def _follow(self) -> None:
        while True:
            try:
                await self.drain()
                self.failures = 0
            except OSError:
                self.failures += 1
            except StoreUnavailable:
                pass  # Whoever asks it for budgets says so.
            await asyncio.sleep(self._poll)


def restored(records: Iterable[Mapping[str, Value]], scopes: Iterable[Scope], now_ms: int) -> list[Remembered]:
    """What the records of a ledger say was spent in the hour, day and month that `now_ms` is in. Pure.

    Records of lost reservations name no scope; their cost is not in here. Lines that are none of ours count as nothing.
    """
    hour, day = now_ms // HOUR_MS, now_ms // DAY_MS
    month = month_of(day)
    begin = (hour * HOUR_MS, day * DAY_MS, month_start(month))
    spent: dict[str, list[int]] = {}
    for record in records:
        at, nano = record.get("at"), record.get("nano_usd")
        if not isinstance(at, int) or not isinstance(nano, int) or at < begin[2] or at > now_ms or nano < 0:
            continue
        for place in _places(record):
            sums = spent.setdefault(place, [0, 0, 0])
            for index in range(3):
                if at >= begin[index]:
                    sums[index] += nano
    found = []
    for scope in scopes:
        hour_spent, day_spent, month_spent = spent.get(scope.place, (0, 0, 0))
        found.append(Remembered(scope, (hour, day, month), (hour_spent, day_spent, month_spent)))
    return found


def _places(record: Mapping[str, Value]) -> list[str]:
    tenant, key, provider = (str(record.get(name, "")) for name in ("tenant", "key", "provider"))
    places = [Scope("global", "").place, Scope("tenant", tenant).place, Scope("provider", provider).place]
    return [*places, Scope("key", f"{tenant}/{key}").place] if key else places


def oldest_needed(now_ms: int) -> int:
    """Where the month of `now_ms` begins: nothing before it matters to a window."""
    return month_start(month_of(now_ms // DAY_MS))
