"""What every budget store promises. Each test runs on every store, at a time that the test sets."""

from __future__ import annotations

import pytest

from proxy.budget.amounts import MAX_AMOUNT, MAX_SUM, Amounts, Limits
from proxy.store.base import (
    NOTHING,
    ROLLUP_FIELDS,
    Beat,
    BudgetStore,
    Cold,
    Ended,
    Entry,
    Granted,
    Refused,
    Remembered,
    Reservation,
    Scope,
    Seeded,
    Settled,
    Settlement,
    Tally,
)
from proxy.types import OTHER
from tests.conformance.stores import NEW_YEAR, Clock, Make, ask, opened, reservation_id, settle, tenant

pytestmark = pytest.mark.anyio

HOUR = 3_600_000


@pytest.fixture
async def store(make: Make, clock: Clock):
    store = make(clock)
    yield store
    await store.aclose()


async def balance(store: BudgetStore, scope: Scope):
    found = await store.balance([scope])
    assert not isinstance(found, Cold)
    return found[0].row


# -- cold ------------------------------------------------------------------------------------------------------------


async def test_a_cold_store_does_nothing_and_says_so(store: BudgetStore) -> None:
    scope = tenant()
    assert await store.reserve(ask(1, scope)) == Cold()
    assert await store.settle(settle(1, scope)) == Cold()
    assert await store.top_up(reservation_id(1), NOTHING, (scope,)) == Cold()
    assert await store.extend([reservation_id(1)], 1000) == Cold()
    assert await store.balance([scope]) == Cold()


async def test_a_scope_never_seen_is_cold_and_does_not_count_as_nothing_spent(store: BudgetStore) -> None:
    known, new = tenant(), tenant("new")
    await opened(store, known)
    assert await store.reserve(ask(1, known, new)) == Cold((new,))
    assert await store.settle(settle(1, new, known)) == Cold((new,))
    assert await store.balance([new]) == Cold((new,))
    assert (await balance(store, known)).live == 0
    assert await store.seed([Remembered(new)]) == Seeded(0, False), "an open store does not wait"
    assert isinstance(await store.reserve(ask(1, known, new)), Granted)


