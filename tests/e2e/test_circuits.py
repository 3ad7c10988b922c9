"""Circuits over real sockets: an outage that a second target hides, one that nothing hides, and two processes that
agree on it through Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from proxy.observability.upstream_events import CircuitClosed, CircuitHalfOpen, CircuitOpened
from tests.clear import CLEAR
from tests.e2e.scene import ANSWER, CHAT, END, PATIENCE, SSE, chunk, piece_of, plain, until
from tests.e2e.stack import ServeProcess, Stack, serving, stack
from tests.e2e.test_failover import BODY, ERROR, Provider, provider
from tests.redis_server import RedisServer, redis_binary, running
from tests.transport.servers import Peer, Received

__all__ = ["redis_binary"]  # a fixture, found here by pytest

pytestmark = pytest.mark.anyio

ADMIN = "bw-admin-key-0123456789"
DOWN = plain(ERROR, 503)
RECOVERY_MS = 300
LONGER_MS = 1500
"""Where several requests must come before it, on a busy machine as well."""


def config(*providers: Provider, recovery_ms: int = RECOVERY_MS, **more: Any) -> dict[str, Any]:
    """`m` leads to all of `providers` in turn."""
    names = "abc"[: len(providers)]
    breaker = {"recovery_timeout_ms": recovery_ms}
    return {
        "listen": {"drain_ms": 0, "grace_ms": 1000},
        "admin": {"keys": [ADMIN]},
        "providers": {name: one.settings for name, one in zip(names, providers, strict=True)},
        "models": [{"name": "m", "targets": [f"{name}/m-{name}" for name in names]}],
        "fault_tolerance": {"retry": {"max_attempts": 2, "base_delay_ms": 1}, "circuit_breaker": breaker},
        **more,
    }


class Seen:
    """A running proxy, as a client and an operator see it."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def ask(self) -> httpx2.Response:
        async with httpx2.AsyncClient(base_url=self.url, timeout=PATIENCE, verify=CLEAR) as client:
            return await client.post(CHAT, json=BODY)

    async def answerer(self) -> str:
        answer = await self.ask()
        assert answer.status_code == 200, answer.text
        return answer.headers["x-breakwater-provider"]

    async def circuit(self, name: str = "a") -> dict[str, Any]:
        headers = {"authorization": f"Bearer {ADMIN}"}
        async with httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=PATIENCE, verify=CLEAR) as admin:
            rows: list[dict[str, Any]] = (await admin.get("/admin/circuits")).json()
        (row,) = [row for row in rows if row["provider"] == name] or [{"state": "unknown"}]
        return row

    async def shows(self, value: int) -> None:
        """The gauge does; its page is up to a second old."""
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while await self.gauge() != value:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.05)

    async def gauge(self, name: str = "a") -> int:
        async with httpx2.AsyncClient(base_url=self.url, timeout=PATIENCE, verify=CLEAR) as client:
            page = (await client.get("/metrics")).text
        (line,) = [one for one in page.splitlines() if one.startswith(f'breakwater_circuit_state{{provider="{name}"')]
        return int(float(line.rpartition(" ")[2]))

    async def becomes(self, state: str, why: str) -> dict[str, Any]:
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while (row := await self.circuit())["state"] != state:
            assert asyncio.get_running_loop().time() < deadline, f"waited in vain: {why}: {row}"
            await asyncio.sleep(0.02)
        return row


def moves(running: Stack) -> list[str]:
    """Changes of state. (A circuit opens a second time when the fleet says so too.)"""
    kinds = (CircuitOpened, CircuitHalfOpen, CircuitClosed)
    changes = [event for event in running.events if isinstance(event, kinds)]
    return [one.event for one in changes if not (isinstance(one, CircuitOpened) and one.was == "open")]


# --- one process ----------------------------------------------------------------------------------------------------


