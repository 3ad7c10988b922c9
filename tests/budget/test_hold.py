"""A charge over the memory store: what is held, what is charged, what is answered."""

from __future__ import annotations

import asyncio
import json

import pytest

from proxy.budget.policy import TenantBudget
from proxy.budget.pricing import FREE, Rates
from proxy.budget.settings import UNWRITTEN, BudgetSettings, LimitSettings
from proxy.errors import (
    BudgetExceeded,
    ConnectFailed,
    ModelPriceUnknown,
    ProviderFull,
    ProxyError,
    RequestExceedsBudget,
    UpstreamRateLimited,
    UpstreamTimeout,
    envelope,
)
from proxy.observability.events import BudgetRefused
from proxy.types import Event, Record, Target, Usage
from tests.budget.scene import OTHER_TARGET, RATES, TARGET, TENANT, Scene, chunk, usage_event, usd, want

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_what_was_reserved_is_given_back_and_what_was_used_is_spent() -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=100_000, usd_per_day=usd("1")))
    record = Record()
    async with scene.budget.hold(TENANT, "", want(), [TARGET], record) as charge:
        held = await scene.row()
        assert held.live == 1
        assert held.held_tokens > 1024
        await charge.cover(TARGET)
        charge.answered(200)
        charge.see(usage_event(Usage(12, 30)))
    row = await scene.row()
    assert (row.live, row.held_tokens, row.held_nano_usd) == (0, 0, 0)
    assert (row.minute_requests, row.minute_tokens) == (1, 42)
    assert row.day_nano_usd == record.nano_usd == 12 * 1000 + 30 * 2000
    assert record.usage == Usage(12, 30)
    (used,) = await scene.used("tenant", "model", "provider", "quality")
    assert used.dimensions == (TENANT, "m", "alpha", "true")
    assert (used.usage.input, used.usage.output, used.usage.nano_usd, used.usage.requests) == (12, 30, 72_000, 1)


async def test_with_n_times_the_maximum_n_run_at_once_and_one_more_waits_its_turn() -> None:
    ask = want(max_tokens=1000)
    scene = Scene(BudgetSettings(tokens_per_minute=50 * 1100))
    charges = [scene.budget.hold(TENANT, "", want(max_tokens=1000), [TARGET], Record()) for _ in range(50)]
    await asyncio.gather(*(charge.__aenter__() for charge in charges))
    assert (await scene.row()).live == 50
    refused = 0
    for _ in range(60):
        extra = scene.budget.hold(TENANT, "", want(max_tokens=1000), [TARGET], Record())
        try:
            charges.append(await extra.__aenter__())
        except BudgetExceeded:
            refused += 1
    assert refused, "a full window answers 429"
    for charge in charges:
        await charge.__aexit__(None, None, None)
    row = await scene.row()
    assert (row.live, row.held_tokens, row.minute_tokens) == (0, 0, 0)
    assert ask.asked == 1000


async def test_a_full_window_is_429_with_an_honest_bound() -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=2000))
    await scene.serve(usage=Usage(900, 900))
    scene.clock.pass_seconds(20)
    with pytest.raises(BudgetExceeded) as caught:
        await scene.serve()
    error = caught.value
    headers = dict(error.headers)
    assert (error.status, error.type, error.code) == (429, "budget_error", "budget_exceeded")
    seconds = int(headers[b"retry-after"])
    assert error.details["window"] == "tokens_per_minute"
    assert (error.details["scope"], error.details["limit"], error.details["used"]) == ("tenant", 2000, 1800)
    assert headers[b"x-ratelimit-limit-tokens"] == b"2000"
    assert headers[b"x-ratelimit-remaining-tokens"] == b"200"
    assert b"x-should-retry" not in headers
    scene.clock.pass_seconds(seconds)
    await scene.serve()
    assert [event.mode for event in scene.events if isinstance(event, BudgetRefused)] == ["enforce"]
    json.loads(envelope(error))


async def test_a_wait_of_more_than_a_minute_is_not_to_be_repeated_by_itself() -> None:
    scene = Scene(BudgetSettings(usd_per_day=usd("0.003")))
    await scene.serve(usage=Usage(500, 1000))
    with pytest.raises(BudgetExceeded) as caught:
        await scene.serve()
    headers = dict(caught.value.headers)
    assert headers[b"x-should-retry"] == b"false"
    assert caught.value.details["limit"] == "0.003"
    assert caught.value.details["used"] == "0.0025"


async def test_what_can_never_be_served_is_400() -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=1000))
    with pytest.raises(RequestExceedsBudget) as caught:
        await scene.serve(want("word " * 1200))
    assert (caught.value.status, caught.value.code) == (400, "request_exceeds_budget")
    with pytest.raises(RequestExceedsBudget):
        await Scene(BudgetSettings(usd_per_hour=usd("0.000001"))).serve()


