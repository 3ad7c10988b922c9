"""Any order of events, and what must hold after each: no limit passed, nothing held for ever, every id settled once.

One thing passes a limit, and is booked all the same since it was truly spent: what is settled late, after its
reservation was lost and given back (`on_lost: refund`). The excess is never more than the sum of these settlements;
where what is lost is charged, there is none.

The model knows nothing of rings and windows. It counts what it was told: what each reservation was charged in the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from proxy.budget.amounts import Amounts, Limits, Row
from proxy.store.base import Cold, Ended, Granted, OnLost, Refused, Remembered, Reservation, Scope, Settled, Settlement
from proxy.store.memory import MemoryStore
from proxy.store.redis import RedisStore
from tests.conformance.stores import Clock, Driver, Make, namespace, opened, reservation_id, wall
from tests.redis_server import RedisServer

TENANT = Scope("tenant", "t", Limits(8, 800, 900, 1500, 2500, 6000, 3))
KEY = Scope("key", "k", Limits(requests_per_minute=5, tokens_per_minute=400))
WATCHED = Scope("global", "")
SCOPES = (TENANT, KEY, WATCHED)
LEASE_MS = 30_000
NEVER_MS = 10**10
"""No settlement here comes so late that its reservation is forgotten."""
MIDMONTH = wall(2026, 3, 10, 12, 0, 0)

requests = st.integers(0, 2)
amounts = st.integers(0, 350)
asks = st.builds(Amounts, requests, amounts, amounts)
numbers = st.integers(0, 400)


@dataclass
class Known:
    """What the model knows of a reservation: what it holds, or what it was charged."""

    ask: Amounts
    on_lost: str
    lease_until: int
    state: str = "live"
    charged: int = 0


class Machine(RuleBasedStateMachine):
    make: Make
    drive: Driver
    may_refund = True

    @initialize()
    def begin(self) -> None:
        self.clock = Clock(MIDMONTH)
        self.steady = 0  # how far time went, steps back left out
        self.store = self.drive.make(self.make, self.clock)
        self.drive(opened(self.store, *SCOPES))
        self.known: dict[int, Known] = {}
        self.next = 0
        self.late = [0, 0, 0]
        """Requests, tokens, nano-dollars that were settled after they had been given back."""
        self.older = [0, 0, 0]
        """The same of what was held for longer than a minute when the store restarted."""

    def pick(self, number: int) -> int:
        """Mostly one of the last reservations."""
        return max(0, self.next - 1 - number % 12)

    @rule(hosts=st.integers(1, 3))
    def the_store_restarts_empty(self, hosts: int) -> None:
        """Several processes remember the same figures, and each holds its own part of what lives."""
        before = self.look()
        self.book_lost()
        row = before["tenant"]
        # What was held before this minute began counts in the minute that begins.
        older = (
            row.held_requests - row.minute_held_requests,
            row.held_tokens - row.minute_held_tokens,
            row.held_nano_usd - row.minute_held_nano_usd,
        )
        self.older = [sum(pair) for pair in zip(self.older, older, strict=True)]
        self.drive(self.store.aclose())
        self.store = self.drive.make(self.make, self.clock)
        told = [
            Remembered(
                scope,
                (row.hour, row.day, row.month),
                (row.hour_nano_usd, row.day_nano_usd, row.month_nano_usd),
                (row.minute_requests, row.minute_tokens, row.minute_nano_usd),
            )
            for scope, row in ((each, before[each.kind]) for each in SCOPES)
        ]
        live = [(number, each) for number, each in self.known.items() if each.state == "live"]
        held = [Reservation(reservation_id(number), SCOPES, one.ask, LEASE_MS, one.on_lost) for number, one in live]  # type: ignore[arg-type]
        for _, one in live:
            one.lease_until = self.steady + LEASE_MS
        for host in range(hosts):
            self.drive(self.store.seed(told, 2000, held[host::hosts]))
        assert isinstance(self.drive(self.store.balance(SCOPES)), Cold)
        self.clock.now += 2000
        self.steady += 2000
        assert self.drive(self.store.seed(told, 2000, held)).wait_ms == 0
        for each in self.known.values():
            if each.state != "live":
                each.state = "gone"

    def look(self) -> dict[str, Row]:
        found = self.drive(self.store.balance(SCOPES))
        assert not isinstance(found, Cold)
        return {each.scope.kind: each.row for each in found}

    def book_lost(self) -> None:
        for each in self.known.values():
            if each.state == "live" and each.lease_until <= self.steady:
                each.state = "lost"
                each.charged = each.ask.nano_usd if each.on_lost == "charge" else 0

    @rule(ask=asks, refunds=st.booleans(), twice=st.booleans())
    def reserve(self, ask: Amounts, refunds: bool, twice: bool) -> None:
        on_lost: OnLost = "refund" if refunds and self.may_refund else "charge"
        number, self.next = self.next, self.next + 1
        reservation = Reservation(reservation_id(number), SCOPES, ask, LEASE_MS, on_lost)
        verdict = self.drive(self.store.reserve(reservation))
        if isinstance(verdict, Granted):
            self.known[number] = Known(ask, on_lost, self.steady + LEASE_MS)
            if twice:
                assert isinstance(self.drive(self.store.reserve(reservation)), Granted)
        else:
            assert isinstance(verdict, Refused)
            assert verdict.retry_after_ms is None or verdict.retry_after_ms > 0

    @rule(number=numbers, share=st.integers(0, 4), twice=st.booleans())
    def settle(self, number: int, share: int, twice: bool) -> None:
        known = self.known.get(number := self.pick(number))
        if known is None or known.state == "gone":
            return
        self.book_lost()
        ask = known.ask
        used = Amounts(ask.requests, ask.tokens * share // 4, ask.nano_usd * share // 4)
        if known.state == "lost" and known.on_lost == "refund":
            self.late = [sum(pair) for pair in zip(self.late, values(used), strict=True)]
        expected = {"live": "settled", "lost": "late", "settled": "already"}[known.state]
        for outcome in (expected, "already") if twice else (expected,):
            settled = self.drive(self.store.settle(Settlement(reservation_id(number), SCOPES, used)))
            assert isinstance(settled, Settled)
            assert settled.outcome == outcome
        if expected != "already":
            known.state, known.charged = "settled", used.nano_usd

    @rule(number=numbers, more=asks)
    def top_up(self, number: int, more: Amounts) -> None:
        known = self.known.get(number := self.pick(number))
        if known is None:
            return
        self.book_lost()
        ask = Amounts(*(max(old, new) for old, new in zip(values(known.ask), values(more), strict=True)))
        verdict = self.drive(self.store.top_up(reservation_id(number), ask, SCOPES))
        assert isinstance(verdict, Ended) is (known.state != "live")
        if isinstance(verdict, Granted):
            known.ask = ask

    @rule(chosen=st.lists(numbers, max_size=4))
    def extend(self, chosen: list[int]) -> None:
        ids = {self.pick(number) for number in chosen}
        lost = self.drive(self.store.extend([reservation_id(number) for number in sorted(ids)], LEASE_MS))
        assert not isinstance(lost, Cold)
        for number in ids & self.known.keys():
            known = self.known[number]
            if known.state == "live" and reservation_id(number) not in lost:
                known.lease_until = self.steady + LEASE_MS
            if known.state == "settled":
                assert reservation_id(number) in lost
        self.book_lost()

    @rule(step=st.one_of(st.integers(0, 5), st.sampled_from([30, 61, 3600])))
    def time_passes(self, step: int) -> None:
        # By whole seconds: to a second, a store knows how far a clock was when it is set back.
        self.clock.now += step * 1000
        self.steady += step * 1000
        self.look()
        self.book_lost()

    @precondition(lambda self: self.clock.now > MIDMONTH)
    @rule(step=st.sampled_from([-5000, -3_600_000]))
    def the_clock_is_set_back(self, step: int) -> None:
        self.clock.now = max(MIDMONTH - 24 * 3_600_000, self.clock.now + step)
        self.look()

    @invariant()
    def no_limit_is_passed(self) -> None:
        rows = self.look()
        for scope in (TENANT, KEY):
            limits, row = scope.limits, rows[scope.kind]
            requests, tokens, nano_usd = self.late
            more = self.older
            within(row.minute_requests + row.minute_held_requests, limits.requests_per_minute, requests + more[0])
            within(row.minute_tokens + row.minute_held_tokens, limits.tokens_per_minute, tokens + more[1])
            within(row.minute_nano_usd + row.minute_held_nano_usd, limits.nano_usd_per_minute, nano_usd + more[2])
            within(row.hour_nano_usd + row.held_nano_usd, limits.nano_usd_per_hour, nano_usd)
            within(row.day_nano_usd + row.held_nano_usd, limits.nano_usd_per_day, nano_usd)
            within(row.month_nano_usd + row.held_nano_usd, limits.nano_usd_per_month, nano_usd)
            within(row.live, limits.max_concurrent)
            assert min(row) >= 0

    @invariant()
    def everything_is_charged_once_and_held_while_it_lives(self) -> None:
        self.book_lost()
        row = self.look()["global"]
        live = [each.ask for each in self.known.values() if each.state == "live"]
        assert row.live == len(live)
        assert row.held_tokens == sum(ask.tokens for ask in live)
        assert row.held_nano_usd == sum(ask.nano_usd for ask in live)
        assert row.month_nano_usd == sum(each.charged for each in self.known.values())

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            self.clock.now += LEASE_MS + 1000
            rows = self.look()
            assert {(row.live, row.held_requests, row.held_tokens, row.held_nano_usd) for row in rows.values()} == {
                (0, 0, 0, 0)
            }
        finally:
            self.drive(self.store.aclose())


def values(amounts: Amounts) -> tuple[int, int, int]:
    return amounts.requests, amounts.tokens, amounts.nano_usd


def within(value: int, limit: int | None, late: int = 0) -> None:
    assert limit is None or value <= limit + late


def run(drive: Driver, make: Make, examples: int, *, may_refund: bool = True) -> None:
    members = {"drive": drive, "make": staticmethod(make), "may_refund": may_refund}
    machine = type("Machine", (Machine,), members)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=60,
            report_multiple_bugs=False,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("may_refund", [True, False])
def test_any_order_of_events_in_memory(drive: Driver, may_refund: bool) -> None:
    run(drive, lambda clock: MemoryStore(clock=clock, tombstone_ms=NEVER_MS), 100, may_refund=may_refund)


@pytest.mark.slow
@pytest.mark.parametrize("may_refund", [True, False])
def test_any_order_of_events_in_redis(drive: Driver, redis_server: RedisServer, may_refund: bool) -> None:
    url = redis_server.url
    # A busy machine must not look like a store that is away.
    long_ms = 10_000
    run(
        drive,
        lambda clock: RedisStore(
            url, namespace=namespace(), clock=clock, tombstone_ms=NEVER_MS, timeout_ms=long_ms, setup_ms=long_ms
        ),
        25,
        may_refund=may_refund,
    )
