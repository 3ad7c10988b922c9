"""The same sequence of operations gives the same answers in memory and in Redis, whatever the clock does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.budget.amounts import WINDOWS, Amounts, Limits
from proxy.store.base import (
    DIMENSIONS,
    BudgetStore,
    Entry,
    Granted,
    Refused,
    Remembered,
    Reservation,
    Scope,
    Settled,
    Settlement,
    Tally,
)
from tests.conformance.stores import NEW_YEAR, Clock, Driver, make_memory, make_redis, opened, reservation_id
from tests.redis_server import RedisServer

SCOPES = (
    Scope("provider", "p1", Limits(6, 900, 800, max_concurrent=4)),
    Scope("provider", "p2", Limits(requests_per_minute=9, nano_usd_per_minute=250)),
    Scope("global", "", Limits(nano_usd_per_day=2000, nano_usd_per_month=5000)),
    Scope("tenant", "acme", Limits(5, 500, 700, 900, 1500, 2500, 3)),
    Scope("key", "k", Limits(nano_usd_per_hour=200), enforced=False),
    Scope("key", "t", Limits(tokens_per_minute=400)),
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
    st.tuples(st.just("give"), ids, some_scopes, amounts, st.sampled_from([500, 30_000])),
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
            return await store.seed([Remembered(scope, windows, (spent, spent, spent), (1, spent, spent // 2))])
        case "give", int(number), tuple(scopes), Amounts() as amount, int(lease):
            given = [Reservation(reservation_id(each), scopes, amount, lease) for each in (number, number + 1)]
            return await store.seed([], held=given)
    raise AssertionError(operation)


async def everything(store: BudgetStore, clock: Clock) -> object:
    rows = await store.usage(NEW_YEAR - 40 * 86_400_000, clock.now + 90 * 86_400_000, ("tenant", "model"))
    records = await store.outbox("", 1000)
    return await store.balance(SCOPES), rows, [record.fields for record in records]


def compare(url: str, drive: Driver, sequence: Iterable[tuple[object, ...]]) -> Counter[str]:
    """Applies a sequence to both stores, and counts the answers that they agree on."""
    seen: Counter[str] = Counter()
    clock = Clock()
    stores = [drive.make(make, clock) for make in (make_memory, make_redis(url))]
    try:
        for store in stores:
            drive(opened(store, *SCOPES[:-1]))
        for operation in sequence:
            if operation[0] == "step":
                clock.now += operation[1]  # type: ignore[operator]
                continue
            ours, theirs = (drive(apply(store, clock, operation)) for store in stores)
            assert ours == theirs, operation
            seen[kind(operation, ours)] += 1
        for store in stores:
            drive(store.seed([Remembered(SCOPES[-1])]))
        ours, theirs = (drive(everything(store, clock)) for store in stores)
        assert ours == theirs
    finally:
        for store in stores:
            drive(store.aclose())
    return seen


def kind(operation: tuple[object, ...], answer: object) -> str:
    match answer:
        case Settled():
            return f"settle {answer.outcome}"
        case Refused():
            return f"{operation[0]} {answer.window} {'never' if answer.retry_after_ms is None else 'later'}"
        case Granted():
            return f"{operation[0]} {'over' if answer.over else 'granted'}"
    return f"{operation[0]} {type(answer).__name__}"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(sequence=st.lists(operations, min_size=8, max_size=40))
def test_memory_and_redis_give_the_same_answers(
    redis_server: RedisServer, drive: Driver, sequence: list[tuple[object, ...]]
) -> None:
    compare(redis_server.url, drive, sequence)


def busy(random: Random, length: int) -> Iterator[tuple[object, ...]]:
    """Operations as a gateway makes them: new ids, settled soon, with crashes, repetitions and clock steps between."""
    live: list[int] = []
    for number in range(length):
        amount = Amounts(random.choice((0, 1, 1, 1, 2)), random.randrange(120), random.randrange(120))
        used = Amounts(random.choice((0, 1, 1, 3)), random.randrange(160), random.randrange(160))
        scopes = tuple(random.sample(SCOPES, random.randint(1, 3)))
        one = random.choice(live[-8:]) if live else number
        match random.choices(range(8), (30, 25, 8, 5, 3, 2, 25, 2))[0]:
            case 0:
                live.append(number)
                known = one if random.random() < 0.1 else number
                lease = random.choice((1000, 5000, 30_000, 200_000))
                large = Amounts(1, random.choice((400, 600, 1200)), 1000) if random.random() < 0.05 else amount
                yield "reserve", known, scopes, large, lease, random.choice(("charge", "refund"))
            case 1:
                yield "settle", one, scopes, used, amount, []
            case 2:
                raised = Amounts(1, random.randrange(500), random.choice((0, random.randrange(400))))
                yield "top_up", one, scopes, raised, used
            case 3:
                yield "extend", live[-4:], random.choice((1000, 30_000))
            case 4:
                yield "balance", scopes
            case 5:
                yield "seed", random.choice(SCOPES), random.choice((-1, 0)), random.randrange(3000)
            case 6:
                often = random.randrange(4000) if random.random() < 0.9 else 61_000
                rarely = random.choice((3_600_000, 86_400_000, -30_000, -3_600_000, -900, 1_000_000))
                yield "step", rarely if random.random() < 0.08 else often
            case 7:
                yield "give", one, scopes, amount, random.choice((1000, 30_000))


def test_memory_and_redis_agree_over_a_long_time(redis_server: RedisServer, drive: Driver) -> None:
    seen: Counter[str] = Counter()
    for seed in range(6):
        seen += compare(redis_server.url, drive, busy(Random(seed), 700))
    expected = {f"settle {outcome}" for outcome in ("settled", "already", "late", "unknown")}
    expected |= {f"{verb} {verdict}" for verb in ("reserve", "top_up") for verdict in ("granted", "over", "Ended")}
    expected |= {f"reserve {window} later" for window in WINDOWS}
    expected |= {"reserve tokens_per_minute never", "top_up tokens_per_minute later", "top_up usd_per_day later"}
    assert expected <= seen.keys(), "every kind of answer was compared"