async def test_an_empty_store_collects_what_processes_remember_before_it_opens(
    store: BudgetStore, clock: Clock
) -> None:
    scope = tenant()
    now = (clock.now // HOUR, clock.now // (24 * HOUR), 2025 * 12 + 11)
    assert await store.seed([Remembered(scope, now, (7, 70, 700))], 2000) == Seeded(2000, True)
    clock.now += 500
    assert await store.seed([Remembered(scope, now, (9, 60, 600))], 2000) == Seeded(1500, False)
    assert await store.reserve(ask(1, scope)) == Cold()
    clock.now += 1500
    assert await store.seed([Remembered(scope)], 2000) == Seeded(0, False)
    row = await balance(store, scope)
    assert (row.hour_nano_usd, row.day_nano_usd, row.month_nano_usd) == (9, 70, 700)


async def test_what_is_remembered_of_a_window_that_is_over_counts_for_nothing(store: BudgetStore, clock: Clock) -> None:
    scope = tenant()
    before = (clock.now // HOUR - 1, clock.now // (24 * HOUR) - 1, 2025 * 12 + 10)
    await store.seed([Remembered(scope, before, (7, 70, 700))], 0)
    row = await balance(store, scope)
    assert (row.hour_nano_usd, row.day_nano_usd, row.month_nano_usd) == (0, 0, 0)


async def test_the_minute_that_processes_remember_counts_once_where_it_begins_anew(
    store: BudgetStore, clock: Clock
) -> None:
    scope, later = tenant(), tenant("later")
    await store.seed([Remembered(scope, minute=(3, 500, 90))], 2000)
    clock.now += 1000
    await store.seed([Remembered(scope, minute=(4, 400, 95))], 2000)
    clock.now += 1000
    await store.seed([Remembered(scope)], 2000)
    row = await balance(store, scope)
    assert (row.minute_requests, row.minute_tokens, row.minute_nano_usd) == (4, 500, 95)
    assert (row.month_nano_usd, row.live, row.minute_reset_ms) == (0, 0, 60_000)
    await store.seed([Remembered(scope, minute=(9, 900, 900)), Remembered(later, minute=(1, 2, 3))])
    assert (await balance(store, scope)).minute_tokens == 500, "windows that are there know better"
    row = await balance(store, later)
    assert (row.minute_requests, row.minute_tokens, row.minute_nano_usd) == (1, 2, 3)
    clock.now += 59_000
    row = await balance(store, scope)
    assert (row.minute_requests, row.minute_tokens, row.minute_nano_usd) == (1, 0, 5), "each second adds what it lacks"


async def test_an_empty_store_holds_what_was_held_before_it_opens(store: BudgetStore, clock: Clock) -> None:
    scope, other = tenant(tokens_per_minute=100, max_concurrent=3), tenant("other")
    first, second = ask(1, scope, tokens=60, nano_usd=6), ask(2, scope, other, tokens=70, nano_usd=7)
    assert await store.seed([Remembered(scope)], 2000, [first]) == Seeded(2000, True)
    clock.now += 500
    for _ in range(2):
        assert await store.seed([], 2000, [second, first]) == Seeded(1500, False)
    clock.now += 1500
    assert await store.seed([], 2000) == Seeded(0, False)
    row = await balance(store, scope)
    assert (row.live, row.held_tokens, row.held_nano_usd, row.minute_held_tokens) == (2, 130, 13, 130), "fits or not"
    assert (await balance(store, other)).held_tokens == 70
    refused = await store.reserve(ask(3, scope, tokens=1))
    assert isinstance(refused, Refused)
    assert refused.reserved == 130
    for number, used in ((1, 10), (2, 20)):
        for outcome in ("settled", "already"):
            settled = await store.settle(settle(number, scope, *((other,) if number == 2 else ()), tokens=used))
            assert isinstance(settled, Settled)
            assert settled.outcome == outcome
    row = await balance(store, scope)
    assert (row.live, row.held_tokens, row.held_nano_usd, row.minute_tokens) == (0, 0, 0, 30)
    await store.seed([], held=[first, second])
    assert (await balance(store, scope)).live == 0, "what ended stays ended"


async def test_what_a_process_was_granted_elsewhere_joins_an_open_store(store: BudgetStore, clock: Clock) -> None:
    scope, account = tenant(tokens_per_minute=100), Scope("provider", "p")
    await opened(store, scope)
    await store.reserve(ask(1, scope, tokens=60))
    raised, lost = ask(1, scope, account, tokens=90, lease_ms=1000), ask(2, scope, tokens=50, lease_ms=1000)
    assert await store.seed([], held=[raised, lost]) == Seeded(0, False)
    row = await balance(store, scope)
    assert (row.live, row.held_tokens, row.minute_held_tokens) == (2, 140, 140)
    assert (await balance(store, account)).held_tokens == 90
    await store.seed([], held=[ask(1, scope, tokens=10)])
    assert (await balance(store, scope)).held_tokens == 140, "it never becomes less"
    clock.now += 1001
    row = await balance(store, scope)
    assert (row.live, row.held_tokens, row.minute_tokens) == (1, 90, 50), "its lease ends as any other"
    await store.seed([], held=[lost])
    assert (await balance(store, scope)).live == 1
    settled = await store.settle(settle(2, scope, tokens=5))
    assert isinstance(settled, Settled)
    assert settled.outcome == "late"


async def test_what_is_given_back_badly_changes_nothing(store: BudgetStore) -> None:
    scope = tenant()
    await opened(store, scope)
    for bad in (
        Reservation("no id", (scope,), Amounts(1, 5, 0)),
        Reservation(reservation_id(2), (scope, scope), Amounts(1, 5, 0)),
        Reservation(reservation_id(2), (scope,), Amounts(1, -1, 0)),
    ):
        with pytest.raises(ValueError):
            await store.seed([], held=[ask(1, scope, tokens=5), bad])
    assert (await balance(store, scope)).live == 0


async def test_each_life_of_a_store_has_a_number_of_its_own(store: BudgetStore, clock: Clock) -> None:
    scope = tenant()
    await opened(store, scope)
    granted = await store.reserve(ask(1, scope))
    settled = await store.settle(settle(1, scope))
    assert isinstance(granted, Granted)
    assert isinstance(settled, Settled)
    assert granted.epoch == settled.epoch == NEW_YEAR


# -- who shares it ---------------------------------------------------------------------------------------------------


async def test_processes_are_counted_while_they_beat(store: BudgetStore, clock: Clock) -> None:
    one, two = reservation_id(1), reservation_id(2)
    await opened(store, tenant())
    assert (await store.beat(one, 10_000)).processes == 1
    assert (await store.beat(one, 10_000)).processes == 1
    clock.now += 6000
    assert (await store.beat(two, 10_000)).processes == 2
    clock.now += 3999
    assert (await store.beat(two, 10_000)).processes == 2
    clock.now += 1
    assert (await store.beat(two, 10_000)).processes == 1, "one was not heard of for ten seconds"
    assert (await store.beat(one, 10_000)).processes == 2
    assert (await store.beat(two, 0)).processes == 1, "it left"
    assert (await store.beat(one, 0)).processes == 0


async def test_a_process_that_beats_is_not_given_up_when_the_clock_is_set_back(
    store: BudgetStore, clock: Clock
) -> None:
    one, two = reservation_id(1), reservation_id(2)
    await opened(store, tenant())
    await store.beat(one, 10_000)
    clock.now -= 3_600_000
    assert (await store.beat(two, 10_000)).processes == 2
    clock.now += 10_000
    assert (await store.beat(two, 10_000)).processes == 1, "nor kept for an hour longer"


async def test_a_beat_tells_the_life_of_the_store_and_works_while_it_is_cold(store: BudgetStore) -> None:
    assert await store.beat(reservation_id(1), 10_000) == Beat(1, 0)
    await opened(store, tenant())
    assert await store.beat(reservation_id(2), 10_000) == Beat(2, NEW_YEAR)


async def test_a_process_has_an_id_of_our_own_making(store: BudgetStore) -> None:
    with pytest.raises(ValueError, match="32 lower-case"):
        await store.beat("}elsewhere", 1000)


# -- reserve ---------------------------------------------------------------------------------------------------------


async def test_a_reservation_takes_all_scopes_or_none(store: BudgetStore) -> None:
    wide, narrow = tenant("wide", tokens_per_minute=1000), Scope("key", "narrow", Limits(tokens_per_minute=100))
    await opened(store, wide, narrow)
    refused = await store.reserve(ask(1, wide, narrow, tokens=100, requests=3))
    assert isinstance(refused, Granted)
    refused = await store.reserve(ask(2, wide, narrow, tokens=1))
    assert isinstance(refused, Refused)
    assert (refused.scope, refused.window) == (narrow, "tokens_per_minute")
    assert (refused.limit, refused.used, refused.reserved) == (100, 0, 100)
    assert (await balance(store, wide)).held_tokens == 100
    assert (await balance(store, wide)).live == 1


async def test_a_repeated_reservation_is_held_once(store: BudgetStore) -> None:
    scope = tenant(tokens_per_minute=150)
    await opened(store, scope)
    first = await store.reserve(ask(1, scope, tokens=100))
    assert await store.reserve(ask(1, scope, tokens=100)) == first
    assert (await balance(store, scope)).held_tokens == 100


async def test_a_refused_ask_may_be_tried_again_under_the_same_id(store: BudgetStore) -> None:
    scope = tenant(max_concurrent=1)
    await opened(store, scope)
    await store.reserve(ask(1, scope))
    assert isinstance(await store.reserve(ask(2, scope)), Refused)
    await store.settle(settle(1, scope))
    assert isinstance(await store.reserve(ask(2, scope)), Granted)


async def test_balances_stand_in_the_order_of_the_scopes_and_include_the_ask(store: BudgetStore) -> None:
    one, two = tenant("one"), Scope("global", "", Limits(nano_usd_per_day=10))
    await opened(store, one, two)
    granted = await store.reserve(ask(1, two, one, requests=1, tokens=20, nano_usd=3))
    assert isinstance(granted, Granted)
    assert [each.scope for each in granted.balances] == [two, one]
    assert {each.row.held_tokens for each in granted.balances} == {20}
    assert {each.row.minute_held_nano_usd for each in granted.balances} == {3}


async def test_every_span_of_sixty_seconds_stays_under_the_limit(store: BudgetStore, clock: Clock) -> None:
    scope = tenant(tokens_per_minute=100)
    await opened(store, scope)
    clock.now = NEW_YEAR + 999
    await store.reserve(ask(1, scope, tokens=100))
    await store.settle(settle(1, scope, tokens=100))
    clock.now = NEW_YEAR + 999 + 60_000
    assert isinstance(await store.reserve(ask(2, scope, tokens=1)), Refused), "sixty seconds are not over before 61"
    clock.now = NEW_YEAR + 61_000
    assert isinstance(await store.reserve(ask(2, scope, tokens=100)), Granted)


@pytest.mark.parametrize(("taken", "wanted", "second"), [(60, 40, 0), (60, 41, 61), (60, 100, 66), (61, 100, 66)])
async def test_retry_after_is_a_bound_that_holds_to_the_millisecond(
    store: BudgetStore, clock: Clock, taken: int, wanted: int, second: int
) -> None:
    scope = tenant(tokens_per_minute=100)
    await opened(store, scope)
    clock.now = NEW_YEAR
    await store.reserve(ask(1, scope, tokens=taken - 20))
    clock.now = NEW_YEAR + 5500
    await store.reserve(ask(2, scope, tokens=20))
    verdict = await store.reserve(ask(3, scope, tokens=wanted))
    if not second:
        assert isinstance(verdict, Granted)
        return
    assert isinstance(verdict, Refused)
    assert verdict.retry_after_ms == second * 1000 - 5500
    assert verdict.reset_ms == 66_000 - 5500
    clock.now += verdict.retry_after_ms - 1
    assert isinstance(await store.reserve(ask(3, scope, tokens=wanted)), Refused)
    clock.now += 1
    assert isinstance(await store.reserve(ask(3, scope, tokens=wanted, lease_ms=1)), Granted)


async def test_a_calendar_window_begins_anew_and_what_is_held_is_not_forgotten(
    store: BudgetStore, clock: Clock
) -> None:
    scope = tenant(nano_usd_per_hour=100)
    await opened(store, scope)
    await store.reserve(ask(1, scope, nano_usd=60, lease_ms=10 * HOUR))
    await store.reserve(ask(2, scope, nano_usd=40, lease_ms=10 * HOUR))
    await store.settle(settle(2, scope, nano_usd=40))
    soon = await store.reserve(ask(3, scope, nano_usd=40))
    later = await store.reserve(ask(3, scope, nano_usd=41))
    assert isinstance(soon, Refused)
    assert isinstance(later, Refused)
    assert (soon.used, soon.reserved, soon.window) == (40, 60, "usd_per_hour")
    assert soon.retry_after_ms == soon.reset_ms == later.reset_ms == 10_000
    assert later.retry_after_ms == 10_000 + HOUR, "the held 60 may yet be spent in the next hour"
    clock.now += 10_000
    assert isinstance(await store.reserve(ask(3, scope, nano_usd=40)), Granted)
    await store.settle(settle(1, scope, nano_usd=60))
    assert (await balance(store, scope)).hour_nano_usd == 60, "a long stream is spent where it ends"


@pytest.mark.parametrize(
    ("limits", "window"),
    [
        ({"requests_per_minute": 1}, "requests_per_minute"),
        ({"tokens_per_minute": 1}, "tokens_per_minute"),
        ({"nano_usd_per_minute": 1}, "usd_per_minute"),
        ({"nano_usd_per_hour": 1}, "usd_per_hour"),
        ({"nano_usd_per_day": 1}, "usd_per_day"),
        ({"nano_usd_per_month": 1}, "usd_per_month"),
    ],
)
async def test_an_ask_above_the_whole_window_is_told_never(
    store: BudgetStore, limits: dict[str, int], window: str
) -> None:
    scope = tenant(max_concurrent=1, **limits)
    await opened(store, scope)
    await store.reserve(ask(1, scope, requests=0))
    refused = await store.reserve(ask(2, scope, requests=2, tokens=2, nano_usd=2))
    assert isinstance(refused, Refused)
    assert (refused.window, refused.retry_after_ms) == (window, None)


async def test_of_several_full_windows_the_one_that_takes_longest_is_named(store: BudgetStore) -> None:
    one = Scope("provider", "p", Limits(requests_per_minute=1, max_concurrent=1))
    two = tenant("t", nano_usd_per_day=5, nano_usd_per_month=5)
    three = Scope("global", "", Limits(requests_per_minute=1))
    await opened(store, one, two, three)
    await store.reserve(ask(1, one, two, three, nano_usd=5))
    await store.settle(settle(1, one, two, three, nano_usd=5))
    refused = await store.reserve(ask(2, one, two, three, nano_usd=5))
    assert isinstance(refused, Refused)
    assert (refused.scope, refused.window) == (one, "requests_per_minute"), "a minute, the others ten seconds"


@pytest.mark.parametrize("window", ["hour", "day", "month"])
async def test_the_last_day_of_a_year_ends_hour_day_and_month_at_once(
    store: BudgetStore, clock: Clock, window: str
) -> None:
    scope = tenant(**{f"nano_usd_per_{window}": 5})
    await opened(store, scope)
    await store.reserve(ask(1, scope, nano_usd=5))
    await store.settle(settle(1, scope, nano_usd=5))
    refused = await store.reserve(ask(2, scope, nano_usd=5))
    assert isinstance(refused, Refused)
    assert refused.retry_after_ms == 10_000
    clock.now += 10_000
    assert isinstance(await store.reserve(ask(2, scope, nano_usd=5)), Granted)


async def test_concurrency_counts_what_lives(store: BudgetStore) -> None:
    scope = tenant(max_concurrent=2)
    await opened(store, scope)
    await store.reserve(ask(1, scope))
    await store.reserve(ask(2, scope))
    refused = await store.reserve(ask(3, scope))
    assert isinstance(refused, Refused)
    assert (refused.window, refused.limit, refused.used, refused.retry_after_ms) == ("max_concurrent", 2, 2, 1000)
    await store.settle(settle(1, scope))
    assert isinstance(await store.reserve(ask(3, scope)), Granted)


async def test_a_scope_that_is_not_enforced_says_what_it_would_have_refused(store: BudgetStore) -> None:
    watched = Scope("tenant", "t", Limits(requests_per_minute=1, tokens_per_minute=10), enforced=False)
    firm = Scope("key", "k", Limits(requests_per_minute=3))
    await opened(store, watched, firm)
    first = await store.reserve(ask(1, watched, firm, tokens=5))
    second = await store.reserve(ask(2, watched, firm, tokens=11))
    assert isinstance(first, Granted)
    assert isinstance(second, Granted)
    assert first.over is None
    assert second.over is not None
    assert (second.over.scope, second.over.window, second.over.retry_after_ms) == (watched, "tokens_per_minute", None)
    assert second.balances[0].row.held_tokens == 16
    await store.reserve(ask(3, watched, firm))
    refused = await store.reserve(ask(4, watched, firm))
    assert isinstance(refused, Refused)
    assert refused.scope is firm


# -- settle ----------------------------------------------------------------------------------------------------------


async def test_settling_frees_what_was_not_used_in_the_second_it_was_reserved(store: BudgetStore, clock: Clock) -> None:
    scope = tenant(tokens_per_minute=100)
    await opened(store, scope)
    await store.reserve(ask(1, scope, tokens=100, nano_usd=9))
    clock.now += 20_000
    settled = await store.settle(settle(1, scope, tokens=30, nano_usd=4))
    assert isinstance(settled, Settled)
    assert settled.outcome == "settled"
    row = settled.balances[0].row
    assert (row.minute_tokens, row.minute_held_tokens, row.held_tokens, row.live) == (30, 0, 0, 0)
    assert (row.minute_nano_usd, row.hour_nano_usd, row.day_nano_usd, row.month_nano_usd) == (4, 4, 4, 4)
    clock.now += 40_999
    assert isinstance(await store.reserve(ask(2, scope, tokens=71)), Refused)
    assert isinstance(await store.reserve(ask(2, scope, tokens=70)), Granted)
    clock.now += 1
    assert (await balance(store, scope)).minute_tokens == 0, "it leaves with the second of its reservation"


async def test_what_was_used_above_the_ask_counts_from_now_on(store: BudgetStore, clock: Clock) -> None:
    scope = tenant(tokens_per_minute=100)
    await opened(store, scope)
    await store.reserve(ask(1, scope, tokens=40))
    clock.now += 20_000
    await store.settle(settle(1, scope, tokens=130))
    assert (await balance(store, scope)).minute_tokens == 130
    clock.now += 41_000
    assert (await balance(store, scope)).minute_tokens == 90
    clock.now += 20_000
    assert (await balance(store, scope)).minute_tokens == 0


async def test_settling_after_the_ring_has_turned_changes_only_the_calendar(store: BudgetStore, clock: Clock) -> None:
    scope = tenant(tokens_per_minute=100)
    await opened(store, scope)
    await store.reserve(ask(1, scope, tokens=40, nano_usd=6, lease_ms=HOUR))
    clock.now += 122_000
    await store.settle(settle(1, scope, tokens=40, nano_usd=5))
    row = await balance(store, scope)
    assert (row.minute_tokens, row.minute_nano_usd, row.held_tokens, row.day_nano_usd) == (0, 0, 0, 5)


async def test_an_id_is_settled_once(store: BudgetStore) -> None:
    scope = tenant()
    await opened(store, scope)
    entry = Entry(("acme", "", "m", "p", "", "true"), Tally(requests=1, nano_usd=5), ("id", "1"))
    await store.reserve(ask(1, scope, nano_usd=9))
    for outcome in ("settled", "already", "already"):
        settled = await store.settle(settle(1, scope, nano_usd=5, entries=(entry,)))
        assert isinstance(settled, Settled)
        assert settled.outcome == outcome
    assert (await balance(store, scope)).day_nano_usd == 5
    assert await store.reserve(ask(1, scope, nano_usd=9)) == Ended()
    assert [record.fields for record in await store.outbox("", 10)] == [("id", "1")]
    (row,) = await store.usage(0, NEW_YEAR + HOUR, ())
    assert row.usage == Tally(requests=1, nano_usd=5)


async def test_a_reservation_that_the_store_never_had_is_charged_and_never_granted_again(store: BudgetStore) -> None:
    one, two = tenant("one"), tenant("two")
    await opened(store, one, two)
    sent = Settlement(reservation_id(1), (one, two), Amounts(1, 50, 7), ((two, Amounts(1, 5, 0)),))
    settled = await store.settle(sent)
    assert isinstance(settled, Settled)
    assert settled.outcome == "unknown"
    assert [each.row.minute_tokens for each in settled.balances] == [50, 5]
    assert [each.row.day_nano_usd for each in settled.balances] == [7, 0]
    assert await store.reserve(ask(1, one, two)) == Ended(), "a reservation that arrives after its settlement"
    again = await store.settle(sent)
    assert isinstance(again, Settled)
    assert again.outcome == "already"


async def test_a_scope_can_have_an_amount_of_its_own(store: BudgetStore) -> None:
    provider, owner = Scope("provider", "p"), tenant()
    await opened(store, provider, owner)
    await store.reserve(ask(1, provider, owner, tokens=100))
    await store.settle(
        Settlement(reservation_id(1), (provider, owner), Amounts(1, 90, 0), ((provider, Amounts(1, 30, 0)),))
    )
    assert (await balance(store, provider)).minute_tokens == 30
    assert (await balance(store, owner)).minute_tokens == 90


# -- leases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "charged"), [("charge", 80), ("refund", 0)])
async def test_a_lost_reservation_ends_by_itself_and_a_late_settle_corrects_it_once(
    store: BudgetStore, clock: Clock, policy: str, charged: int
) -> None:
    scope = tenant()
    await opened(store, scope)
    clock.now += 20_000  # away from the end of the hour
    await store.reserve(ask(1, scope, tokens=80, nano_usd=80, lease_ms=30_000, on_lost=policy))
    clock.now += 29_999
    assert (await balance(store, scope)).held_tokens == 80
    clock.now += 1
    row = await balance(store, scope)
    assert (row.held_tokens, row.live, row.minute_held_tokens) == (0, 0, 0)
    assert (row.minute_tokens, row.day_nano_usd) == (charged, charged)
    late = await store.settle(settle(1, scope, tokens=50, nano_usd=90))
    assert isinstance(late, Settled)
    assert late.outcome == "late"
    assert (late.balances[0].row.minute_tokens, late.balances[0].row.day_nano_usd) == (50, 90)
    again = await store.settle(settle(1, scope, tokens=70, nano_usd=99))
    assert isinstance(again, Settled)
    assert again.outcome == "already"
    assert (await balance(store, scope)).minute_tokens == 50
    lost = [dict(zip(each.fields[::2], each.fields[1::2], strict=True)) for each in await store.outbox("", 10)]
    assert [each["lost"] for each in lost] == [reservation_id(1)]
    assert [int(each["nano_usd"]) for each in lost] == [charged]


async def test_a_late_settle_gives_nothing_back_to_a_calendar_window_that_is_over(
    store: BudgetStore, clock: Clock
) -> None:
    scope = tenant()
    await opened(store, scope)
    await store.reserve(ask(1, scope, nano_usd=80, lease_ms=5000))
    clock.now += 6000
    await balance(store, scope)  # booked here, in the old year
    clock.now += 6000
    await store.reserve(ask(2, scope, nano_usd=100))
    await store.settle(settle(2, scope, nano_usd=100))
    await store.settle(settle(1, scope, nano_usd=10))
    row = await balance(store, scope)
    assert (row.hour_nano_usd, row.day_nano_usd, row.month_nano_usd) == (100, 100, 100)


async def test_extend_keeps_a_reservation_and_tells_which_are_lost(store: BudgetStore, clock: Clock) -> None:
    scope = tenant()
    await opened(store, scope)
    for number in (1, 2, 3):
        await store.reserve(ask(number, scope, lease_ms=30_000))
    await store.settle(settle(3, scope))
    clock.now += 20_000
    ids = [reservation_id(number) for number in (1, 3, 9)]
    assert await store.extend(ids, 30_000) == (reservation_id(3), reservation_id(9))
    clock.now += 15_000
    assert (await balance(store, scope)).live == 1
    assert await store.extend([reservation_id(1), reservation_id(2)], 30_000) == (reservation_id(2),)
    assert await store.extend([reservation_id(1)], 1) == (), "a lease never becomes shorter"
    clock.now += 29_999
    assert (await balance(store, scope)).live == 1
    clock.now += 1
    assert (await balance(store, scope)).live == 0


async def test_one_call_books_no_more_than_twenty_lost_reservations(store: BudgetStore, clock: Clock) -> None:
    scope = tenant()
    await opened(store, scope)
    for number in range(45):
        await store.reserve(ask(number, scope, lease_ms=1000))
    clock.now += 1000
    assert [(await balance(store, scope)).live for _ in range(3)] == [25, 5, 0]


async def test_an_ended_reservation_is_forgotten_in_time(store: BudgetStore, clock: Clock) -> None:
    scope = tenant()
    await opened(store, scope)
    await store.reserve(ask(1, scope))
    await store.settle(settle(1, scope))
    clock.now += 899_999
    assert await store.reserve(ask(1, scope)) == Ended()
    clock.now += 1
    assert isinstance(await store.reserve(ask(1, scope)), Granted)


async def test_a_late_settle_is_remembered_from_the_time_it_came(store: BudgetStore, clock: Clock) -> None:
    scope = tenant()
    await opened(store, scope)
    await store.reserve(ask(1, scope, lease_ms=1000))
    clock.now += 1000
    await balance(store, scope)
    clock.now += 600_000
    await store.settle(settle(1, scope))
    clock.now += 600_000
    settled = await store.settle(settle(1, scope))
    assert isinstance(settled, Settled)
    assert settled.outcome == "already"


# -- top-up ----------------------------------------------------------------------------------------------------------


async def test_a_stream_that_outgrows_its_reservation_raises_it(store: BudgetStore, clock: Clock) -> None:
    scope = tenant(tokens_per_minute=100, nano_usd_per_day=100)
    await opened(store, scope)
    await store.reserve(ask(1, scope, tokens=40, nano_usd=10, lease_ms=HOUR))
    clock.now += 5000
    for _ in range(2):  # the reply was lost: it is asked again, and held once
        granted = await store.top_up(reservation_id(1), Amounts(1, 60, 30), (scope,))
        assert isinstance(granted, Granted)
        row = granted.balances[0].row
        assert (row.held_requests, row.held_tokens, row.held_nano_usd, row.live) == (1, 60, 30, 1)
    lower = await store.top_up(reservation_id(1), Amounts(0, 5, 5), (scope,))
    assert isinstance(lower, Granted)
    assert lower.balances[0].row.held_tokens == 60, "it only rises"
    refused = await store.top_up(reservation_id(1), Amounts(1, 101, 30), (scope,))
    assert isinstance(refused, Refused)
    assert (refused.reserved, refused.retry_after_ms) == (60, 56_000)
    clock.now += 56_000
    row = await balance(store, scope)
    assert (row.minute_held_tokens, row.held_tokens) == (20, 60), "each part leaves with its own second"
    await store.settle(settle(1, scope, tokens=50, nano_usd=20))
    row = await balance(store, scope)
    assert (row.minute_tokens, row.held_tokens, row.hour_nano_usd) == (10, 0, 20), "the oldest part was used first"


async def test_a_failover_moves_a_reservation_to_another_account_in_one_step(store: BudgetStore) -> None:
    first = Scope("provider", "first", Limits(max_concurrent=1))
    second = Scope("provider", "second", Limits(tokens_per_minute=100, max_concurrent=1))
    owner = tenant(tokens_per_minute=100)
    await opened(store, first, second, owner)
    await store.reserve(ask(1, first, owner, tokens=50))
    await store.reserve(ask(2, second, tokens=20))
    full = await store.top_up(reservation_id(1), Amounts(1, 80, 0), (second, owner), ((first, Amounts(1, 5, 0)),))
    assert isinstance(full, Refused)
    assert (full.scope, full.window) == (second, "max_concurrent") or full.window == "tokens_per_minute"
    assert (await balance(store, first)).live == 1, "refused, it stays where it was"
    assert (await balance(store, owner)).held_tokens == 50
    await store.settle(settle(2, second, tokens=20))
    for _ in range(2):
        moved = await store.top_up(reservation_id(1), Amounts(1, 80, 0), (second, owner), ((first, Amounts(1, 5, 0)),))
        assert isinstance(moved, Granted)
        assert [each.row.held_tokens for each in moved.balances] == [80, 80]
    row = await balance(store, first)
    assert (row.live, row.held_tokens, row.minute_tokens, row.minute_requests) == (0, 0, 5, 1)
    settled = await store.settle(
        Settlement(reservation_id(1), (second, owner), Amounts(2, 75, 0), ((second, Amounts(1, 70, 0)),))
    )
    assert isinstance(settled, Settled)
    assert [each.row.minute_tokens for each in settled.balances] == [90, 75]
    assert (await balance(store, first)).minute_tokens == 5
    assert [each.row.live for each in await store.balance([first, second, owner])] == [0, 0, 0]


async def test_what_is_not_live_cannot_be_raised(store: BudgetStore, clock: Clock) -> None:
    scope = tenant()
    await opened(store, scope)
    assert await store.top_up(reservation_id(1), Amounts(1, 2, 3), (scope,)) == Ended()
    await store.reserve(ask(1, scope, lease_ms=1000))
    clock.now += 1000
    assert await store.top_up(reservation_id(1), Amounts(1, 2, 3), (scope,)) == Ended()
    await store.reserve(ask(2, scope))
    assert await store.top_up(reservation_id(2), Amounts(1, 2, 3), (scope, tenant("new"))) != Ended()
    await store.settle(settle(2, scope))
    assert await store.top_up(reservation_id(2), Amounts(1, 2, 3), (scope,)) == Ended()


# -- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [-900, -5000, -30_000, -HOUR, -40 * 24 * HOUR])
async def test_a_clock_that_is_set_back_opens_no_window_again_and_blocks_none(
    store: BudgetStore, clock: Clock, step: int
) -> None:
    scope = tenant(tokens_per_minute=100, nano_usd_per_month=100)
    await opened(store, scope)
    await store.reserve(ask(1, scope, tokens=100, nano_usd=100))
    await store.settle(settle(1, scope, tokens=100, nano_usd=60))
    clock.now += 3000
    await balance(store, scope)
    clock.now += step
    row = await balance(store, scope)
    assert (row.minute_tokens, row.month_nano_usd) == (100, 60)
    assert isinstance(await store.reserve(ask(2, scope, tokens=1)), Refused)
    clock.now += 62_000
    assert isinstance(await store.reserve(ask(2, scope, tokens=100, nano_usd=10)), Granted), "the minute went on"
    clock.now += 30_000
    assert (await balance(store, scope)).held_tokens == 0, "and so did the lease"


# -- names and numbers -----------------------------------------------------------------------------------------------


async def test_no_name_reaches_the_windows_of_another(store: BudgetStore) -> None:
    names = ["a", "a:1", "1:a", "a}{b", "{a}", "", "é", "a\n", "a ", "*"]
    scopes = [Scope(kind, name) for name in names for kind in ("tenant", "key")]
    scopes += [Scope("tenant", "x:3:key"), Scope("key", "x:3:tenant")]
    await opened(store, *scopes)
    for number, scope in enumerate(scopes):
        await store.reserve(ask(number, scope, tokens=number + 1))
    for number, scope in enumerate(scopes):
        assert (await balance(store, scope)).held_tokens == number + 1


async def test_scopes_of_one_kind_and_name_share_their_windows_whatever_their_limits(store: BudgetStore) -> None:
    old, new = tenant(tokens_per_minute=10), tenant(tokens_per_minute=20)
    await opened(store, old)
    await store.reserve(ask(1, old, tokens=10))
    refused = await store.reserve(ask(2, old, tokens=1))
    assert isinstance(refused, Refused)
    granted = await store.reserve(ask(2, new, tokens=10))
    assert isinstance(granted, Granted)
    assert granted.balances[0].row.held_tokens == 20


async def test_large_amounts_stay_exact_and_a_sum_that_would_not_stays_where_it_is(store: BudgetStore) -> None:
    scope = tenant(tokens_per_minute=MAX_SUM)
    await opened(store, scope)
    for number in range(2):
        await store.reserve(ask(number, scope, tokens=MAX_AMOUNT - 1, nano_usd=MAX_AMOUNT - 1))
        await store.settle(settle(number, scope, tokens=MAX_AMOUNT - 1, nano_usd=MAX_AMOUNT - 1))
    row = await balance(store, scope)
    assert (row.minute_tokens, row.month_nano_usd) == (2 * MAX_AMOUNT - 2, 2 * MAX_AMOUNT - 2)
    await store.seed([Remembered(scope, (row.hour, row.day, row.month), (MAX_SUM - 1, 0, 0))])
    await store.reserve(ask(5, scope, nano_usd=5))
    await store.settle(settle(5, scope, nano_usd=5))
    assert (await balance(store, scope)).hour_nano_usd == MAX_SUM


@pytest.mark.parametrize("wrong", ["", "1" * 31, "1" * 33, "G" * 32, "A" * 32, "1" * 30 + "}:", "１" * 32])
async def test_an_id_is_of_our_own_making(store: BudgetStore, wrong: str) -> None:
    scope = tenant()
    await opened(store, scope)
    with pytest.raises(ValueError, match="hexadecimal"):
        await store.reserve(Reservation(wrong, (scope,), Amounts()))
    with pytest.raises(ValueError, match="hexadecimal"):
        await store.settle(Settlement(wrong, (scope,), Amounts()))
    with pytest.raises(ValueError, match="hexadecimal"):
        await store.top_up(wrong, Amounts(), (scope,))
    with pytest.raises(ValueError, match="hexadecimal"):
        await store.extend([wrong], 1000)


@pytest.mark.parametrize("wrong", [Amounts(-1), Amounts(0, -1), Amounts(0, 0, -1), Amounts(0, MAX_AMOUNT + 1)])
async def test_an_amount_that_cannot_be_is_refused_before_anything_is_done(store: BudgetStore, wrong: Amounts) -> None:
    scope = tenant()
    await opened(store, scope)
    with pytest.raises(ValueError, match="amount"):
        await store.reserve(Reservation(reservation_id(1), (scope,), wrong))
    with pytest.raises(ValueError, match="amount"):
        await store.settle(Settlement(reservation_id(1), (scope,), wrong))
    assert (await balance(store, scope)).live == 0


async def test_a_scope_is_taken_once_and_either_covered_or_left(store: BudgetStore) -> None:
    scope = tenant()
    await opened(store, scope)
    for scopes in ((), (scope, tenant())):
        with pytest.raises(ValueError, match="each once"):
            await store.reserve(ask(1, *scopes))
    with pytest.raises(ValueError, match="covered or left"):
        await store.top_up(reservation_id(1), Amounts(), (scope,), ((scope, Amounts()),))


# -- the ledger ------------------------------------------------------------------------------------------------------


def entry(name: str, model: str, quality: str = "true", **counts: int) -> Entry:
    return Entry((name, "key", model, "p", "", quality), Tally(**counts), ("model", model))


async def test_usage_adds_up_by_what_is_asked_for(store: BudgetStore, clock: Clock) -> None:
    scope = tenant()
    await opened(store, scope)
    booked = [
        (entry("a", "m1", requests=1, input=10, output=1, nano_usd=5), entry("a", "m2", requests=1, input=7)),
        (entry("a", "m1", requests=1, input=20, cache_read=4, nano_usd=6),),
        (entry("b", "m1", "estimated", requests=1, output=9, reasoning=3, cache_write=2, cost_unknown=1),),
    ]
    for number, entries in enumerate(booked):
        await store.settle(settle(number, scope, entries=entries))
        clock.now += 20_000  # the second and third fall into the next hour
    everything = await store.usage(0, clock.now + HOUR, ("tenant", "model"))
    assert [(row.dimensions, row.usage) for row in everything] == [
        (("a", "m1"), Tally(requests=2, input=30, output=1, cache_read=4, nano_usd=11)),
        (("a", "m2"), Tally(requests=1, input=7)),
        (("b", "m1"), Tally(requests=1, output=9, reasoning=3, cache_write=2, cost_unknown=1)),
    ]
    assert [row.dimensions for row in await store.usage(0, clock.now + HOUR, ("quality",))] == [
        ("estimated",),
        ("true",),
    ]
    first_hour = NEW_YEAR // HOUR * HOUR
    (row,) = await store.usage(first_hour, first_hour + HOUR, ())
    assert row.usage == Tally(requests=2, input=17, output=1, nano_usd=5)
    assert await store.usage(first_hour + 2 * HOUR, first_hour + 9 * HOUR, ()) == []


async def test_the_outbox_is_read_on_from_where_one_stopped(store: BudgetStore, clock: Clock) -> None:
    scope = tenant()
    await opened(store, scope)
    for number in range(5):
        await store.settle(settle(number, scope, entries=(entry("a", f"m{number}"),)))
    first = await store.outbox("", 2)
    rest = await store.outbox(first[-1].id, 10)
    assert [record.fields for record in first + rest] == [("model", f"m{number}") for number in range(5)]
    assert await store.outbox(rest[-1].id, 10) == []


@pytest.mark.slow
async def test_a_tenant_with_endless_tags_fills_its_own_hour_only(store: BudgetStore) -> None:
    scope = tenant()
    await opened(store, scope)
    number = 0
    for start in range(0, ROLLUP_FIELDS + 100, 50):
        entries = tuple(
            Entry(("loud", "", "m", "p", f"tag-{start + each}", "true"), Tally(requests=1)) for each in range(50)
        )
        await store.settle(settle(number, scope, entries=entries))
        number += 1
    await store.settle(settle(number, scope, entries=(entry("quiet", "m", requests=1),)))
    rows = {row.dimensions: row.usage.requests for row in await store.usage(0, NEW_YEAR + HOUR, ("tenant", "tags"))}
    assert rows["loud", OTHER] == 100
    assert rows["quiet", ""] == 1
    assert sum(rows.values()) == ROLLUP_FIELDS + 101


async def test_a_record_is_names_and_values(store: BudgetStore) -> None:
    scope = tenant()
    await opened(store, scope)
    odd = Entry(("a",) * 6, Tally(), ("name",))
    with pytest.raises(ValueError, match="names and values"):
        await store.settle(settle(1, scope, entries=(odd,)))
    short = Entry(("a",), Tally())
    with pytest.raises(ValueError, match="dimensions"):
        await store.settle(settle(1, scope, entries=(short,)))