async def test_under_max_the_clients_own_maximum_is_judged() -> None:
    strict = BudgetSettings(tokens_per_minute=3000, estimate="max", on_overrun="cut")
    with pytest.raises(RequestExceedsBudget):
        await Scene(strict).serve(want(max_tokens=4000))
    scene = Scene(strict)
    async with scene.budget.hold(TENANT, "", want(), [TARGET], Record()) as charge:
        await charge.cover(TARGET)
        row = await scene.row()
        assert row.held_tokens <= 3000
        assert charge.output_cap is not None
        assert 0 < charge.output_cap <= 3000
        charge.answered(500)


async def test_an_adaptive_request_whose_maximum_is_larger_than_the_window_is_served() -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=3000))
    await scene.serve(want(max_tokens=100_000))


async def test_an_unknown_price_is_refused_only_where_a_limit_in_dollars_applies() -> None:
    nobody: dict[str, Rates | None] = {"alpha": None}
    with pytest.raises(ModelPriceUnknown) as caught:
        await Scene(BudgetSettings(usd_per_day=usd("1")), rates=nobody).serve()
    assert '"m": {price:' in caught.value.message
    scene = Scene(BudgetSettings(tokens_per_minute=10_000), rates=nobody)
    record = await scene.serve()
    assert record.nano_usd is None
    assert (await scene.used())[0].usage.cost_unknown == 1
    await Scene(BudgetSettings(usd_per_day=usd("1"), on_unknown_price="allow"), rates=nobody).serve()
    with pytest.raises(ModelPriceUnknown):
        await Scene(BudgetSettings(on_unknown_price="deny"), rates=nobody).serve()
    free = await Scene(BudgetSettings(usd_per_day=usd("1")), rates={"alpha": FREE}).serve()
    assert free.nano_usd == 0


async def test_observe_refuses_nothing_and_says_what_it_would_have() -> None:
    scene = Scene(UNWRITTEN)
    for _ in range(4):
        record = await scene.serve(usage=Usage(20_000, 15_000))
        assert record.usage == Usage(20_000, 15_000)
        await scene.budget.daybook.flush()
    said = [event for event in scene.events if isinstance(event, BudgetRefused)]
    assert [(event.mode, event.window) for event in said] == [("observe", "tokens_per_minute")]  # one line a second
    assert scene.budget.admission.rate_limits(scene.policies.of(TENANT)) == []
    assert (await scene.row()).minute_tokens == 4 * 35_000


async def test_switched_off_still_books_what_was_spent() -> None:
    scene = Scene(BudgetSettings(mode="off", tokens_per_minute=1))
    await scene.serve()
    assert scene.policies.idle
    assert (await scene.used())[0].usage.requests == 1
    assert scene.events == []


async def test_a_full_account_refuses_the_target_and_only_all_of_them_the_request() -> None:
    accounts = {"alpha": LimitSettings(max_concurrent=1), "beta": LimitSettings(max_concurrent=1)}
    scene = Scene(accounts=accounts)
    first = scene.budget.hold(TENANT, "", want(), [TARGET, OTHER_TARGET], Record())
    await first.__aenter__()
    second = scene.budget.hold(TENANT, "", want(), [TARGET, OTHER_TARGET], Record())
    await second.__aenter__()
    with pytest.raises(ProviderFull):
        await second.cover(TARGET)
    await second.cover(OTHER_TARGET)
    third = scene.budget.hold(TENANT, "", want(), [TARGET, OTHER_TARGET], Record())
    with pytest.raises(ProviderFull) as caught:
        await third.__aenter__()
    assert (caught.value.status, caught.value.code, caught.value.details["scope"]) == (
        429,
        "budget_exceeded",
        "provider",
    )
    assert "used" not in caught.value.details
    await first.__aexit__(None, None, None)
    await second.__aexit__(None, None, None)
    for name in accounts:
        assert (await scene.row("provider", name)).live == 0


