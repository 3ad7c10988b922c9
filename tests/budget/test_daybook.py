"""What is used without a reservation: booked by the batch, each request once, whatever becomes of the process."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.budget.daybook import MOST, SECONDS, Daybook, sums
from proxy.budget.policy import Policies
from proxy.budget.records import Line, entries_of
from proxy.budget.refusals import Refusals
from proxy.budget.settings import UNWRITTEN, BudgetSettings
from proxy.errors import ConnectFailed, InternalError, UpstreamTimeout, UpstreamUnavailable
from proxy.observability.events import BudgetRefused
from proxy.store.base import Settled, Settlement, Tally
from proxy.types import Record, Usage
from tests.budget.scene import TARGET, TENANT, Scene, usage_event, want

pytestmark = pytest.mark.anyio


async def test_a_batch_is_one_settlement() -> None:
    scene = Scene(UNWRITTEN)
    for _ in range(3):
        await scene.serve(usage=Usage(10, 5))
    assert (await scene.store.usage(0, 2**52, ("tenant",))) == []  # not yet, and nobody waited for it
    (row,) = await scene.used("tenant", "model")
    assert (row.usage.requests, row.usage.input, row.usage.output) == (3, 30, 15)
    assert (await scene.row()).minute_requests == 3


async def test_what_waits_is_booked_by_itself() -> None:
    scene = Scene(UNWRITTEN)
    await scene.serve(usage=Usage(10, 5))
    async with asyncio.timeout(5):
        while not await scene.store.usage(0, 2**52, ("tenant",)):
            await asyncio.sleep(SECONDS / 4)


async def test_a_full_batch_does_not_wait() -> None:
    scene = Scene(UNWRITTEN)
    for _ in range(MOST):
        await scene.serve(usage=Usage(1, 1))
    await asyncio.sleep(0)
    (row,) = await scene.store.usage(0, 2**52, ("tenant",))
    assert row.usage.requests == MOST


async def test_the_end_of_the_process_books_what_waits() -> None:
    scene = Scene(UNWRITTEN)
    await scene.serve(usage=Usage(10, 5))
    await scene.budget.aclose()
    (row,) = await scene.store.usage(0, 2**52, ("tenant",))
    assert row.usage.requests == 1


async def test_each_request_past_the_limit_is_counted_and_one_line_says_so() -> None:
    scene = Scene(UNWRITTEN)
    counted: list[tuple[str, str, str]] = []
    scene.budget.refusals.count = lambda tenant, window, mode: counted.append((tenant, window, mode))
    for _ in range(6):
        await scene.serve(usage=Usage(9_000, 1_000))  # the fifth passes 40,000
    await scene.budget.daybook.flush()
    assert counted == [(TENANT, "tokens_per_minute", "observe")] * 2
    (said,) = [event for event in scene.events if isinstance(event, BudgetRefused)]
    assert (said.limit, said.used, said.unsaid) == (40_000, 60_000, 0)


async def test_a_written_observe_rehearses_with_reservations() -> None:
    scene = Scene(BudgetSettings(mode="observe", max_concurrent=1))
    first = scene.budget.hold(TENANT, "", want(), [TARGET], Record())
    async with first:
        await scene.serve()
        (said,) = [event for event in scene.events if isinstance(event, BudgetRefused)]
        assert (said.window, said.mode) == ("max_concurrent", "observe")


@pytest.mark.parametrize(
    ("status", "failed", "billed"),
    [
        (0, ConnectFailed("no", reason="connect"), False),
        (0, InternalError(), False),
        (0, UpstreamUnavailable("no"), False),
        (500, None, False),
        (0, UpstreamTimeout("no"), True),
        (0, None, True),
        (200, None, True),
    ],
)
async def test_what_a_failed_attempt_comes_to(status: int, failed: Exception | None, billed: bool) -> None:
    scene = Scene(UNWRITTEN)
    asked = want()
    async with scene.budget.hold(TENANT, "", asked, [TARGET], Record()) as tab:
        await tab.cover(TARGET)
        if status:
            tab.answered(status)
        if failed is not None:
            tab.failed(failed)  # type: ignore[arg-type]
    rows = await scene.used("quality")
    assert [row.dimensions for row in rows] == ([("estimated",)] if billed else [])
    assert bool(asked.input_bound) is billed  # counting takes its time, for which the next attempt would have to wait


async def test_attempts_and_children_of_one_request_are_told_together() -> None:
    scene = Scene(UNWRITTEN)
    record = Record()
    async with scene.budget.hold(TENANT, "", want(), [TARGET], record) as tab:
        for _ in range(2):
            await tab.cover(TARGET)
            tab.answered(200)
            tab.see(usage_event(Usage(10, 5)))
        async with tab.child(want()) as child:
            await child.cover(TARGET)
            child.answered(200)
            child.see(usage_event(Usage(1, 1)))
    assert record.usage == Usage(21, 11)
    (row,) = await scene.used()
    assert (row.usage.requests, row.usage.input) == (3, 21)  # lines of the ledger
    assert (await scene.row()).minute_requests == 1


async def test_a_store_that_is_away_gets_the_batch_later() -> None:
    kept: list[Settlement] = []

    async def away(settlement: Settlement) -> Settled | None:
        kept.append(settlement)
        return None

    running: list[asyncio.Task[None]] = []
    book = Daybook(
        away,
        lambda work: running.append(asyncio.get_running_loop().create_task(work)),
        Refusals(lambda notice: None, lambda: 0.0),
        lambda *seen: None,
        recorded=True,
    )
    policy = Policies(UNWRITTEN).of(TENANT)
    book.add(policy, line(Usage(3, 4), 5, 1), 0)
    await book.flush()
    assert [(one.actual.requests, one.actual.tokens, one.actual.nano_usd) for one in kept] == [(1, 7, 5)]
    assert [entry.usage.input for entry in kept[0].entries] == [3]


def line(usage: Usage, nano_usd: int | None, attempt: int, tags: str = "") -> Line:
    return Line("", 0, "r", TENANT, "", TARGET, tags, usage, nano_usd, 200, attempt)


LINES = st.lists(
    st.builds(
        line,
        st.builds(Usage, st.integers(0, 9), st.integers(0, 9), estimated=st.booleans()),
        st.none() | st.integers(0, 99),
        st.integers(1, 3),
        st.sampled_from(["", "a", "b"]),
    )
)


@given(LINES)
def test_sums_of_entries_are_the_same_whether_each_is_recorded_or_not(lines: list[Line]) -> None:
    def by_dimensions(recorded: bool) -> dict[tuple[str, ...], list[int]]:
        found: dict[tuple[str, ...], list[int]] = {}
        for entry in entries_of(lines, recorded=recorded):
            sums = found.setdefault(entry.dimensions, [0] * len(Tally.__struct_fields__))
            sums[:] = [a + getattr(entry.usage, name) for a, name in zip(sums, Tally.__struct_fields__, strict=True)]
        return found

    assert by_dimensions(True) == by_dimensions(False)
    assert sums(lines)[1] == sum(one.usage.total for one in lines)
