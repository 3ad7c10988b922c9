"""A fault proxy: TCP on loopback that hurts what flows through it, by a script.

Each connection is a `Link` of two ways, `up` (client to server) and `down` (server to client). A way carries its bytes
in order; its `Faults` delay them, slow them down, alter them, and end them after a number of bytes. Both may be set
while the link runs, and count from then on:

    async with wired(port) as wire:
        wire.script = lambda number: Plan(down=Faults(after=700, then=Ending.RESET))  # connections to come
        wire.links[0].down.faults = CLEAN  # one that is there
        await wire.refuse()                # nobody listens here any more, until `listen()`

What comes after the bytes of `after`:

    RESET   both sides get a RST; what has passed arrives first
    FIN     this way ends with a FIN, and the other goes on (a half-close)
    STALL   nothing more is read or sent; it goes on when the faults change
    DROP    what comes is read and thrown away

A stalled or dropping way is over when its receiver says that it sends nothing more: it has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import fcntl
import math
import random
import socket
import struct
import termios
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

_READ = 65_536
_HELD = 4 * _READ
"""Bytes on their way before the sender has to wait, as a network holds some."""
_GRAIN = 0.005
"""Seconds between two pieces where the bandwidth is limited."""


class Ending(enum.Enum):
    RESET = "reset"
    FIN = "fin"
    STALL = "stall"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to one way. Without a word, nothing."""

    latency: float = 0.0
    """Seconds that every byte takes."""
    jitter: float = 0.0
    """Up to so many seconds more. The order stays."""
    bytes_per_second: float = math.inf
    after: int | None = None
    """Bytes that pass before `then`: 0 is at once, None never."""
    then: Ending = Ending.STALL
    corrupt: Callable[[int, bytes], bytes] | None = None
    """Makes of the offset of a piece, and of the piece, what goes on instead."""


CLEAN = Faults()


@dataclass(frozen=True, slots=True)
class Plan:
    """The faults of one connection."""

    up: Faults = CLEAN
    down: Faults = CLEAN


HUNG = Plan(up=Faults(after=0), down=Faults(after=0))
"""Accepts the connection, and says nothing."""
DEAD = Plan(up=Faults(after=0, then=Ending.RESET))
"""Accepts the connection, and resets it."""


def overwritten(at: int, by: bytes) -> Callable[[int, bytes], bytes]:
    """A `corrupt` that puts these bytes over those from offset `at` on."""

    def corrupt(offset: int, piece: bytes) -> bytes:
        begin, end = max(at - offset, 0), min(at + len(by) - offset, len(piece))
        if begin >= end:
            return piece
        return piece[:begin] + by[offset + begin - at : offset + end - at] + piece[end:]

    return corrupt


class Way:
    """The bytes of one direction. Runs until its end has been passed on, or the link is reset."""

    def __init__(
        self, faults: Faults, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chance: random.Random
    ) -> None:
        self._faults = faults
        self._reader = reader
        self._writer = writer
        self._chance = chance
        self._pending: deque[tuple[float, bytes]] = deque()
        self._held = 0
        self._last_due = 0.0
        self._ended = False
        """The sender sends nothing more."""
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self.passed = 0
        """Bytes that went through, before anything was made of them."""
        self.last = 0.0
        """When the last of them did, on the loop's clock."""
        self.dropped = 0
        self.back: Way | None = None
        """The other direction of the same link."""

    @property
    def faults(self) -> Faults:
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._faults = faults
        self._wake.set()

    @property
    def spent(self) -> bool:
        """As many bytes have passed as may: it ends, stalls, or drops."""
        return self._faults.after is not None and self.passed >= self._faults.after

    async def take(self) -> None:
        """Reads what the sender sends."""
        loop = asyncio.get_running_loop()
        while data := await self._reader.read(_READ):
            delay = self._faults.latency + self._chance.uniform(0, self._faults.jitter)
            self._last_due = max(self._last_due, loop.time() + delay)
            self._pending.append((self._last_due, data))
            self._held += len(data)
            self._wake.set()
            while self._held > _HELD:
                self._room.clear()
                await self._room.wait()
        self._ended = True
        self._wake.set()
        if self.back is not None:
            self.back._wake.set()

    async def give(self) -> bool:
        """Passes it on. False: the link is to be reset."""
        while True:
            self._wake.clear()
            if self.spent:
                if self._faults.then is Ending.RESET:
                    await _delivered(self._writer)
                    return False
                if self._faults.then is Ending.FIN or (self.back is not None and self.back._ended):
                    break
                if self._faults.then is Ending.DROP:
                    self._drop()
                await self._wake.wait()
            elif self._pending:
                await self._some()
            elif self._ended:
                break
            else:
                await self._wake.wait()
        self._writer.write_eof()
        while not self._ended:  # nobody gets the rest, and the sender need not know
            self._drop()
            self._wake.clear()
            await self._wake.wait()
        return True

    def _drop(self) -> None:
        self._pending.clear()
        self.dropped += self._held
        self._held = 0
        self._room.set()

    async def _some(self) -> None:
        """Passes a piece on, if it is due; else waits until it is, or until the faults change."""
        faults = self._faults
        due, data = self._pending[0]
        wait = due - asyncio.get_running_loop().time()
        if wait > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            return
        size = len(data) if faults.after is None else min(len(data), faults.after - self.passed)
        if faults.bytes_per_second < math.inf:
            size = min(size, max(1, int(faults.bytes_per_second * _GRAIN)))
            await asyncio.sleep(size / faults.bytes_per_second)
        self._pending[0] = (due, data[size:])
        if size == len(data):
            self._pending.popleft()
        self._held -= size
        self._room.set()
        piece = data[:size]
        self._writer.write(faults.corrupt(self.passed, piece) if faults.corrupt is not None else piece)
        self.passed += size
        self.last = asyncio.get_running_loop().time()
        await self._writer.drain()


