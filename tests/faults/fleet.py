"""A fleet to do harm to: a real Redis, the mock provider as a server of its own, and `breakwater serve` processes.

The truth about what was spent is the mock's ledger: what the provider handed out. The gateways' own books (budgets,
roll-ups, outbox, metrics) are what is held against it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from proxy.budget.records import decoded
from proxy.store.redis import RedisStore
from tests.clear import CLEAR
from tests.e2e.stack import ServeProcess
from tests.redis_server import RedisServer

LONG = bool(os.environ.get("BREAKWATER_FAULTS"))
"""The long forms are wanted (`make faults`)."""
PATIENCE = 60.0
"""Seconds before a test gives up. Never reached by a working program, however busy the machine."""
UNHURRIED_MS = 5000
"""For campaigns in which the store is well: a busy machine must not look like a store that is away."""
NANO_PER_TOKEN = 1000
"""What the fleet's one price comes to: a dollar for a million tokens, of input and output alike."""
PROGRAM = (sys.executable, "-m", "proxy")
"""The code beside these tests, whatever is installed."""
ADMIN_KEY = "bw-admin-0123456789abcdef"
Figures = dict[str, float]
Config = dict[str, Any]
Change = Callable[[Config, int], Config]


def key_of(tenant: str) -> str:
    return f"bw-{tenant}-0123456789abcdef"


def limited(tokens: int, **more: Any) -> dict[str, Any]:
    """A budget of so many tokens in a minute, and of their price in a month, which holds however long it takes."""
    return {"tokens_per_minute": tokens, "usd_per_month": tokens * NANO_PER_TOKEN / 1e9, **more}


STRICT = {"estimate": "max", "on_overrun": "cut"}


_said: list[Callable[[str], None]] = []
"""Where the lines of the test that runs go."""


@contextlib.contextmanager
def reporting(say: Callable[[str], None]) -> Iterator[None]:
    _said.append(say)
    try:
        yield
    finally:
        _said.remove(say)


def report(promise: str, count: int, observed: object, bound: object) -> None:
    """One line a figure. Of a count that stayed 0, the rule of three says how rare it may be all the same."""
    rare = f" (95 % sure: below {3 / count:.1e} each)" if observed == 0 and count else ""
    line = f"{promise}: N={count} observed={observed}{rare} bound={bound}"
    print(line)
    for say in _said:
        say(line)


async def until(true: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Waits for what the program is about to do; returns what `true` (which may be a coroutine function) answered."""
    deadline = time.monotonic() + seconds
    while True:
        found = true()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        await asyncio.sleep(0.05)


class MockProcess:
    """`breakwater mock`, with its books."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, "mock", "--port", "0"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
            )
        self.origin = ""

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.origin:
            assert self.process.poll() is None, "the mock did not start"
            assert time.monotonic() < deadline, "the mock did not start"
            if found := re.search(r"(http://\S+)/v1 ", self._log.read_text()):
                self.origin = found[1]
            time.sleep(0.02)

    async def entries(self, since: int = 0) -> list[dict[str, Any]]:
        """What was served after the entry with this id, refusals and requests in flight included."""
        async with httpx2.AsyncClient(timeout=PATIENCE, trust_env=False, verify=CLEAR) as client:
            return list((await client.get(f"{self.origin}/__ledger", params={"since": since})).json()["entries"])

    async def last_id(self) -> int:
        async with httpx2.AsyncClient(timeout=PATIENCE, trust_env=False, verify=CLEAR) as client:
            return int((await client.get(f"{self.origin}/__ledger", params={"limit": 0})).json()["last_id"])

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._folder.cleanup()


