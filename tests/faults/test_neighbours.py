"""P19: a tenant that floods the fleet does not starve a steady one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.books import agree, closed
from tests.faults.fleet import LONG, STRICT, Fleet, fleet, limited, report
from tests.faults.load import Job, Stream, quantile
from tests.redis_server import running

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

STEADY_A_SECOND = 20
FLOOD_A_SECOND = 10 * STEADY_A_SECOND
PLENTY = 100_000_000
JOB = Job("bench-20-100", 100)
"""A plain reply after a fifth of a second, as a provider takes it: beside that, a neighbour is to be seen."""
PER_CENT = 20
BUSY_MS = 10 if LONG else 150
"""Short, the percentile is the one or two slowest of a few dozen, beside other tests on the same processors."""


@pytest.fixture
def two(redis_binary: object, tmp_path: Path) -> Iterator[Fleet]:
    tenants = {"steady": limited(PLENTY), "noisy": {"requests_per_minute": 30, **STRICT}}
    with running(tmp_path) as server, fleet(server, 4 if LONG else 2, tenants) as found:
        yield found


async def test_a_flood_of_one_tenant_refuses_and_delays_nobody_else(two: Fleet) -> None:
    await two.opened()
    seconds = 20.0 if LONG else 2.0
    async with Stream(two, "steady", JOB, STEADY_A_SECOND) as steady:
        await steady.lasts(1.0)
        alone = await steady.lasts(seconds)
        async with Stream(two, "noisy", JOB, FLOOD_A_SECOND) as noisy:
            beside = await steady.lasts(seconds)
    assert {one.status for one in steady.outcomes} == {200}
    assert {one.status for one in noisy.outcomes} == {200, 429}
    assert sum(not one.refused for one in noisy.outcomes) == 30
    before, after = quantile(alone, 99), quantile(beside, 99)
    report("P19 a neighbour floods: p99 in ms", len(beside), round(after, 1), f"{1 + PER_CENT / 100} x {before:.1f}")
    assert after <= before * (100 + PER_CENT) / 100 + BUSY_MS
    books = await closed(two, "steady", 0)
    agree(books)
    assert len(books.records) == len(steady.outcomes)
