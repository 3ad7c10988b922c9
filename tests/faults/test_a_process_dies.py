"""P2, P4: `kill -9` of a process under load. Its reservations are charged by policy when their leases are over.

The long form waits for the leases. The short form makes them older at the server, as thirty seconds would.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from tests.faults.books import Books, Served, agree, closed
from tests.faults.fleet import LONG, STRICT, Fleet, fleet, limited, report, until
from tests.faults.load import Job, Outcome, ask_once
from tests.redis_server import RedisServer, running

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

PROCESSES = 4 if LONG else 2
AT_ONCE = 100 if LONG else 20
"""Requests of each tenant to each process."""
PLENTY = 100_000_000
TENANTS = {"charged": limited(PLENTY, **STRICT), "refunded": limited(PLENTY, **STRICT, on_lost="refund")}
JOB = Job("bench-40-20", 100, stream=True)
"""Two seconds: all of them are on their way when a process dies."""
LEASES = b"{bw:0}leases"
LEASE_MS = 30_000
"""As the docs say."""


@pytest.fixture
def server(redis_binary: object, tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path) as found:
        yield found


async def ask_all(found: Fleet, tenant: str) -> list[Outcome]:
    """A crowd at every process, one request each; those of a process that dies break off."""
    return list(await asyncio.gather(*(ask_once(port, tenant, JOB) for port in found.ports for _ in range(AT_ONCE))))


async def all_on_their_way(found: Fleet, leases: redis.Redis) -> tuple[int, dict[str, asyncio.Task[list[Outcome]]]]:
    """Where the provider's ledger stands, and requests of both tenants at every process, all of them reserved."""
    await found.opened()
    for tenant in TENANTS:  # the store is open, and every process knows its way
        await asyncio.gather(*(ask_once(port, tenant, replace(JOB, model="bench-1")) for port in found.ports))
        await found.quiet(tenant)
    since = await found.mock.last_id()
    asked = {tenant: asyncio.create_task(ask_all(found, tenant)) for tenant in TENANTS}
    await until(lambda: int(leases.zcard(LEASES)) == len(TENANTS) * PROCESSES * AT_ONCE, "all to be reserved")
    return since, asked


def let_leases_run_out(leases: redis.Redis) -> None:
    """What the time does by itself, at once."""
    for reservation in leases.zrange(LEASES, 0, -1):
        leases.zincrby(LEASES, -LEASE_MS, reservation)


async def test_what_a_killed_process_had_reserved_is_charged_by_policy_and_nothing_leaks(server: RedisServer) -> None:
    with fleet(server, PROCESSES, TENANTS) as found, server.client() as leases:
        since, asked = await all_on_their_way(found, leases)
        found.processes[0].process.send_signal(signal.SIGKILL)
        found.processes[0].process.wait()
        died = time.monotonic()
        lost = len(TENANTS) * AT_ONCE
        for tenant, each in asked.items():
            outcomes = await each
            assert Counter(one.status for one in outcomes) == {0: AT_ONCE, 200: (PROCESSES - 1) * AT_ONCE}
            assert all(one.complete for one in outcomes if one.status == 200)
            await until(lambda: int(leases.zcard(LEASES)) <= lost, "the survivors to settle")
            held = await found.budget(tenant)
            assert held["live"] == AT_ONCE
            assert held["windows"]["tokens_per_minute"]["reserved"] >= AT_ONCE * JOB.max_tokens
        if not LONG:
            let_leases_run_out(leases)
        for tenant in TENANTS:
            await found.quiet(tenant)
        books = {tenant: await closed(found, tenant, since) for tenant in TENANTS}
        seconds = time.monotonic() - died
        check_lost(books)
        report("P4 kill -9: reservations held after the lease", lost, int(leases.zcard(LEASES)), 0)
        report("P4 kill -9: seconds until all was charged", lost, round(seconds, 1), LEASE_MS / 1000 + 5)
        assert not leases.zcard(LEASES)
        assert seconds <= LEASE_MS / 1000 + 5


def check_lost(books: dict[str, Books]) -> None:
    lost = books["charged"].lost
    assert len({one["lost"] for one in lost}) == len(lost) == len(TENANTS) * AT_ONCE
    charges = [int(one["tokens"]) for one in lost]
    ask = max(charges)
    assert ask >= JOB.max_tokens
    assert sorted(charges) == [0] * AT_ONCE + [ask] * AT_ONCE
    agree(books["charged"], lost_tokens=ask * AT_ONCE)
    agree(books["refunded"])
    own_figures = Counter[Served]()
    for each in books.values():
        assert len(each.records) == (PROCESSES - 1) * AT_ONCE + PROCESSES  # those that opened the store, too
        own_figures.update(each.of(estimated=False)[PROCESSES:])
        assert not each.of(estimated=True)
    # Nothing is charged below what the provider billed: what it billed and nobody settled is within the asks.
    unsettled = Counter(books["charged"].billed)
    unsettled.subtract(own_figures)
    assert min(unsettled.values()) >= 0
    assert unsettled.total() <= len(lost)  # some had been reserved, and not been sent yet
    assert max((given + made for given, made in +unsettled), default=0) <= ask


async def test_a_process_that_only_slept_corrects_what_it_was_charged_once(server: RedisServer) -> None:
    """Its leases run out, it is charged; then it wakes, and settles what it really took."""
    with fleet(server, PROCESSES, TENANTS) as found, server.client() as leases:
        since, asked = await all_on_their_way(found, leases)
        sleeper = found.processes[0].process
        sleeper.send_signal(signal.SIGSTOP)
        try:
            lost = len(TENANTS) * AT_ONCE
            await until(lambda: int(leases.zcard(LEASES)) <= lost, "the others to settle")
            let_leases_run_out(leases)
            for tenant in TENANTS:
                await until(lambda each=tenant: found.is_quiet(each, 1), "the sleeper's leases to run out")
        finally:
            sleeper.send_signal(signal.SIGCONT)
        outcomes = [one for each in asked.values() for one in await each]
        assert {one.status for one in outcomes} == {200}
        assert all(one.complete for one in outcomes)
        expected = PROCESSES * AT_ONCE + PROCESSES
        await until(lambda: all_settled(found, len(TENANTS) * expected), "the late settlements")
        own_figures = Counter[Served]()
        for tenant in TENANTS:
            books = await closed(found, tenant, since)
            agree(books)
            assert len(books.lost) == lost
            own_figures.update(books.of(estimated=False)[PROCESSES:])
        assert own_figures == Counter(books.billed)
        report("P2 late settlements: tokens charged twice or not at all", lost, 0, 0)


async def all_settled(found: Fleet, count: int) -> bool:
    return len([one for one in await found.outbox() if "lost" not in one]) == count