@dataclass
class Fleet:
    redis: RedisServer
    mock: MockProcess
    processes: list[ServeProcess]
    parts: contextlib.ExitStack
    """What ends with the fleet."""

    def start(self, config: Config) -> ServeProcess:
        """One process more. It is ready when it says so."""
        process = ServeProcess(config, program=PROGRAM)
        self.parts.callback(process.close)
        self.processes.append(process)
        return process

    @property
    def ports(self) -> list[int]:
        return [each.port for each in self.alive]

    @property
    def alive(self) -> list[ServeProcess]:
        return [each for each in self.processes if each.process.poll() is None]

    async def admin(self, path: str, process: int = 0, **query: str) -> httpx2.Response:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with httpx2.AsyncClient(headers=headers, timeout=PATIENCE, trust_env=False, verify=CLEAR) as client:
            return await client.get(f"{self.alive[process].url}{path}", params=query)

    async def circuits(self, process: int = 0) -> dict[tuple[str, str], dict[str, Any]]:
        """What one process knows of each circuit, by provider and model."""
        answer = await self.admin("/admin/circuits", process)
        assert answer.status_code == 200, answer.text
        return {(row["provider"], row["model"]): row for row in answer.json()}

    async def opened(self) -> None:
        """Every process has reached its store, and saw every scope: what it may go by when the store is away."""

        async def answers(process: int) -> bool:
            return (await self.admin("/admin/budgets", process)).status_code == 200

        for process in range(len(self.alive)):
            await until(lambda number=process: answers(number), "the store to be reached")

    async def budget(self, tenant: str, process: int = 0) -> dict[str, Any]:
        """The tenant's own scope, as `/admin/budgets` shows it."""
        answer = await self.admin(f"/admin/budgets/{tenant}", process)
        assert answer.status_code == 200, answer.text
        return dict(answer.json()[0])

    async def is_quiet(self, tenant: str, process: int = 0) -> bool:
        """Nothing of this tenant is reserved."""
        answer = await self.admin(f"/admin/budgets/{tenant}", process)
        return answer.status_code == 200 and answer.json()[0]["live"] == 0

    async def quiet(self, tenant: str) -> dict[str, Any]:
        """The budget, once nothing is in flight. Held is nothing then, in every window."""
        await until(lambda: self.is_quiet(tenant), f"{tenant} to have nothing in flight")
        found = await self.budget(tenant)
        assert {window["reserved"] for window in found["windows"].values()} <= {0, "0"}, found
        return found

    async def metrics(self) -> Figures:
        """The series of all processes, added up."""
        total: Counter[str] = Counter()
        for process in range(len(self.alive)):
            page = (await self.admin("/metrics", process)).text
            for line in page.splitlines():
                if line.startswith("breakwater_"):
                    name, value = line.rsplit(" ", 1)
                    total[name] += float(value)  # type: ignore[assignment]
        return dict(total)

    @contextlib.asynccontextmanager
    async def store(self) -> AsyncIterator[RedisStore]:
        """For reading what the fleet wrote."""
        store = RedisStore(self.redis.url, timeout_ms=UNHURRIED_MS, setup_ms=UNHURRIED_MS)
        try:
            yield store
        finally:
            await store.aclose()

    async def outbox(self, after: str = "") -> list[dict[str, Any]]:
        """Every record, in order: settled attempts, and reservations that were lost (they have `lost`)."""
        found: list[dict[str, Any]] = []
        async with self.store() as store:
            while records := await store.outbox(after, 5000):
                found += [decoded(record.fields) for record in records]
                after = records[-1].id
        return found

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines of all processes."""
        return [line for each in self.processes for line in each.lines() if line.get("event") == name]


@contextlib.contextmanager
def fleet(
    server: RedisServer,
    count: int,
    tenants: Mapping[str, Mapping[str, Any]],
    *,
    state: str = "",
    timeout_ms: int = UNHURRIED_MS,
    change: Change | None = None,
) -> Iterator[Fleet]:
    """`count` processes on one Redis and one provider. `tenants`: their budgets by name; `state`: another way there;
    `change`: makes of the configuration, and of the number of a process, its own."""
    with contextlib.ExitStack() as parts:
        mock = MockProcess()
        parts.callback(mock.close)
        mock.wait_until_ready()
        config = _config(state or server.url, mock.origin, tenants, timeout_ms)
        found = Fleet(server, mock, [], parts)
        for number in range(count):
            found.start(config if change is None else change(config, number))
        for process in found.processes:
            process.wait_until_ready()
        yield found
        for process in found.processes:
            if process.process.poll() is None:
                process.process.send_signal(signal.SIGTERM)
        for process in found.processes:
            process.process.wait(PATIENCE)
        errors = [line for each in found.processes for line in each.lines() if line["level"] == "error"]
        assert not errors, errors[:5]


def _config(state: str, origin: str, tenants: Mapping[str, Mapping[str, Any]], timeout_ms: int) -> Config:
    facts = {"price": {"input": 1, "output": 1}, "context_window": 128_000, "max_output_tokens": 8_000}
    provider = {
        "kind": "openai",
        "base_url": f"{origin}/v1",
        "api_key": "sk-0123456789abcdef",
        "vendor": "none",
        "max_connections": 1000,
        "models": {"*": facts},
    }
    return {
        "listen": {"drain_ms": 0, "grace_ms": 2000},
        "state": state,
        "state_timeout_ms": timeout_ms,
        "admin": {"keys": [ADMIN_KEY]},
        "providers": {"mock": provider},
        "models": [{"name": "*", "targets": ["mock/*"]}],
        "tenants": [{"name": name, "keys": [key_of(name)], "budget": dict(one)} for name, one in tenants.items()],
    }
