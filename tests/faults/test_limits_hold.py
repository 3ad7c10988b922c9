"""P1: a fleet never spends more than a limit, and lets nearly all of it be spent. By the provider's own ledger.

Strict tenants: not a token more, but for one chunk of each stream that a client left (the provider may have sent it
when we hung up). Adaptive ones: within the bound that the administration publishes.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.faults.books import Books, agree, agree_with_the_provider, closed, metrics_add_up
from tests.faults.fleet import LONG, STRICT, Fleet, fleet, limited, report
from tests.faults.load import Demand, Job, Outcome, ask_once
from tests.redis_server import running

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

PROCESSES = 4 if LONG else 2
CONNECTIONS = 250 if LONG else 50
SEEDS = range(3) if LONG else range(1)
PROMPT = 10
"""Tokens of the prompt that every job has."""
OVER = 150
"""By how many tokens the largest that an input can be is more than what it has."""
CHUNK_TOKENS = 1

STEADY = Job("bench-40", 40)
STREAM = Job(f"bench-6-{3 if LONG else 20}", 6, stream=True)
"""Its chunks are so far apart that a hang-up takes less time on its way from the client to the provider, even where a
thousand connections fill the processors."""
LASTING = Job("bench-8000-9999", 8000)
"""Most of a second."""
SHORT, HUGE = Job("bench-20", 8000), Job("bench-8000", 8000)


def steady(limit: int, rng: random.Random) -> list[Job]:
    return [STEADY] * (3 * limit // (STEADY.output + PROMPT))


def streams_and_cancels(limit: int, rng: random.Random) -> list[Job]:
    jobs: list[Job] = []
    demand = 0
    while demand < 3 * limit:
        left = replace(STREAM, leave_after=rng.randrange(2, 6))
        jobs.append(rng.choice([STEADY, STREAM, left]))
        demand += jobs[-1].output + PROMPT
    return jobs


def bimodal_burst(limit: int, rng: random.Random) -> list[Job]:
    """96 % small replies and 4 % huge ones; nobody can tell them apart before."""
    jobs = [HUGE if rng.random() < 0.04 else SHORT for _ in range(3 * limit // 350)]
    assert sum(job.output + PROMPT for job in jobs) > 2.5 * limit
    return jobs


PARALLEL = 500 if LONG else 60
PAUSING = Job("bench-40-20", 300)
"""Two seconds: all are on their way at once."""


def turning(limit: int, rng: random.Random) -> list[Job]:
    """Brief for as long as it takes to be known as brief; then every reply is huge, and all of them at once."""
    brief = [SHORT] * 60 * PROCESSES
    return [*brief, *[LASTING] * max(3 * limit // (LASTING.output + PROMPT), 2 * CONNECTIONS * PROCESSES)]


MIXES = {"steady": steady, "streams": streams_and_cancels, "bimodal": bimodal_burst}
TURNING = {**MIXES, "turning": turning}
SMALL = (1000 if LONG else 100) * (40 + OVER)
LARGE = 50 * (HUGE.max_tokens + OVER)
LIMITS = {"steady": SMALL, "streams": 50 * (40 + OVER) * (10 if LONG else 1), "bimodal": LARGE, "turning": LARGE}
LARGEST = {
    "steady": STEADY.max_tokens,
    "streams": STEADY.max_tokens,
    "bimodal": HUGE.max_tokens,
    "turning": HUGE.max_tokens,
}


@pytest.fixture(scope="module")
def crowd(redis_binary: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    tenants = {}
    for seed in SEEDS:
        for name, limit in LIMITS.items():
            assert limit >= 50 * (LARGEST[name] + OVER)
            tenants[f"strict-{name}-{seed}"] = limited(limit, **STRICT)
            tenants[f"adaptive-{name}-{seed}"] = limited(limit)
    for name, budget in (("strict", STRICT), ("adaptive", {})):
        for times in (PARALLEL, PARALLEL // 2):
            tenants[f"{name}-{times}"] = limited(times * (PAUSING.max_tokens + OVER), **budget)
    with running(tmp_path_factory.mktemp("redis")) as server, fleet(server, PROCESSES, tenants) as crowd:
        yield crowd


async def campaign(crowd: Fleet, tenant: str, jobs: list[Job]) -> tuple[Books, list[Outcome]]:
    """Demands all of `jobs`, closes the books, and checks all that holds for every campaign."""
    await crowd.opened()
    before, since = await crowd.metrics(), await crowd.mock.last_id()
    demand = Demand(crowd, tenant, CONNECTIONS)
    if brief := [job for job in jobs if job is SHORT and LASTING in jobs]:
        await demand.run(brief, lambda: crowd.quiet(tenant))
        jobs = jobs[len(brief) :]
    admitted = await demand.run(jobs, lambda: crowd.quiet(tenant))
    assert {one.status for one in admitted} == {200}
    assert {one.code for one in demand.outcomes if one.refused} == {"budget_exceeded"}
    assert all(one.complete or one.left for one in admitted)
    books = await closed(crowd, tenant, since)
    agree(books)
    assert len(books.records) == len(books.billed) == len(admitted)
    await metrics_add_up(crowd, before, books, demand.outcomes, demand.refusals)
    assert not crowd.events("store.degraded")
    return books, admitted


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mix", MIXES)
async def test_a_strict_budget_is_never_overspent_and_nearly_used_up(crowd: Fleet, mix: str, seed: int) -> None:
    limit, tenant = LIMITS[mix], f"strict-{mix}-{seed}"
    books, admitted = await campaign(crowd, tenant, MIXES[mix](limit, random.Random(seed)))
    left = sum(one.left for one in admitted)
    if left:
        # What a client left is estimated from what it saw, and the provider may have sent a chunk more.
        unseen = books.provider_tokens - books.spent_tokens
        report(f"P1 strict {mix}: tokens that nobody saw, of streams that were left", left, unseen, left * CHUNK_TOKENS)
        assert abs(unseen) <= left * CHUNK_TOKENS
        assert len(books.of(estimated=True)) <= left
    else:
        agree_with_the_provider(books)
    overshoot = max(books.provider_tokens - limit, 0)
    report(f"P1 strict {mix}: tokens over the limit", len(admitted), overshoot, left * CHUNK_TOKENS)
    report(f"P1 strict {mix}: admitted / limit", len(admitted), books.spent_tokens / limit, ">= 0.97")
    assert books.spent_tokens <= limit
    assert overshoot <= left * CHUNK_TOKENS
    assert books.spent_tokens >= 0.97 * limit


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mix", TURNING)
async def test_an_adaptive_budget_is_overspent_by_no_more_than_its_published_bound(
    crowd: Fleet, mix: str, seed: int
) -> None:
    limit, tenant = LIMITS[mix], f"adaptive-{mix}-{seed}"
    books, admitted = await campaign(crowd, tenant, TURNING[mix](limit, random.Random(seed)))
    bound = 0
    for process in range(len(crowd.alive)):
        bound += (await crowd.budget(tenant, process))["windows"]["tokens_per_minute"]["bound"]
    left = sum(one.left for one in admitted)
    overshoot = max(books.provider_tokens - limit, 0)
    report(f"P1 adaptive {mix}: tokens over the limit {limit}", len(admitted), overshoot, bound)
    assert overshoot <= bound + left * CHUNK_TOKENS
    assert books.spent_tokens >= 0.97 * limit
    if not left:
        agree_with_the_provider(books)


@pytest.mark.parametrize("name", ["strict", "adaptive"])
async def test_requests_at_once_are_all_admitted_where_their_maxima_fit_and_else_refused_with_429(
    crowd: Fleet, name: str
) -> None:
    """At $0 spent; and never 400, for each of them alone would fit."""
    await crowd.opened()
    for times in (PARALLEL, PARALLEL // 2):
        tenant = f"{name}-{times}"
        ports = [port for port in crowd.ports for _ in range(PARALLEL // PROCESSES)]
        outcomes = await asyncio.gather(*(ask_once(port, tenant, PAUSING) for port in ports))
        counts = Counter(one.status for one in outcomes)
        report(f"P1 {name}: refused of {PARALLEL} at once, with room for {times} maxima", PARALLEL, counts[429], "")
        assert counts.keys() <= {200, 429}
        if times == PARALLEL:
            assert counts[429] == 0
        else:
            assert counts[200] >= times
            assert counts[429] > 0