async def test_a_failover_is_charged_to_the_account_that_served() -> None:
    accounts = {"alpha": LimitSettings(tokens_per_minute=100_000), "beta": LimitSettings(tokens_per_minute=100_000)}
    dear = Rates(10 * 10**9, 10**9, 10**9, 20 * 10**9, 20 * 10**9)
    scene = Scene(BudgetSettings(usd_per_day=usd("10")), accounts=accounts, rates={"alpha": RATES, "beta": dear})
    record = Record()
    async with scene.budget.hold(TENANT, "", want(), [TARGET, OTHER_TARGET], record) as charge:
        before = (await scene.row()).held_nano_usd
        await charge.cover(TARGET)
        charge.failed(UpstreamTimeout("late"))
        await charge.cover(OTHER_TARGET)
        assert (await scene.row()).held_nano_usd > 9 * before, "the dearer target was repriced before it was sent to"
        charge.answered(200)
        charge.see(usage_event(Usage(10, 10)))
    alpha, beta = await scene.row("provider", "alpha"), await scene.row("provider", "beta")
    own = await scene.row()
    assert beta.minute_tokens == 20
    assert alpha.minute_tokens == own.minute_tokens - 20 > 1000
    assert (alpha.minute_requests, beta.minute_requests, own.minute_requests) == (1, 1, 1)
    assert own.day_nano_usd == record.nano_usd
    assert (alpha.live, beta.live, own.live, own.held_tokens) == (0, 0, 0, 0)
    quality = {row.dimensions: row.usage.requests for row in await scene.used("provider", "quality")}
    assert quality == {("alpha", "estimated"): 1, ("beta", "true"): 1}


@pytest.mark.parametrize(
    ("failure", "billed"),
    [
        (ConnectFailed("no", reason="refused"), False),
        (UpstreamRateLimited("429"), False),
        (UpstreamTimeout("late"), True),
    ],
)
async def test_failed_attempts_cost_what_they_may_have_been_billed(failure: ProxyError, billed: bool) -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=100_000))

    async def fail() -> None:
        async with scene.budget.hold(TENANT, "", want(), [TARGET], Record()) as charge:
            await charge.cover(TARGET)
            charge.failed(failure)
            raise failure

    with pytest.raises(type(failure)):
        await fail()
    row = await scene.row()
    assert (row.minute_tokens > 0) is billed
    assert (row.held_tokens, row.minute_requests) == (0, 1)


async def test_a_refusal_of_the_providers_costs_no_tokens() -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=100_000))
    async with scene.budget.hold(TENANT, "", want(), [TARGET], Record()) as charge:
        await charge.cover(TARGET)
        charge.answered(400)
        charge.see(Event(b'{"error": {"message": "no"}}'))
    assert (await scene.row()).minute_tokens == 0


async def test_a_client_that_leaves_pays_for_what_it_saw() -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=100_000))
    record = Record()

    async def leave() -> None:
        async with scene.budget.hold(TENANT, "", want(stream=True), [TARGET], record) as charge:
            await charge.cover(TARGET)
            charge.answered(200)
            for _ in range(10):
                charge.see(chunk(" word"))
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await leave()
    assert record.usage is not None
    assert (record.usage.output, record.usage.estimated) == (10, True)
    row = await scene.row()
    assert row.minute_tokens == record.usage.total


async def test_zero_from_the_provider_is_zero_and_not_unknown() -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=100_000))
    record = await scene.serve(usage=Usage(0, 0))
    assert record.usage == Usage(0, 0)
    assert record.nano_usd == 0


async def test_a_stream_that_outgrows_its_reservation_takes_more() -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=100_000))
    async with scene.budget.hold(TENANT, "", want(stream=True), [TARGET], Record()) as charge:
        await charge.cover(TARGET)
        charge.answered(200)
        before = (await scene.row()).held_tokens
        for _ in range(3000):
            if charge.see(chunk(" word")):
                assert await charge.grow()
        assert (await scene.row()).held_tokens > 3000 > before
    row = await scene.row()
    assert row.held_tokens == 0
    assert row.minute_tokens >= 3000


@pytest.mark.parametrize("cuts", [True, False])
async def test_a_stream_without_room_is_cut_or_finishes_as_the_tenant_wants(cuts: bool) -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=1500, on_overrun="cut" if cuts else "finish"))
    forwarded = 0
    async with scene.budget.hold(TENANT, "", want(stream=True), [TARGET], Record()) as charge:
        await charge.cover(TARGET)
        charge.answered(200)
        for _ in range(3000):
            if charge.see(chunk(" word")) and not await charge.grow():
                break
            forwarded += 1
    row = await scene.row()
    assert row.held_tokens == 0
    if cuts:
        assert forwarded < 1500
        assert row.minute_tokens <= 1500
    else:
        assert forwarded == 3000
        assert row.minute_tokens > 3000


async def test_repairs_share_the_reservation() -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=100_000))
    record = Record()
    async with scene.budget.hold(TENANT, "", want(), [TARGET], record) as charge:
        await charge.cover(TARGET)
        charge.answered(200)
        charge.see(usage_event(Usage(10, 20)))
        async with charge.child(want("a longer prompt, with a hint " * 20)) as repair:
            await repair.cover(TARGET)
            repair.answered(200)
            repair.see(usage_event(Usage(100, 200)))
            assert (await scene.row()).live == 1
    row = await scene.row()
    assert (row.live, row.minute_tokens, row.minute_requests) == (0, 330, 1)
    assert record.usage == Usage(110, 220)
    assert (await scene.used())[0].usage.requests == 2