async def test_an_outage_that_the_second_target_hides() -> None:
    async with provider(DOWN) as a, provider() as b, stack(config(a, b, recovery_ms=LONGER_MS)) as proxy:
        seen = Seen(proxy.url)
        assert [await seen.answerer() for _ in range(8)] == ["b"] * 8
        assert len(a.asked) == 5  # then it is open
        assert (await seen.circuit())["state"] == "open"
        await seen.shows(2)
        a.plays(plain(ANSWER))
        await asyncio.sleep(LONGER_MS * 1.2 / 1000)  # what no event announces: the longest time that it stays open
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while await seen.answerer() != "a":
            assert asyncio.get_running_loop().time() < deadline
        assert (await seen.becomes("closed", "the probe succeeded"))["failures_in_a_row"] == 0
        await seen.shows(0)
        assert moves(proxy) == ["circuit.opened", "circuit.half_open", "circuit.closed"]


async def test_with_one_target_the_refusal_is_at_once() -> None:
    async with provider(DOWN) as a, stack(config(a, recovery_ms=60_000)) as proxy:
        seen = Seen(proxy.url)
        for _ in range(3):
            assert (await seen.ask()).status_code == 503
        assert len(a.asked) == 5  # two attempts each, and the last one's second finds the circuit open
        began = asyncio.get_running_loop().time()
        refused = await seen.ask()
        assert asyncio.get_running_loop().time() - began < 1.0
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "upstream_unavailable")
        assert refused.headers["x-should-retry"] == "false"
        assert "x-breakwater-provider" not in refused.headers  # nobody was asked
        assert [one["reason"] for one in refused.json()["error"]["breakwater"]["attempts"]] == ["circuit_open"]
        assert len(a.asked) == 5


async def test_one_request_of_many_is_the_probe() -> None:
    answer = asyncio.Event()

    async def slowly(peer: Peer, received: Received) -> None:
        await answer.wait()
        await peer.send(plain(ANSWER))

    async with provider(DOWN) as a, stack(config(a)) as proxy:
        seen = Seen(proxy.url)
        while len(a.asked) < 5:
            assert (await seen.ask()).status_code == 503
        a.plays(slowly)
        await asyncio.sleep(RECOVERY_MS * 1.2 / 1000)
        asking = [asyncio.create_task(seen.ask()) for _ in range(20)]
        await until(lambda: sum(one.done() for one in asking) == 19, "all but the probe to be refused")
        assert len(a.asked) == 6
        answer.set()
        statuses = sorted([(await one).status_code for one in asking])
        assert statuses == [200] + [503] * 19
        assert (await seen.ask()).status_code == 200


async def test_observed_circuits_refuse_nothing() -> None:
    tolerance = {"retry": {"max_attempts": 1}, "circuit_breaker": {"mode": "observe"}}
    async with provider(DOWN) as a, stack(config(a, fault_tolerance=tolerance)) as proxy:
        seen = Seen(proxy.url)
        for _ in range(7):
            await seen.ask()
        assert len(a.asked) == 7
        assert (await seen.circuit())["state"] == "open"
        assert {event.mode for event in proxy.events if isinstance(event, CircuitOpened)} == {"observe"}


async def test_what_is_the_clients_own_fault_opens_nothing() -> None:
    async with provider(plain(ERROR, 400)) as a, stack(config(a)) as proxy:
        seen = Seen(proxy.url)
        for _ in range(6):
            assert (await seen.ask()).status_code == 400
        assert (await seen.circuit())["state"] == "closed"
        assert len(a.asked) == 6


@pytest.mark.parametrize("status", [401, 402, 403, 429])
async def test_what_is_the_credentials_fault_opens_nothing(status: int) -> None:
    async with provider(plain(ERROR, status)) as a, provider() as b, stack(config(a, b)) as proxy:
        seen = Seen(proxy.url)
        for _ in range(7):
            assert await seen.answerer() == "b"
        row = await seen.circuit()
        assert (row["state"], row["last_10_seconds"]["failed"]) == ("closed", 0)
        assert moves(proxy) == []


async def cut(peer: Peer, received: Received) -> None:
    await peer.send(SSE + chunk(piece_of("Hi")))
    peer.reset()


async def stalls(peer: Peer, received: Received) -> None:
    await peer.send(SSE)
    await peer.gone()


