"""What a client and an administrator are told, what a cut stream ends with, and who is called of those who wait."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.budget.amounts import Limits, Row
from proxy.budget.answers import budget_exceeded, go_duration, rate_limit_headers
from proxy.budget.cut import Head, ending
from proxy.budget.policy import Policies, TenantBudget
from proxy.budget.report import by_tenant
from proxy.budget.settings import UNWRITTEN, BudgetSettings, LimitSettings
from proxy.budget.waiting import Waiting
from proxy.errors import BudgetExceeded
from proxy.store.base import Refused, Scope
from proxy.types import Record, Usage
from tests.budget.scene import TARGET, TENANT, Scene, usd, want

anyio = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "0s"),
        (-5, "0s"),
        (1, "1ms"),
        (999, "999ms"),
        (1000, "1s"),
        (1500, "1.5s"),
        (59_999, "59.999s"),
        (60_000, "1m0s"),
        (360_000, "6m0s"),
        (3_600_000, "1h0m0s"),
        (3_661_001, "1h1m1.001s"),
    ],
)
def test_durations_as_go_writes_them(milliseconds: int, text: str) -> None:
    assert go_duration(milliseconds) == text


def row(**figures: int) -> Row:
    return Row(**(dict.fromkeys(Row._fields, 0) | figures))


def test_of_several_scopes_the_tightest_is_shown() -> None:
    wide = Scope("tenant", "t", Limits(requests_per_minute=100, tokens_per_minute=1000))
    narrow = Scope("key", "t/k", Limits(tokens_per_minute=500))
    hidden = Scope("global", "", Limits(tokens_per_minute=10))
    watched = Scope("tenant", "t", Limits(requests_per_minute=1), enforced=False)
    headers = dict(
        rate_limit_headers(
            [
                (wide, row(minute_requests=3, minute_tokens=900, minute_held_tokens=20, minute_reset_ms=30_000)),
                (narrow, row(minute_tokens=400, minute_reset_ms=1500)),
                (hidden, row(minute_tokens=10)),
                (watched, row(minute_requests=1)),
            ]
        )
    )
    assert headers == {
        b"x-ratelimit-limit-requests": b"100",
        b"x-ratelimit-remaining-requests": b"97",
        b"x-ratelimit-reset-requests": b"30s",
        b"x-ratelimit-limit-tokens": b"1000",
        b"x-ratelimit-remaining-tokens": b"80",
        b"x-ratelimit-reset-tokens": b"30s",
    }


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_retry_after_is_never_too_short(wait_ms: int, reset_ms: int) -> None:
    scope = Scope("tenant", "t")
    error = budget_exceeded(Refused(scope, "tokens_per_minute", 5, 5, 0, wait_ms, reset_ms), [])
    headers = dict(error.headers)
    assert int(headers[b"retry-after"]) * 1000 >= wait_ms
    assert int(headers[b"retry-after"]) >= 1
    assert (headers.get(b"x-should-retry") == b"false") is (wait_ms > 60_000)


# -- policies --------------------------------------------------------------------------------------------------------


def test_who_is_held_by_what() -> None:
    policies = Policies(
        BudgetSettings(tokens_per_minute=10),
        everyone=LimitSettings(usd_per_day=usd("5")),
        accounts={"p": LimitSettings(max_concurrent=3), "free": LimitSettings()},
        tenants={
            "a": TenantBudget(BudgetSettings(tokens_per_minute=20), {"k": BudgetSettings(max_concurrent=1)}),
            "off": TenantBudget(BudgetSettings.model_validate(False)),
        },
    )

    def places(tenant: str, key: str = "", provider: str = "") -> list[str]:
        return [scope.place for scope in policies.of(tenant, key).at(provider).scopes]

    assert places("a") == ["global:0:", "tenant:1:a"]
    assert places("a", "k", "p") == ["global:0:", "tenant:1:a", "key:3:a/k", "provider:1:p"]
    assert places("a", "unknown", "free") == places("a")
    assert policies.of("a").own[1].limits.tokens_per_minute == 20
    assert policies.of("a", "k").own[2].limits == Limits(max_concurrent=1)
    assert policies.of("a").own[1] is policies.of("a", "k").own[1]
    assert policies.of("nobody").own[1].limits.tokens_per_minute == 10
    assert policies.of("off").own[1].limits == Limits()
    assert not policies.idle
    assert Policies(BudgetSettings(mode="off")).idle
    assert not Policies(UNWRITTEN).idle


@given(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8), st.text(max_size=8))
def test_no_two_names_share_their_windows(one: str, other: str, key: str) -> None:
    """Whatever a tenant is called, its windows are its own."""
    if one != other:
        assert Scope("tenant", one).place != Scope("tenant", other).place
    assert Scope("tenant", one).place != Scope("key", f"{other}/{key}").place


# -- reports ---------------------------------------------------------------------------------------------------------


@anyio
async def test_a_report_says_what_is_spent_reserved_and_at_risk() -> None:
    scene = Scene(BudgetSettings(tokens_per_minute=50_000, usd_per_day=usd("1")))
    await scene.serve(usage=Usage(100, 50))
    async with scene.budget.hold(TENANT, "", want(), [TARGET], Record()):
        (found,) = by_tenant(await scene.budget.report(), TENANT)
        windows = {one.window: one for one in found.windows}
        tokens, day = windows["tokens_per_minute"], windows["usd_per_day"]
        assert (tokens.limit, tokens.spent, found.live) == (50_000, 150, 1)
        assert tokens.reserved > 1024
        assert (tokens.at_risk, tokens.bound) == (4096 - 1024, 50_000)
        assert (day.spent, day.reset_ms) == (200_000, 24 * 3_600_000)
        assert day.at_risk == 3072 * 2000
    (after,) = by_tenant(await scene.budget.report(), TENANT)
    assert {(one.at_risk, one.reserved) for one in after.windows} == {(0, 0)}
    assert [one.windows[1].bound for one in await strict_report()] == [0]


async def strict_report() -> list:  # type: ignore[type-arg]
    scene = Scene(BudgetSettings(tokens_per_minute=50_000, estimate="max", on_overrun="cut"))
    await scene.serve(usage=Usage(1, 1))
    return await scene.budget.report()


# -- the end of a cut stream -----------------------------------------------------------------------------------------


def test_a_cut_chat_ends_as_if_it_had_met_its_maximum() -> None:
    head = Head()
    head.see(b": keep-alive\n\n")
    head.see(b'data: {"id": "c", "created": 5, "model": "m", "object": "chat.completion.chunk", "choices": []}\n\n')
    head.see(b'data: {"id": "later"}\n\n')
    events = ending("chat", head, 2).decode().split("\n\n")
    assert events[1:] == ["data: [DONE]", ""]
    chunk = json.loads(events[0].removeprefix("data: "))
    assert (chunk["id"], chunk["created"], chunk["model"]) == ("c", 5, "m")
    assert [(one["index"], one["finish_reason"], one["delta"]) for one in chunk["choices"]] == [
        (0, "length", {}),
        (1, "length", {}),
    ]


def test_a_cut_response_is_incomplete() -> None:
    head = Head()
    head.see(b'event: response.created\ndata: {"type": "response.created", "response": {"id": "r", "status": "x"}}\n\n')
    name, data = ending("responses", head).decode().rstrip("\n").split("\n")
    assert name == "event: response.incomplete"
    response = json.loads(data.removeprefix("data: "))["response"]
    assert (response["id"], response["status"]) == ("r", "incomplete")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}


@given(st.lists(st.binary(max_size=60), max_size=3), st.sampled_from(["chat", "completions", "responses"]))
def test_any_beginning_has_an_end(pieces: list[bytes], dialect: str) -> None:
    head = Head()
    for piece in pieces:
        head.see(piece)
    for event in ending(dialect, head).decode().rstrip("\n").split("\n\n"):  # type: ignore[arg-type]
        data = event.split("data: ", 1)[1]
        assert data == "[DONE]" or isinstance(json.loads(data), dict)


# -- waiting ---------------------------------------------------------------------------------------------------------


@anyio
async def test_waiters_are_called_in_turn_between_tenants_and_in_order_within() -> None:
    waiting = Waiting()
    called: list[str] = []

    async def wait(tenant: str, name: str) -> None:
        await waiting.turn(tenant, 60)
        called.append(name)

    tasks = [asyncio.create_task(wait(name[0], name)) for name in ("a1", "a2", "a3", "b1", "c1", "b2")]
    await asyncio.sleep(0)
    for _ in range(6):
        waiting.wake()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert called == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert waiting.size == 0
    assert not waiting.queued("a")


@anyio
async def test_a_call_to_somebody_who_left_goes_to_the_next() -> None:
    waiting = Waiting()
    first = asyncio.create_task(waiting.turn("a", 60))
    second = asyncio.create_task(waiting.turn("a", 60))
    await asyncio.sleep(0)
    waiting.wake()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.wait_for(second, 1)
    assert waiting.size == 0


@anyio
async def test_nobody_waits_longer_than_it_wants() -> None:
    waiting = Waiting(capacity=1)
    waiter = asyncio.create_task(waiting.turn("a", 0.02))
    await asyncio.sleep(0)
    assert not waiting.has_room()
    await asyncio.wait_for(waiter, 2)
    assert waiting.has_room()
    waiting.wake()


@anyio
async def test_a_refusal_never_says_that_something_remains_of_the_window_that_refused() -> None:
    """Another process took the room, and this one has not heard of it but by the refusal itself."""
    scene = Scene(BudgetSettings(requests_per_minute=2))
    await scene.serve()
    neighbour = Scene(BudgetSettings(requests_per_minute=2), store=scene.store, clock=scene.clock)
    await neighbour.serve()
    with pytest.raises(BudgetExceeded) as caught:
        await scene.serve()
    headers = dict(caught.value.headers)
    assert headers[b"x-ratelimit-remaining-requests"] == b"0"
    assert headers[b"x-ratelimit-limit-requests"] == b"2"
