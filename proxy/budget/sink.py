"""The ledger as a file of JSON lines (`records.written`). What a restarted process learns from it: `restore`.

A sink follows the store's outbox. Each line carries the outbox's own id, so that after a restart the last line says
where to go on: nothing is written twice, and nothing is left out that the outbox still has. Of several processes with
one file, the one that holds its lock (FILE.lock) writes, and the others stand by.

A file that has reached its size is renamed to FILE.1, FILE.1 to FILE.2, and so on; the oldest is removed. Writing is
done in a thread, a batch at a time. What the system refuses is tried again until it succeeds: what the outbox keeps
meanwhile is not lost, and no request waits.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import re
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from proxy.budget.records import written
from proxy.observability.events import InternalFault, LedgerResumed, LedgerStalled, Notice
from proxy.store.base import BudgetStore, Record, StoreUnavailable

POLL_SECONDS: Final = 0.5
"""How far the file is behind, at most, as long as it can be written."""
CLOSE_SECONDS: Final = 5.0
"""What a disk that does not answer may add to the end of the process."""
BATCH: Final = 250
_TAIL_BYTES: Final = 65_536
_ID: Final = re.compile(r"[0-9]{1,19}-[0-9]{1,20}", re.ASCII)
_REASONS: Final = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.ENOENT: "missing",
    errno.ENOTDIR: "missing",
    errno.EACCES: "forbidden",
    errno.EPERM: "forbidden",
    errno.EROFS: "forbidden",
}

_encode = msgspec.json.Encoder().encode


class _Identified(msgspec.Struct):
    outbox: str


_identify = msgspec.json.Decoder(_Identified).decode


class LedgerFile:
    """The file itself: append, rotate, find the place to go on from. Blocking; one thread at a time."""

    def __init__(self, path: Path, *, max_bytes: int, keep: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._lock: int | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file and those that it was renamed to, the newest first."""
        return (self.path, *(self._rotated(number) for number in range(1, self._keep + 1)))

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
        for path in self.paths[:2]:
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
        for line in reversed(tail[:complete].splitlines()):
            with suppress(msgspec.DecodeError, UnicodeDecodeError):
                found = _identify(line).outbox
                if _ID.fullmatch(found):
                    return found
        return ""

    def append(self, records: Sequence[Record]) -> None:
        """Writes them all and asks the disk to keep them. Raises OSError; what was written of them is taken back."""
        data = b"".join([_encode(written(one)) + b"\n" for one in records])
        file = self._open()
        try:
            if os.lseek(file, 0, os.SEEK_END) >= self._max_bytes:
                os.close(file)
                file = -1
                self._rotate()
                file = self._open()
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
        finally:
            if file >= 0:
                os.close(file)

    def _open(self) -> int:
        # Not blocking: a pipe in the place of the file would hold the thread until somebody reads it.
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)

    def _rotate(self) -> None:
        for number in range(self._keep, 0, -1):
            source = self.path if number == 1 else self._rotated(number - 1)
            with suppress(FileNotFoundError):
                source.replace(self._rotated(number))

    def _rotated(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


class FileSink:
    """Follows a store's outbox into a file. `aclose` writes what is still there.

    `shared`: other processes have the same outbox, so it is well if one of them holds the file. Without it the outbox
    is this process's own and begins with it: all of it is new to the file.
    `clock` reads seconds; `emit` is told once of each change of state.
    """

    def __init__(
        self,
        store: BudgetStore,
        file: LedgerFile,
        *,
        shared: bool,
        clock: Callable[[], float],
        emit: Callable[[Notice], None],
        poll_seconds: float = POLL_SECONDS,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        self.file = file
        self._store = store
        self._shared = shared
        self._clock = clock
        self._emit = emit
        self._poll = poll_seconds
        self._close = close_seconds
        self._after: str | None = None
        """The id of the last record that the file has; None: the file is not ours yet."""
        self._doubtful: tuple[str, ...] = ()
        """Ids of a batch of which the system refused a part."""
        self._stalled: float | None = None
        """Since when nothing is written."""
        self._gap = False
        """Records left the outbox before they were written, since then."""
        self._task: asyncio.Task[None] | None = None
        self._working: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def aclose(self) -> None:
        """Call it when the last settlement is booked, and before the store is closed."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
            with suppress(TimeoutError):
                async with asyncio.timeout(self._close):
                    await self._turn()
        self.file.close()

    async def drain(self) -> int:
        """Writes what the outbox has. Returns how many records. Raises OSError and StoreUnavailable."""
        total = 0
        if self._working is not None:
            # Whoever was cancelled left a thread at work: what it does is not to be done again.
            await asyncio.gather(self._working, return_exceptions=True)
        if self._after is None:
            await self._work(self._begin())
        elif self._doubtful:
            await self._work(self._recover())
        while self._after is not None:
            if self._stalled is not None:  # else it read on in time
                self._gap = self._gap or await self._has_gap()
            records = await self._store.outbox(self._after, BATCH)
            if not records:
                break
            await self._work(self._write(records))
            total += len(records)
        return total

    async def _work(self, step: Coroutine[Any, Any, None]) -> None:
        self._working = asyncio.get_running_loop().create_task(step)
        await asyncio.shield(self._working)

    async def _begin(self) -> None:
        if await asyncio.to_thread(self.file.acquire):
            last = await asyncio.to_thread(self.file.last_id)
            self._after = last if self._shared else ""

    async def _recover(self) -> None:
        last = await asyncio.to_thread(self.file.last_id)
        if last in self._doubtful:
            self._after = last
        self._doubtful = ()

    async def _write(self, records: Sequence[Record]) -> None:
        self._doubtful = tuple(one.id for one in records)
        await asyncio.to_thread(self.file.append, records)
        self._doubtful = ()
        self._after = records[-1].id

    async def _follow(self) -> None:
        while True:
            await self._turn()
            await asyncio.sleep(self._poll)

    async def _turn(self) -> None:
        try:
            await self.drain()
        except OSError as error:
            self._stall(_REASONS.get(error.errno or 0, "io"))
        except StoreUnavailable:
            pass  # Whoever asks it for budgets says so.
        except Exception as fault:  # One record that nobody can write must not end the ledger in silence.
            if self._stalled is None:
                self._emit(InternalFault(where="writing the ledger", exc=fault))
            self._stall("internal")
        else:
            if self._after is None and not self._shared:
                self._stall("locked")
            elif self._stalled is not None:
                away = self._clock() - self._stalled
                gap, self._gap, self._stalled = self._gap, False, None
                self._emit(LedgerResumed(file=str(self.file.path), away=away, gap=gap))

    def _stall(self, reason: str) -> None:
        if self._stalled is None:
            self._stalled = self._clock()
            self._emit(LedgerStalled(file=str(self.file.path), reason=reason))

    async def _has_gap(self) -> bool:
        """Whether the outbox may have dropped records that were never written."""
        if not self._after:
            return False
        oldest = await self._store.outbox("", 1)
        return bool(oldest) and _order(oldest[0].id) > _order(self._after)


def _order(record_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = record_id.partition("-")
    return int(milliseconds), int(sequence)
