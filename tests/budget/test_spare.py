"""Far below every limit a bound stands for the size of a prompt; where one is near, the prompt is counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.budget.amounts import Amounts, Limits, Row
from proxy.budget.settings import BudgetSettings
from proxy.budget.spare import FAR, is_far_below
from proxy.errors import BudgetExceeded
from proxy.store.base import Scope
from proxy.types import Record, Usage
from tests.budget.scene import TARGET, TENANT, Scene, usage_event, usd, want

pytestmark = pytest.mark.anyio
SPENT = Row(*([0] * 17))
WINDOWS = ("tokens_per_minute", *(f"nano_usd_per_{span}" for span in ("minute", "hour", "day", "month")))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("window", WINDOWS)
@given(size=st.integers(1, 10**9), more=st.integers(-(10**6), 10**6))
def test_each_window_must_have_room_for_it_many_times_over(window: str, size: int, more: int) -> None:
    limit = max(size * FAR + more, 1)
    scope = Scope("tenant", "t", Limits(**{window: limit}))
    assert is_far_below(Amounts(1, size, size), [(scope, SPENT)]) == (limit >= size * FAR)


def test_what_is_spent_and_what_is_held_is_not_there_any_more() -> None:
    ask = Amounts(1, 10, 10)
    scope = Scope("tenant", "t", Limits(tokens_per_minute=2000, nano_usd_per_day=2000))
    assert is_far_below(ask, [(scope, SPENT)])
    for member in ("minute_tokens", "minute_held_tokens", "day_nano_usd", "held_nano_usd"):
        assert not is_far_below(ask, [(scope, SPENT._replace(**{member: 1001}))])


def test_of_a_scope_that_was_never_seen_nothing_is_known() -> None:
    assert not is_far_below(Amounts(1, 1, 1), [(Scope("tenant", "t", Limits(tokens_per_minute=10**9)), None)])
    watched = Scope("tenant", "t", Limits(tokens_per_minute=1), enforced=False)
    assert is_far_below(Amounts(1, 1, 1), [(watched, None)])


async def test_far_below_every_limit_nothing_is_counted() -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=10_000_000, usd_per_day=usd("1000")))
    await scene.serve()  # the first one counts: nothing was seen of the windows yet
    counted = scene.counter.encode_calls
    asks = want("word " * 300, max_tokens=10)
    async with scene.budget.hold(TENANT, "", asks, [TARGET], Record()) as charge:
        held = (await scene.row()).held_tokens
        assert held > 1500  # its bytes
        await charge.cover(TARGET)
        charge.answered(200)
        charge.see(usage_event(Usage(310, 5)))
    assert scene.counter.encode_calls == counted
    row = await scene.row()
    assert (row.held_tokens, row.minute_tokens) == (0, 15 + 315)


async def test_what_its_provider_does_not_tell_is_counted_in_the_end() -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=10_000_000))
    await scene.serve()
    record = Record()
    async with scene.budget.hold(TENANT, "", want("word " * 300), [TARGET], record) as charge:
        await charge.cover(TARGET)
        charge.answered(200)
        charge.see(usage_event(None))
    assert record.usage is not None
    assert record.usage.estimated
    assert 300 < record.usage.input < 330


async def test_a_refusal_of_the_bound_is_no_refusal_of_the_request() -> None:
    """Another process has filled the window meanwhile, so far that the bound does not fit and the prompt does."""
    scene = Scene(BudgetSettings(tokens_per_minute=1_000_000))
    other = Scene(BudgetSettings(tokens_per_minute=1_000_000), store=scene.store, clock=scene.clock)
    await scene.serve()
    await other.serve(usage=Usage(998_900, 0))
    asks = want("word " * 300, max_tokens=10)
    async with scene.budget.hold(TENANT, "", asks, [TARGET], Record()):
        assert 300 < (await scene.row()).held_tokens < 350
    with pytest.raises(BudgetExceeded):
        async with scene.budget.hold(TENANT, "", want("word " * 1200, max_tokens=10), [TARGET], Record()):
            pass