async def test_a_key_has_its_own_limits_within_its_tenants() -> None:
    tenants = {
        TENANT: TenantBudget(
            BudgetSettings(tokens_per_minute=100_000), {"small": BudgetSettings(tokens_per_minute=1500)}
        )
    }
    scene = Scene(tenants=tenants)
    await scene.serve(usage=Usage(1000, 1000))
    async with scene.budget.hold(TENANT, "small", want(), [TARGET], Record()) as charge:
        with pytest.raises(BudgetExceeded) as caught:
            async with scene.budget.hold(TENANT, "small", want(), [TARGET], Record()):
                pass
        assert caught.value.details["scope"] == "key"
        assert dict(charge.headers())[b"x-ratelimit-limit-tokens"] == b"1500"
    await scene.serve()


async def test_the_deployments_limit_hides_the_others_load() -> None:
    scene = Scene(everyone=LimitSettings(tokens_per_minute=2000))
    await scene.serve(usage=Usage(1000, 900), tenant="other-tenant")
    with pytest.raises(BudgetExceeded) as caught:
        await scene.serve()
    assert caught.value.details.keys() == {"scope", "reset"}
    assert "1900" not in caught.value.message


async def test_waiting_its_turn_instead_of_being_refused() -> None:
    scene = Scene(BudgetSettings(max_concurrent=1, wait_ms=5000))
    first = scene.budget.hold(TENANT, "", want(), [TARGET], Record())
    await first.__aenter__()
    waiting = asyncio.create_task(scene.serve())
    while not scene.budget.waiting.size:
        await asyncio.sleep(0)
    assert not waiting.done()
    await first.__aexit__(None, None, None)
    record = await asyncio.wait_for(waiting, 0.9)
    assert record.usage is not None
    assert not [event for event in scene.events if isinstance(event, BudgetRefused)]


async def test_tenants_take_turns() -> None:
    scene = Scene(everyone=LimitSettings(max_concurrent=1), section=BudgetSettings(wait_ms=60_000))
    first = scene.budget.hold(TENANT, "", want(), [TARGET], Record())
    await first.__aenter__()
    order: list[str] = []

    async def serve(tenant: str) -> None:
        await scene.serve(tenant=tenant)
        order.append(tenant)

    tasks = [asyncio.create_task(serve("loud")) for _ in range(10)]
    while scene.budget.waiting.size < 10:
        await asyncio.sleep(0)
    tasks.append(asyncio.create_task(serve("quiet")))
    while scene.budget.waiting.size < 11:
        await asyncio.sleep(0)
    await first.__aexit__(None, None, None)
    await asyncio.wait_for(asyncio.gather(*tasks), 20)
    assert order.index("quiet") <= 1
    assert scene.budget.waiting.size == 0


async def test_what_is_learnt_is_what_the_next_one_reserves() -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=10_000))
    for _ in range(20):
        await scene.serve(usage=Usage(10, 7))
    async with scene.budget.hold(TENANT, "", want(), [TARGET], Record()):
        assert (await scene.row()).held_tokens < 40
    cheap = Target("alpha", "m2", "other label")
    async with scene.budget.hold(TENANT, "", want(), [cheap], Record()):
        assert (await scene.row()).held_tokens > 1024


async def test_a_pass_through_is_counted_and_its_cost_is_unknown() -> None:
    scene = Scene(BudgetSettings(requests_per_minute=5, tokens_per_minute=100_000))
    ask = want()
    ask.ask.dialect = "passthrough"
    record = Record()
    async with scene.budget.hold(TENANT, "", ask, [TARGET], record) as charge:
        await charge.cover(TARGET)
        charge.answered(200)
        charge.see(Event(b"\x00\x01 anything"))
    assert (record.usage, record.nano_usd) == (None, None)
    assert (await scene.row()).minute_requests == 1
    assert (await scene.used())[0].usage.cost_unknown == 1


async def test_what_a_child_has_spent_is_held_beside_the_attempt_that_follows_it() -> None:
    """A summary comes before the attempt that it is for: the reservation must be large enough for both."""
    scene = Scene(BudgetSettings(tokens_per_minute=10_000))
    async with scene.budget.hold(TENANT, "", want(max_tokens=100), [TARGET], Record()) as charge:
        asked = (await scene.row()).held_tokens
        async with charge.child(want("Sum it up", max_tokens=10)) as child:
            await child.cover(TARGET)
            child.answered(200)
            child.see(usage_event(Usage(500, 10)))
        await charge.cover(TARGET)
        assert (await scene.row()).held_tokens == asked + 510
