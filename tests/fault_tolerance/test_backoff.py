from __future__ import annotations

from email.utils import formatdate
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fault_tolerance import backoff
from proxy.fault_tolerance.backoff import RetryBudget

NOW = 1_700_000_000.0
chance = st.floats(0, 1, exclude_max=True)
seconds = st.floats(0.001, 3600)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# -- delays ----------------------------------------------------------------------------------------------------------


@given(attempt=st.integers(0, 10_000), base=seconds, cap=seconds, drawn=chance)
def test_full_jitter_lies_between_nothing_and_the_doubled_base(
    attempt: int, base: float, cap: float, drawn: float
) -> None:
    most = min(cap, base * 2.0 ** min(attempt, 60))
    assert 0 <= backoff.delay(attempt, base, cap, lambda: drawn) <= most
    assert backoff.delay(attempt, base, cap, lambda: drawn, jitter=False) == most
    assert backoff.delay(attempt, base, cap, lambda: 0.5) == pytest.approx(most / 2)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], None),
        ([(b"retry-after", b"7")], 7.0),
        ([(b"retry-after", b" 1.5 ")], 1.5),
        ([(b"retry-after-ms", b"250")], 0.25),
        ([(b"retry-after", b"7"), (b"retry-after-ms", b"250")], 0.25),
        ([(b"retry-after", b"7"), (b"retry-after-ms", b"nan")], 7.0),
        ([(b"retry-after", formatdate(NOW + 30, usegmt=True).encode())], 30.0),
        ([(b"retry-after", formatdate(NOW + 30).encode())], 30.0),
        ([(b"retry-after", formatdate(NOW - 30, usegmt=True).encode())], None),
        ([(b"retry-after", b"Mon, 99 Jan 2024 00:00:00 GMT")], None),
        ([(b"retry-after", b"Mon, 01 Jan 99999999 00:00:00 GMT")], None),
        ([(b"retry-after", b"soon")], None),
        ([(b"retry-after", b"nan")], None),
        ([(b"retry-after", b"inf")], None),
        ([(b"retry-after", b"1e3")], None),
        ([(b"retry-after", b"-1")], None),
        ([(b"retry-after", b"+1")], None),
        ([(b"retry-after", b"0")], None),
        ([(b"retry-after", b"")], None),
        ([(b"retry-after", "٣".encode())], None),
        ([(b"retry-after", "³".encode("latin-1"))], None),
        ([(b"retry-after", b"9" * 400)], None),
        ([(b"retry-after", b"x" * 100_000)], None),
    ],
)
def test_what_a_provider_asks_for(headers: list[tuple[bytes, bytes]], expected: float | None) -> None:
    assert backoff.asked(headers, NOW) == expected


@given(value=st.binary(max_size=80))
def test_no_header_breaks_it(value: bytes) -> None:
    for name in (b"retry-after", b"retry-after-ms"):
        found = backoff.asked([(name, value)], NOW)
        assert found is None or 0 < found < 1e12


@given(asked=seconds, base=seconds, drawn=chance)
def test_the_wish_is_a_lower_bound_and_clients_spread_behind_it(asked: float, base: float, drawn: float) -> None:
    waited = backoff.wait(asked, base, lambda: drawn)
    assert asked <= waited <= asked + max(base, asked / 10)


def test_clients_that_were_asked_for_one_second_do_not_come_at_once() -> None:
    random = Random(4)
    buckets: dict[int, int] = {}
    for _ in range(2000):
        bucket = int(backoff.wait(1.0, 1.0, random.random) / 0.05)
        buckets[bucket] = buckets.get(bucket, 0) + 1
    assert max(buckets.values()) <= 0.15 * 2000


def test_whether_a_wish_fits() -> None:
    assert backoff.fits(30.0, 30.0, 31.0)
    assert not backoff.fits(30.1, 30.0, 100.0)
    assert not backoff.fits(10.0, 30.0, 10.0)


# -- the budget of retries -------------------------------------------------------------------------------------------


def test_it_begins_full_and_a_denied_withdrawal_takes_nothing() -> None:
    budget = RetryBudget(Clock())
    assert [budget.withdraw() for _ in range(11)] == [True] * 10 + [False]
    assert budget.balance == 0.0
    for _ in range(12):
        budget.deposit()
    assert budget.balance == pytest.approx(0.96)
    assert not budget.withdraw()
    assert budget.balance == pytest.approx(0.96)
    budget.deposit()
    assert budget.withdraw()


def test_the_floor_lets_a_quiet_process_repeat_something() -> None:
    clock = Clock()
    budget = RetryBudget(clock)
    while budget.withdraw():
        pass
    clock.now += 4.9
    assert not budget.withdraw()
    clock.now += 0.2
    assert budget.withdraw()
    clock.now -= 50  # a clock that steps back gives and takes nothing
    assert not budget.withdraw()
    clock.now += 10_000
    assert sum(budget.withdraw() for _ in range(100)) == 10


@given(
    rate=st.integers(20, 1000),
    spans=st.lists(st.floats(0, 0.05), min_size=1, max_size=400),
    repeats=st.integers(1, 5),
)
def test_repetitions_never_exceed_what_was_put_in(rate: int, spans: list[float], repeats: int) -> None:
    clock = Clock()
    start = clock.now
    budget = RetryBudget(clock)
    first = again = 0
    for span in spans:
        clock.now += span
        for _ in range(rate // 20):
            first += 1
            budget.deposit()
            again += sum(budget.withdraw() for _ in range(repeats))
            assert 0 <= budget.balance <= 10
    assert again <= 10 + 0.08 * first + 0.2 * (clock.now - start) + 1e-6


@pytest.mark.parametrize("processes", [1, 4])
def test_an_outage_of_a_minute_is_amplified_by_at_most_a_tenth(processes: int) -> None:
    """200 requests a second, all answered with 503, each ready to be repeated three times."""
    sent = 0
    for _ in range(processes):
        clock = Clock()
        budget = RetryBudget(clock)
        for _ in range(60 * 200 // processes):
            clock.now += processes / 200
            budget.deposit()
            sent += 1 + sum(budget.withdraw() for _ in range(3))
    assert sent / (60 * 200) <= 1.10
