"""Clients of a fleet: requests on raw sockets, refused ones repeated, streams left in the middle."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from tests.e2e.scene import Client
from tests.faults.fleet import Fleet, key_of

_numbers = itertools.count()
_GONE = (ConnectionError, asyncio.IncompleteReadError)


@dataclass(frozen=True, slots=True)
class Job:
    """One request. The models `bench-N` and `bench-N-RATE` of the mock say N tokens, at so many a second."""

    model: str
    max_tokens: int | None
    stream: bool = False
    leave_after: int | None = None
    """Events of the stream after which the client resets its connection."""

    @property
    def output(self) -> int:
        return int(self.model.split("-")[1])


@dataclass(frozen=True, slots=True)
class Outcome:
    job: Job
    request_id: str
    status: int
    """0: the connection was lost before the answer was complete, and not by the client."""
    code: str = ""
    """Of an error."""
    left: bool = False
    degraded: bool = False
    began: float = 0.0
    seconds: float = 0.0
    complete: bool = True
    """A stream has its terminator."""
    finish: str = ""

    @property
    def refused(self) -> bool:
        return self.status == 429


class Caller:
    """One client connection that asks one thing after another."""

    def __init__(self, port: int, tenant: str) -> None:
        self._port = port
        self._tenant = tenant
        self._client: Client | None = None

    async def ask(self, job: Job) -> Outcome:
        name = f"{self._tenant}.{next(_numbers)}"
        began = time.perf_counter()
        try:
            if self._client is None:
                self._client = Client(*await asyncio.open_connection("127.0.0.1", self._port))
            return await self._ask(self._client, job, name, began)
        except _GONE:
            self.close()
            return Outcome(job, name, 0, began=began, seconds=time.perf_counter() - began, complete=False)

    async def _ask(self, client: Client, job: Job, name: str, began: float) -> Outcome:
        members: dict[str, object] = {} if job.max_tokens is None else {"max_tokens": job.max_tokens}
        if job.stream:
            members["stream"] = True
        client.ask(
            job.model, headers={"authorization": f"Bearer {key_of(self._tenant)}", "x-request-id": name}, **members
        )
        status, headers = await client.head()
        degraded = "x-breakwater-degraded" in headers
        if status == 200 and job.leave_after is not None:
            while client.seen.count(b"\n\n") < job.leave_after:
                if not await client.more():
                    break
            else:
                client.reset()
                self._client = None
                return Outcome(job, name, status, "", True, degraded, began, time.perf_counter() - began, False)
        body = await client.rest()
        code = "" if status == 200 else json.loads(body)["error"]["code"]
        seconds = time.perf_counter() - began
        complete = not (job.stream and status == 200) or body.endswith(b"data: [DONE]\n\n")
        return Outcome(job, name, status, code, False, degraded, began, seconds, complete)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


async def ask_once(port: int, tenant: str, job: Job) -> Outcome:
    """On a connection of its own."""
    caller = Caller(port, tenant)
    try:
        return await caller.ask(job)
    finally:
        caller.close()


@dataclass
class Demand:
    """More than the budget holds, from many connections to every process. What is refused is asked again.

    A refused client waits for somebody else's request to end. When all wait, nothing is in flight any more: all ask
    once more, and it is over when that round has admitted nobody.
    """

    fleet: Fleet
    tenant: str
    connections: int
    """To each process."""
    outcomes: list[Outcome] = field(default_factory=list)
    _todo: deque[Job] = field(default_factory=deque)
    _waiting: deque[asyncio.Future[bool]] = field(default_factory=deque)
    """Woken with True they ask again, with False the round is over."""
    _running: int = 0

    async def run(self, jobs: Sequence[Job], between: Callable[[], Awaitable[object]]) -> list[Outcome]:
        """`between`: runs between two rounds, when nothing is asked. Returns what was not refused."""
        self._todo.extend(jobs)
        callers = [Caller(port, self.tenant) for _ in range(self.connections) for port in self.fleet.ports]
        try:
            while self._todo:
                before = len(self.outcomes)
                await asyncio.gather(*(self._work(caller) for caller in callers))
                await between()
                if all(one.refused for one in self.outcomes[before:]):
                    break
        finally:
            for caller in callers:
                caller.close()
        return [one for one in self.outcomes if not one.refused]

    @property
    def refusals(self) -> int:
        return sum(one.refused for one in self.outcomes)

    async def _work(self, caller: Caller) -> None:
        while self._todo:
            job = self._todo.popleft()
            self._running += 1
            outcome = await caller.ask(job)
            self._running -= 1
            self.outcomes.append(outcome)
            if not outcome.refused:
                self._wake(2)
                continue
            self._todo.append(job)
            if not self._running:
                break
            place: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            if not await place:
                return
        if not self._running:
            self._wake(len(self._waiting), again=False)

    def _wake(self, count: int, *, again: bool = True) -> None:
        for _ in range(min(count, len(self._waiting))):
            self._waiting.popleft().set_result(again)


class Stream:
    """An open loop: so many requests a second, whether or not the ones before were answered. So nothing hides."""

    def __init__(self, fleet: Fleet, tenant: str, job: Job, per_second: int) -> None:
        self._idle = {port: deque[Caller]() for port in fleet.ports}
        self._tenant = tenant
        self._job = job
        self._gap = 1 / per_second
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()
        self._pace: asyncio.Task[None] | None = None
        self.outcomes: list[Outcome] = []

    async def __aenter__(self) -> Stream:
        self._pace = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stopped.set()
        assert self._pace is not None
        await self._pace
        await asyncio.gather(*self._tasks)
        for callers in self._idle.values():
            for caller in callers:
                caller.close()

    async def lasts(self, seconds: float) -> list[Outcome]:
        """The outcomes of all that is asked within the next `seconds`, once they are there."""
        loop = asyncio.get_running_loop()
        first, began = len(self.outcomes), time.perf_counter()
        end = loop.time() + seconds
        while loop.time() < end:
            await asyncio.sleep(min(0.05, seconds))
        asked = time.perf_counter()
        pending = set(self._tasks)
        if pending:
            await asyncio.wait(pending)
        return [one for one in self.outcomes[first:] if began <= one.began <= asked]

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        ports = itertools.cycle(self._idle)
        while not self._stopped.is_set():
            task = loop.create_task(self._one(next(ports)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            due += self._gap
            if due > loop.time():
                await asyncio.sleep(due - loop.time())

    async def _one(self, port: int) -> None:
        idle = self._idle[port]
        caller = idle.pop() if idle else Caller(port, self._tenant)
        self.outcomes.append(await caller.ask(self._job))
        idle.append(caller)


def quantile(outcomes: Sequence[Outcome], of_hundred: int) -> float:
    """Milliseconds that so many of a hundred did not exceed."""
    found = sorted(one.seconds for one in outcomes)
    return found[min(len(found) * of_hundred // 100, len(found) - 1)] * 1000