@pytest.mark.parametrize("breaks", [cut, stalls])
async def test_streams_that_are_cut_or_never_begin_open_it(breaks: Any) -> None:
    async with provider(breaks) as a:
        settings = config(a, recovery_ms=60_000)
        settings["providers"]["a"]["timeouts"] = {"first_event_ms": 30}
        async with stack(settings) as proxy:
            async with httpx2.AsyncClient(base_url=proxy.url, timeout=PATIENCE, verify=CLEAR) as client:
                for _ in range(6):
                    answer = await client.post(CHAT, json={**BODY, "stream": True})
                    assert answer.status_code == 200 or answer.json()["error"]["type"] == "upstream_error"
            row = await Seen(proxy.url).circuit()
            assert row["state"] == "open"
            assert len(a.asked) == 5


@pytest.mark.parametrize("code", ["content_filter", "context_length_exceeded", "rate_limit_exceeded"])
async def test_an_error_event_that_is_no_fault_of_the_providers_opens_nothing(code: str) -> None:
    refusal = b'data: {"error":{"message":"no","type":"","code":"%b"}}\n\n' % code.encode()

    async def stops(peer: Peer, received: Received) -> None:
        await peer.send(SSE + chunk(piece_of("Hi")) + chunk(refusal) + END)

    async with provider(stops) as a, stack(config(a)) as proxy:
        async with httpx2.AsyncClient(base_url=proxy.url, timeout=PATIENCE) as client:
            for _ in range(6):
                answer = await client.post(CHAT, json={**BODY, "stream": True})
                assert answer.content.endswith(refusal)
        row = await Seen(proxy.url).circuit()
        assert (row["state"], row["last_10_seconds"]["failed"]) == ("closed", 0)


async def test_a_deadline_of_the_clients_own_opens_nothing() -> None:
    async def hangs(peer: Peer, received: Received) -> None:
        await peer.gone()

    async with provider(hangs) as a, stack(config(a)) as proxy:
        async with httpx2.AsyncClient(base_url=proxy.url, timeout=PATIENCE, verify=CLEAR) as client:
            for _ in range(6):
                answer = await client.post(CHAT, json=BODY, headers={"x-breakwater-timeout-ms": "20"})
                assert answer.status_code == 504
        row = await Seen(proxy.url).circuit()
        assert (row["state"], row["last_10_seconds"]["failed"]) == ("closed", 0)


# --- a fleet --------------------------------------------------------------------------------------------------------


@pytest.fixture
def redis(redis_binary: Path, tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path) as server:
        yield server


def lives(server: RedisServer, namespace: str) -> Callable[[], int]:
    """How many processes the fleet has."""
    client = server.client()
    return lambda: client.hlen(f"{{bw:{namespace}}}circuit-processes")  # type: ignore[return-value]


@pytest.mark.slow
async def test_two_processes_agree_on_an_outage_and_on_its_end(redis: RedisServer) -> None:
    namespace = f"of-{uuid4().hex[:8]}"
    async with provider(DOWN) as a, provider() as b:
        shared = {"state": redis.url, "state_namespace": namespace, "state_timeout_ms": 2000}
        settings = config(a, b, recovery_ms=1000, **shared)
        with ExitStack() as exits:
            processes: list[ServeProcess] = [exits.enter_context(serving(settings)) for _ in range(2)]
            one, other = (Seen(process.url) for process in processes)
            count = lives(redis, namespace)
            await until(lambda: count() == 2, "both processes to be known")
            for _ in range(6):
                assert await one.answerer() == "b"
            row = await one.circuit()
            assert (row["state"], row["scope"]) == ("open", "process")
            assert len(a.asked) == 5
            for _ in range(5):
                assert await other.answerer() == "b"  # one process that fails is no proof: it goes on asking
            assert len(a.asked) == 10
            for seen in (one, other):
                row = await seen.becomes("open", "the fleet to agree")
                deadline = asyncio.get_running_loop().time() + 1.0
                while (row := await seen.circuit())["scope"] != "fleet" and row["state"] == "open":
                    assert asyncio.get_running_loop().time() < deadline, row
                    await asyncio.sleep(0.02)
                assert len(row["opened_by"]) == 2
            a.plays(plain(ANSWER))
            deadline = asyncio.get_running_loop().time() + PATIENCE
            while "a" not in {await one.answerer(), await other.answerer()}:
                assert asyncio.get_running_loop().time() < deadline
            for seen in (one, other):
                await seen.becomes("closed", "both to close")
            opened = processes[1].wait_for("circuit.opened")
            assert opened[-1]["scope"] == "fleet"
            assert len(opened[-1]["why"]) == 2
