"""How far a minute can be overspent when replies turn out other than expected. Simulated: the clock is the test's."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.budget.charge import Charge
from proxy.budget.plan import Want
from proxy.budget.settings import BudgetSettings
from proxy.errors import BudgetExceeded
from proxy.types import Record, Usage
from tests.budget.scene import TARGET, TENANT, Scene, usage_event, want

LIMIT = 60_000


class Crowd:
    """Clients that ask whenever they may, and replies of a few seconds each."""

    def __init__(self, section: BudgetSettings, random: Random) -> None:
        self.scene = Scene(section)
        self.random = random
        self.running: list[tuple[Charge, Usage]] = []
        self.admitted = 0
        self.highest = 0
        self.risk = 0

    async def run(self, steps: int, ask: Want, reply: list[int], parallel: int) -> None:
        for _ in range(steps):
            self.scene.clock.ms += self.random.randrange(200)
            if len(self.running) < parallel and self.random.random() < 0.7:
                await self._start(ask, reply)
            elif self.running:
                await self._end(self.random.randrange(len(self.running)))
            row = await self.scene.row()
            self.highest = max(self.highest, row.minute_tokens)
        while self.running:
            await self._end(0)
        row = await self.scene.row()
        self.highest = max(self.highest, row.minute_tokens)
        assert (row.live, row.held_tokens) == (0, 0)

    async def _start(self, ask: Want, reply: list[int]) -> None:
        charge = self.scene.budget.hold(TENANT, "", ask, [TARGET], Record())
        try:
            await charge.__aenter__()
        except BudgetExceeded:
            return  # and never a 400: it would fit into an empty window
        await charge.cover(TARGET)
        charge.answered(200)
        most = charge.output_cap if charge.output_cap is not None else ask.asked or 4096
        output = min(self.random.choice(reply), most)
        self.running.append((charge, Usage(ask.input_tokens, output)))
        self.admitted += ask.input_tokens + output

    async def _end(self, index: int) -> None:
        charge, usage = self.running.pop(index)
        exposure = self.scene.budget.admission.exposures.get("tenant:4:acme")
        if exposure is not None:
            self.risk = max(self.risk, exposure.tokens)
        charge.see(usage_event(usage))
        await charge.__aexit__(None, None, None)


BIMODAL = [20] * 24 + [8000]
LONG = [4096]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([BIMODAL, LONG, [1, 500, 4000]]), st.sampled_from([None, 1000, 8000]))
def test_strict_never_overspends(seed: int, reply: list[int], asked: int | None) -> None:
    async def run() -> None:
        section = BudgetSettings(tokens_per_minute=LIMIT, estimate="max", on_overrun="cut")
        crowd = Crowd(section, Random(seed))
        members = {} if asked is None else {"max_tokens": asked}
        await crowd.run(400, want("a prompt of some words", **members), reply, parallel=40)
        assert crowd.highest <= LIMIT
        assert crowd.risk == 0

    asyncio.run(run())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([BIMODAL, LONG]))
def test_adaptive_overspends_by_no_more_than_its_bound(seed: int, reply: list[int]) -> None:
    """A tenant that was always brief, and then is not: the percentile is wrong for every request that runs."""

    async def run() -> None:
        crowd = Crowd(BudgetSettings(tokens_per_minute=LIMIT), Random(seed))
        for _ in range(60):
            await crowd.scene.serve(usage=Usage(10, 20))
        crowd.scene.clock.pass_seconds(120)
        await crowd.run(600, want("a prompt of some words", max_tokens=8000), reply, parallel=60)
        exposure = crowd.scene.budget.admission.exposures["tenant:4:acme"]
        assert crowd.risk <= max(LIMIT, exposure.largest_tokens)
        assert crowd.highest <= LIMIT + max(LIMIT, exposure.largest_tokens)

    asyncio.run(run())


@pytest.mark.parametrize("estimate", ["adaptive", "max"])
def test_a_limit_is_used_up_nearly_whole(estimate: str) -> None:
    """With asks of a fiftieth of the limit and refused requests repeated: 97 % of it in the minute that matters."""

    async def run() -> None:
        section = BudgetSettings(tokens_per_minute=LIMIT, estimate=estimate, on_overrun="cut")  # type: ignore[arg-type]
        crowd = Crowd(section, Random(3))
        ask = want("a prompt of some words", max_tokens=1000)
        for _ in range(2000):
            if len(crowd.running) < 20:
                await crowd._start(ask, [100, 500, 1000])
            await crowd._end(0) if crowd.running else None
        row = await crowd.scene.row()
        assert LIMIT * 0.97 <= row.minute_tokens <= LIMIT

    asyncio.run(run())
