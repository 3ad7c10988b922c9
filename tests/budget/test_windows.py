"""The arithmetic of one scope, against a model that keeps every event and adds up from the start each time."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.budget.amounts import MAX_SUM, WINDOWS, Amounts, Limits
from proxy.budget.clocks import DAY_MS, HOUR_MS, Moment, Steady, month_of, month_start
from proxy.budget.windows import RING_SECONDS, ScopeWindows

NOON = 1_767_268_800_000
UNLIMITED = Limits().bounds()


def moment(offset_ms: int) -> Moment:
    return Steady(NOON + offset_ms).read(NOON + offset_ms)


# -- clocks ----------------------------------------------------------------------------------------------------------


@given(day=st.integers(0, 100_000))
def test_months_are_those_of_the_calendar(day: int) -> None:
    date = datetime.date(1970, 1, 1) + datetime.timedelta(days=day)
    month = date.year * 12 + date.month - 1
    assert month_of(day) == month
    assert month_start(month) == (day - date.day + 1) * DAY_MS
    assert month_of(month_start(month) // DAY_MS - 1) == month - 1


@given(steps=st.lists(st.one_of(st.integers(0, 5000), st.integers(-100_000, -1001), st.just(DAY_MS)), max_size=30))
def test_steady_time_runs_at_the_pace_of_the_clock_and_hardly_steps_back(steps: list[int]) -> None:
    wall, steady = NOON, Steady(NOON)
    before = steady.read(wall).steady_ms
    for step in steps:
        wall += step
        now = steady.read(wall)
        assert now.wall_ms == wall
        if step >= 0:
            assert now.steady_ms - before == step
        else:
            assert -2000 < now.steady_ms - before < 2000
        assert (now.second, now.hour, now.day) == (now.steady_ms // 1000, wall // HOUR_MS, wall // DAY_MS)
        assert now.month == month_of(wall // DAY_MS)
        before = now.steady_ms


# -- the model -------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """Every count with its second, to be added up from the start."""

    spent: list[tuple[int, int]] = field(default_factory=list)
    held: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def minute(self, second: int) -> tuple[int, int]:
        oldest = second - RING_SECONDS
        spent = sum(tokens for at, tokens in self.spent if at > oldest)
        held = sum(tokens for parts in self.held.values() for at, tokens in parts if at > oldest)
        return spent, held

    def release(self, number: int, used: int, second: int) -> None:
        for at, tokens in self.held.pop(number):
            self.spent.append((at, min(tokens, used)))
            used -= min(tokens, used)
        self.spent.append((second, used))


events = st.one_of(
    st.tuples(st.just("take"), st.integers(0, 5), st.integers(0, 100)),
    st.tuples(st.just("release"), st.integers(0, 5), st.integers(0, 150)),
    st.tuples(st.just("pass"), st.just(0), st.one_of(st.integers(0, 3000), st.integers(55_000, 70_000))),
)


@settings(max_examples=300, deadline=None)
@given(sequence=st.lists(events, max_size=50))
def test_the_ring_adds_up_to_what_a_list_of_all_events_adds_up_to(sequence: list[tuple[str, int, int]]) -> None:
    clock, steady = NOON, Steady(NOON)
    now = steady.read(clock)
    windows, model = ScopeWindows(now), Model()
    parts: dict[int, list[tuple[int, int, int, int]]] = {}
    for kind, number, amount in sequence:
        if kind == "pass":
            clock += amount
            now = steady.read(clock)
            windows.roll(now)
        elif kind == "take":
            new = number not in parts
            parts.setdefault(number, []).append(windows.take(1, amount, 2 * amount, int(new)))
            model.held.setdefault(number, []).append((now.second, amount))
        elif number in parts:
            windows.release(parts.pop(number), 1, amount, 2 * amount)
            model.release(number, amount, now.second)
        row = windows.row(now.steady_ms)
        spent, held = model.minute(now.second)
        assert (row.minute_tokens, row.minute_held_tokens) == (spent, held)
        assert (row.minute_nano_usd, row.minute_held_nano_usd) == (2 * spent, 2 * held)
        assert row.live == len(model.held)
        assert row.held_tokens == sum(tokens for each in model.held.values() for _, tokens in each)
        assert row.hour_nano_usd <= row.day_nano_usd <= row.month_nano_usd
        assert row.month_nano_usd == 2 * sum(tokens for _, tokens in model.spent)
        assert (row.minute_reset_ms == 0) <= (spent == held == 0)


@settings(max_examples=200, deadline=None)
@given(
    takes=st.lists(st.tuples(st.integers(0, 90_000), st.integers(1, 100)), min_size=1, max_size=40),
    limit=st.integers(50, 200),
)
def test_no_span_of_sixty_seconds_ever_holds_more_than_the_limit(takes: list[tuple[int, int]], limit: int) -> None:
    bounds = Limits(tokens_per_minute=limit).bounds()
    clock, steady = NOON, Steady(NOON)
    windows = ScopeWindows(steady.read(clock))
    admitted: list[tuple[int, int]] = []
    for wait, tokens in takes:
        clock += wait % 9000
        windows.roll(steady.read(clock))
        if windows.fits(bounds, 1, tokens, 0, 1):
            windows.release([windows.take(1, tokens, 0, 1)], 1, tokens, 0)
            admitted.append((clock, tokens))
    for start, _ in admitted:
        assert sum(tokens for at, tokens in admitted if start <= at < start + 60_000) <= limit


def test_steady_traffic_gets_nearly_all_of_the_limit() -> None:
    bounds = Limits(requests_per_minute=600).bounds()
    steady = Steady(NOON)
    windows = ScopeWindows(steady.read(NOON))
    admitted = 0
    for tick in range(0, 600_000, 50):
        windows.roll(steady.read(NOON + tick))
        if windows.fits(bounds, 1, 0, 0, 1):
            windows.release([windows.take(1, 0, 0, 1)], 1, 0, 0)
            admitted += 1
    assert 0.98 <= admitted / (10 * 600) <= 1.02


@settings(max_examples=200, deadline=None)
@given(
    takes=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 60)), max_size=20),
    limit=st.integers(60, 100),
    want=st.integers(1, 60),
)
def test_the_wait_is_the_shortest_after_which_the_ask_fits(takes: list[tuple[int, int]], limit: int, want: int) -> None:
    bounds = Limits(tokens_per_minute=limit).bounds()
    clock, steady = NOON, Steady(NOON)
    windows = ScopeWindows(steady.read(clock))
    for wait, tokens in takes:
        clock += wait
        windows.roll(steady.read(clock))
        if windows.fits(bounds, 0, tokens, 0, 1):
            windows.take(0, tokens, 0, 1)
    now = steady.read(clock)
    shortfall = windows.shortfall(bounds, (0, want, 0), 1, now)
    assert (shortfall is None) == windows.fits(bounds, 0, want, 0, 1)
    if shortfall is None:
        return
    assert shortfall.wait_ms is not None
    windows.roll(steady.read(clock + shortfall.wait_ms - 1))
    assert not windows.fits(bounds, 0, want, 0, 1)
    windows.roll(steady.read(clock + shortfall.wait_ms))
    assert windows.fits(bounds, 0, want, 0, 1)


# -- single rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(7))
def test_each_limit_is_looked_at_and_met_exactly(index: int) -> None:
    limits: list[int | None] = [None] * 7
    limits[index] = 10
    bounds = Limits(*limits).bounds()
    windows = ScopeWindows(moment(0))
    ask = (4, 4, 4)
    taken = 0
    while windows.fits(bounds, *ask, 4):
        windows.take(*ask, 4)
        taken += 1
    assert taken == 2
    shortfall = windows.shortfall(bounds, ask, 4, moment(0))
    assert shortfall is not None
    assert (shortfall.window, shortfall.limit) == (WINDOWS[index], 10)
    assert shortfall.used + shortfall.reserved == 8
    assert windows.fits(UNLIMITED, *ask, 4)
    assert windows.shortfall(UNLIMITED, ask, 4, moment(0)) is None


def test_a_correction_moves_what_was_charged_where_it_was_charged() -> None:
    windows = ScopeWindows(moment(0))
    parts = [windows.take(1, 40, 40, 1)]
    windows.roll(moment(10_000))
    parts.append(windows.take(0, 60, 60, 0))
    windows.release(parts, 1, 100, 100)
    now = moment(20_000)
    windows.roll(now)
    windows.correct(parts, (1, 100, 100), (1, 30, 130), (windows.hour, windows.day, windows.month))
    row = windows.row(now.steady_ms)
    assert (row.minute_tokens, row.minute_nano_usd, row.day_nano_usd) == (30, 130, 130)
    windows.roll(moment(61_000))
    row = windows.row(moment(61_000).steady_ms)
    assert (row.minute_tokens, row.minute_nano_usd) == (0, 90), "the 30 tokens were those of the first part"
    windows.roll(moment(71_000))
    assert windows.row(0).minute_nano_usd == 30, "and the excess is of the moment of the correction"


def test_a_correction_gives_back_only_to_the_windows_that_were_charged() -> None:
    windows = ScopeWindows(moment(0))
    parts = [windows.take(1, 0, 80, 1)]
    windows.release(parts, 1, 0, 80)
    then = (windows.hour, windows.day, windows.month)
    windows.roll(moment(HOUR_MS))
    windows.correct(parts, (1, 0, 80), (1, 0, 50), then)
    assert (windows.hour_spent, windows.day_spent, windows.month_spent) == (0, 50, 50)


def test_windows_take_over_what_is_remembered_where_it_is_more_or_later() -> None:
    windows = ScopeWindows(moment(0))
    windows.charge(0, 0, 50)
    here = (windows.hour, windows.day, windows.month)
    windows.raise_to((here[0] - 1, here[1], here[2]), (99, 40, 60))
    assert (windows.hour_spent, windows.day_spent, windows.month_spent) == (50, 50, 60)
    windows.raise_to((here[0] + 1, here[1], here[2]), (7, 0, 0))
    assert (windows.hour, windows.hour_spent) == (here[0] + 1, 7)
    windows.roll(moment(0))
    assert windows.hour == here[0] + 1, "a calendar never goes back"


def test_a_sum_that_would_not_be_exact_stays_at_the_largest_that_is() -> None:
    windows = ScopeWindows(moment(0))
    windows.raise_to((windows.hour, windows.day, windows.month), (MAX_SUM - 1, 0, 0))
    windows.charge(0, 0, 5)
    assert windows.hour_spent == MAX_SUM
    assert windows.day_spent == 5


def test_values_are_values() -> None:
    assert Amounts(1, 2, 3) == Amounts(requests=1, tokens=2, nano_usd=3)
    assert Limits(tokens_per_minute=5).values() == (None, 5, None, None, None, None, None)
    with pytest.raises(AttributeError):
        Amounts().tokens = 1  # type: ignore[misc]
