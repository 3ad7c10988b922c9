"""The same sequence of operations gives the same answers in memory and in Redis, whatever the clock does."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.budget.amounts import Amounts, Limits
from proxy.store.base import DIMENSIONS, BudgetStore, Entry, Remembered, Reservation, Scope, Settlement, Tally
from tests.conformance.stores import NEW_YEAR, Clock, Driver, make_memory, make_redis, opened, reservation_id
from tests.redis_server import RedisServer

SCOPES = (
    Scope("provider", "p1", Limits(requests_per_minute=6, tokens_per_minute=900, max_concurrent=4)),
    Scope("provider", "p2", Limits(requests_per_minute=3)),
    Scope("global", "", Limits(nano_usd_per_day=2000, nano_usd_per_month=5000)),
    Scope("tenant", "acme", Limits(5, 500, 700, 900, 1500, 2500, 3)),
    Scope("key", "k", Limits(nano_usd_per_hour=600), enforced=False),
)
counts = st.integers(0, 2)
tokens = st.integers(0, 300)
amounts = st.builds(Amounts, counts, tokens, tokens)
ids = st.integers(0, 7)
some_scopes = st.lists(st.sampled_from(SCOPES), min_size=1, max_size=5, unique=True).map(tuple)
entries = st.builds(
    Entry,
    st.tuples(*[st.sampled_from(["", "a", "bé", "1:x"])] * len(DIMENSIONS)),
    st.builds(Tally, counts, tokens, tokens, tokens, tokens, tokens, tokens, counts),
    st.sampled_from([(), ("id", "7"), ("a", "", "b", "ü:")]),
)
steps = st.one_of(
    st.integers(0, 3000),
    st.sampled_from([59_000, 60_000, 61_000, 62_000, 3_600_000, 86_400_000, 32 * 86_400_000]),
    st.integers(-2500, 0),
    st.sampled_from([-30_000, -3_600_000]),
)
operations = st.one_of(
    st.tuples(st.just("reserve"), ids, some_scopes, amounts, st.sampled_from([500, 5000, 30_000, 200_000]),
              st.sampled_from(["charge", "refund"])),
    st.tuples(st.just("settle"), ids, some_scopes, amounts, amounts, st.lists(entries, max_size=2)),
    st.tuples(st.just("top_up"), ids, some_scopes, amounts, amounts),
    st.tuples(st.just("extend"), st.lists(ids, max_size=4), st.sampled_from([1000, 30_000])),
    st.tuples(st.just("balance"), some_scopes),
    st.tuples(st.just("seed"), st.sampled_from(SCOPES), st.sampled_from([-1, 0, 1]), st.integers(0, 3000)),
    st.tuples(st.just("step"), steps),
    st.tuples(st.just("step"), steps),
)  # fmt: skip


async def apply(store: BudgetStore, clock: Clock, operation: tuple[object, ...]) -> object:
    match operation:
        case "reserve", int(number), tuple(scopes), Amounts() as amount, int(lease), str(lost):
            return await store.reserve(Reservation(reservation_id(number), scopes, amount, lease, lost))
        case "settle", int(number), tuple(scopes), Amounts() as amount, Amounts() as apart, list(booked):
            own = ((scopes[0], apart),)
            return await store.settle(Settlement(reservation_id(number), scopes, amount, own, tuple(booked)))
        case "top_up", int(number), tuple(scopes), Amounts() as amount, Amounts() as used:
            left = tuple((scope, used) for scope in SCOPES[:2] if scope not in scopes)
            return await store.top_up(reservation_id(number), amount, scopes, left)
        case "extend", list(numbers), int(lease):
            return await store.extend([reservation_id(number) for number in numbers], lease)
        case "balance", tuple(scopes):
            return await store.balance(scopes)
        case "seed", Scope() as scope, int(ahead), int(spent):
            windows = (clock.now // 3_600_000 + ahead, clock.now // 86_400_000 + ahead, 2026 * 12 + ahead)
            return await store.seed([Remembered(scope, windows, (spent, spent, spent))])
    raise AssertionError(operation)


async def everything(store: BudgetStore, clock: Clock) -> object:
    rows = await store.usage(NEW_YEAR - 40 * 86_400_000, clock.now + 90 * 86_400_000, ("tenant", "model"))
    records = await store.outbox("", 1000)
    return await store.balance(SCOPES), rows, [record.fields for record in records]


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequence=st.lists(operations, max_size=40))
def test_memory_and_redis_give_the_same_answers(
    redis_server: RedisServer, drive: Driver, sequence: list[tuple[object, ...]]
) -> None:
    clock = Clock()
    stores = [drive.make(make, clock) for make in (make_memory, make_redis(redis_server.url))]
    try:
        for store in stores:
            drive(opened(store, *SCOPES))
        for operation in sequence:
            if operation[0] == "step":
                clock.now += operation[1]  # type: ignore[operator]
                continue
            ours, theirs = (drive(apply(store, clock, operation)) for store in stores)
            assert ours == theirs, operation
        ours, theirs = (drive(everything(store, clock)) for store in stores)
        assert ours == theirs
    finally:
        for store in stores:
            drive(store.aclose())