class Link:
    """One connection through the proxy, owner of both its sockets."""

    def __init__(
        self,
        number: int,
        plan: Plan,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        chance: random.Random,
    ) -> None:
        self.number = number
        self._writers = (client[1], server[1])
        self.up = Way(plan.up, client[0], server[1], chance)
        self.down = Way(plan.down, server[0], client[1], chance)
        self.up.back, self.down.back = self.down, self.up
        self.over = False

    async def run(self) -> None:
        ways = (self.up, self.down)
        reading = [asyncio.ensure_future(way.take()) for way in ways]
        giving = [asyncio.ensure_future(way.give()) for way in ways]
        tasks = {*reading, *giving}
        try:
            while tasks:
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if task.exception() is not None or task.result() is False:
                        self.reset()
                        return
            for writer in self._writers:
                writer.close()
        except asyncio.CancelledError:
            self.reset()
            raise
        finally:
            self.over = True
            for task in (*reading, *giving):
                task.cancel()
            await asyncio.gather(*reading, *giving, return_exceptions=True)

    def reset(self) -> None:
        """A RST to both sides, now."""
        for writer in self._writers:
            _reset(writer)


def _reset(writer: asyncio.StreamWriter) -> None:
    if writer.transport.is_closing():
        return
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _delivered(writer: asyncio.StreamWriter) -> None:
    """The receiver has every byte: a reset throws away what it has not."""
    descriptor = writer.get_extra_info("socket").fileno()
    while writer.transport.get_write_buffer_size() or _unacknowledged(descriptor):
        await asyncio.sleep(0.001)
        if writer.transport.is_closing():
            return


def _unacknowledged(descriptor: int) -> int:
    answer: int = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))[0]
    return answer


@dataclass
class Wire:
    """A port of 127.0.0.1 that leads to another one."""

    target: int
    script: Callable[[int], Plan] = lambda number: Plan()
    """The faults of a connection, by its number: 0 is the first that was accepted."""
    port: int = 0
    links: list[Link] = field(default_factory=list)
    """All that ever were."""
    accepted: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    _listener: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def live(self) -> list[Link]:
        return [link for link in self.links if not link.over]

    def plan(self, plan: Plan) -> None:
        """These faults from now on, for the connections that are there and for those to come."""
        self.script = lambda number: plan
        for link in self.live:
            link.up.faults, link.down.faults = plan.up, plan.down

    async def listen(self) -> None:
        """On the same port as before. Connections are refused until then."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port, backlog=1024)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Closes the port, and resets the connections that are there, as a server does that is killed."""
        assert self._listener is not None
        self._listener.close()
        await self._listener.wait_closed()
        await self._end()

    async def aclose(self) -> None:
        if self._listener is not None:
            self._listener.close()
            await self._listener.wait_closed()
        await self._end()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self.accepted = self.accepted, self.accepted + 1
        task = asyncio.get_running_loop().create_task(self._serve(number, reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            _reset(writer)
            return
        except asyncio.CancelledError:
            _reset(writer)
            raise
        link = Link(number, self.script(number), (reader, writer), server, self.chance)
        self.links.append(link)
        await link.run()


@contextlib.asynccontextmanager
async def wired(target: int, script: Callable[[int], Plan] | None = None, *, seed: int = 0) -> AsyncIterator[Wire]:
    """A fault proxy before `target`, a port of 127.0.0.1, that does no harm until it is told to."""
    wire = Wire(target, chance=random.Random(seed))
    if script is not None:
        wire.script = script
    await wire.listen()
    try:
        yield wire
    finally:
        await wire.aclose()
