"""Budgets from the client's side: what is refused, what is said, and what is spent in the end. Real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import openai
import pytest

from proxy.observability.events import BudgetRefused, RequestFinished
from tests import clear
from tests.clear import CLEAR
from tests.e2e.stack import ALONE, Stack, stack

pytestmark = pytest.mark.anyio

KEYS = {name: f"bw-{name}-0123456789abcdef" for name in ("acme", "beta")}
PRICE = {"input": 1000, "output": 2000}
ASK: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 20}


@asynccontextmanager
async def gateway(provider: Mapping[str, Any] | None = None, **sections: Any) -> AsyncIterator[Stack]:
    config = {
        "providers": {"mock": {"kind": "mock", "models": {"*": {"price": PRICE}}, **(provider or {})}},
        "tenants": [{"name": name, "keys": [key]} for name, key in KEYS.items()],
        "listen": {"drain_ms": 0, "grace_ms": 1000},
        **sections,
    }
    async with stack(config) as running:
        yield running


@asynccontextmanager
async def client_of(running: Stack, tenant: str = "acme") -> AsyncIterator[httpx2.AsyncClient]:
    headers = {"authorization": f"Bearer {KEYS[tenant]}"}
    async with httpx2.AsyncClient(base_url=f"{running.url}/v1", headers=headers, timeout=20, verify=CLEAR) as client:
        yield client


async def spent(running: Stack, tenant: str = "acme") -> Any:
    """The tenant's own figures."""
    running.running.budget.policies.of(tenant)
    (one,) = [each for each in await running.running.budget.report() if (each.kind, each.name) == ("tenant", tenant)]
    return {window.window: window for window in one.windows}


async def test_a_full_window_is_429_with_its_figures_and_an_honest_wait() -> None:
    async with gateway(budget={"requests_per_minute": 2}) as running, client_of(running) as client:
        for left in ("1", "0"):
            answer = await client.post("/chat/completions", json=ASK)
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert answer.headers["x-ratelimit-remaining-requests"] == left
        refused = await client.post("/chat/completions", json=ASK)
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == ("budget_exceeded", "budget_error")
        details = refused.json()["error"]["breakwater"]
        assert (details["scope"], details["window"], details["limit"]) == ("tenant", "requests_per_minute", 2)
        assert (details["used"], details["reserved"]) == (2, 0)
        assert 55 <= int(refused.headers["retry-after"]) <= 61
        assert refused.headers.get_list("x-ratelimit-remaining-requests") == ["0"]
        assert "x-breakwater-cost-usd" not in refused.headers
        async with client_of(running, "beta") as other:  # another tenant is not held up
            assert (await other.post("/chat/completions", json=ASK)).status_code == 200
        await running.quiet()
        said = [event for event in running.events if isinstance(event, BudgetRefused)]
        assert [(event.tenant, event.window, event.mode) for event in said] == [
            ("acme", "requests_per_minute", "enforce")
        ]


async def test_what_a_provider_had_cached_is_charged_at_its_own_price() -> None:
    models = {"*": {"price": {"input": 1000, "cached_input": 100, "output": 0}}}
    asked = {**ASK, "messages": [{"role": "user", "content": "The tide turns. " * 600}]}
    async with (
        gateway({"prompt_cache": True, "models": models}, budget={"usd_per_day": 100}) as running,
        client_of(running) as client,
    ):
        answers = [await client.post("/chat/completions", json=asked) for _ in range(2)]
        dear, cheap = (float(answer.headers["x-breakwater-cost-usd"]) for answer in answers)
        usage = answers[1].json()["usage"]
        cached, tokens = usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]
        assert cached > 1024
        assert dear == pytest.approx(tokens / 1000)
        assert cheap == pytest.approx((tokens - cached) / 1000 + cached / 10_000)


async def test_the_sdk_sees_a_rate_limit_error_that_it_knows() -> None:
    limit = {"requests_per_minute": 1}
    async with (
        gateway(budget=limit) as running,
        openai.AsyncOpenAI(
            base_url=f"{running.url}/v1", api_key=KEYS["acme"], max_retries=0, http_client=clear.async_client()
        ) as sdk,
    ):
        await sdk.chat.completions.create(**ASK)
        with pytest.raises(openai.RateLimitError) as raised:
            await sdk.chat.completions.create(**ASK)
        assert raised.value.code == "budget_exceeded"


async def test_a_request_larger_than_a_window_is_400_and_never_sent() -> None:
    async with gateway(budget={"tokens_per_minute": 100, "estimate": "max"}) as running, client_of(running) as client:
        answer = await client.post("/chat/completions", json={**ASK, "max_tokens": 5000})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "request_exceeds_budget"
        assert (await spent(running))["requests_per_minute"].spent == 0
        assert (await client.post("/chat/completions", json=ASK)).status_code == 200


async def test_an_unknown_price_is_refused_only_where_dollars_are_limited() -> None:
    provider = {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "vendor": "none"}
    asked = {**ASK, "model": "x"}
    config = {"dear": provider}
    async with gateway(providers=config, **ALONE, budget={"usd_per_day": 1}) as running, client_of(running) as client:
        answer = await client.post("/chat/completions", json=asked)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_price_unknown")
        said = answer.json()["error"]["message"]
        assert said.endswith('"x": {price: {input: USD, output: USD}}')
        assert "Add this line under providers.dear.models" in said
    limit = {"tokens_per_minute": 10_000}
    async with gateway(providers=config, **ALONE, budget=limit) as running, client_of(running) as client:
        assert (await client.post("/chat/completions", json=asked)).status_code == 503  # it was sent


async def test_a_reply_says_what_it_cost_and_that_is_what_is_booked() -> None:
    async with gateway(budget={"usd_per_day": 100}) as running, client_of(running) as client:
        answer = await client.post("/chat/completions", json=ASK)
        usage = answer.json()["usage"]
        nano = usage["prompt_tokens"] * 1_000_000 + usage["completion_tokens"] * 2_000_000
        assert float(answer.headers["x-breakwater-cost-usd"]) == nano / 1_000_000_000
        await running.quiet()
        day = (await spent(running))["usd_per_day"]
        assert (day.spent, day.reserved) == (nano, 0)
        (event,) = running.outcomes()
        assert isinstance(event, RequestFinished)
        assert event.nano_usd == nano


ADMIN = "bw-admin-0123456789abcdef"


async def test_the_administration_and_the_metrics_tell_the_same_figures() -> None:
    budget = {"requests_per_minute": 1, "usd_per_day": 100}
    async with gateway(budget=budget, admin={"keys": [ADMIN]}) as running, client_of(running) as client:
        answer = await client.post("/chat/completions", json=ASK)
        assert (await client.post("/chat/completions", json=ASK)).status_code == 429
        await running.quiet()
        cost = answer.headers["x-breakwater-cost-usd"]
        async with httpx2.AsyncClient(
            base_url=running.url, headers={"authorization": f"Bearer {ADMIN}"}, verify=CLEAR
        ) as admin:
            (scope,) = (await admin.get("/admin/budgets/acme")).json()
            assert (scope["scope"], scope["name"], scope["live"]) == ("tenant", "acme", 0)
            assert scope["windows"]["usd_per_day"]["limit"] == "100"
            assert scope["windows"]["usd_per_day"]["spent"] == cost
            assert scope["windows"]["requests_per_minute"]["spent"] == 1
            names = [one["name"] for one in (await admin.get("/admin/budgets")).json()]
            assert sorted(names) == ["acme", "beta"]
            assert (await admin.get("/admin/budgets/nobody")).status_code == 404
            told = (await admin.get("/admin/usage", params={"by": "tenant,provider", "since": "1h"})).json()
            (row,) = told["rows"]
            assert (row["tenant"], row["provider"], row["requests"], row["cost_usd"]) == ("acme", "mock", 1, cost)
            assert row["output"] == answer.json()["usage"]["completion_tokens"]
            for query in ({"since": "yesterday"}, {"by": "tenant,tenant"}, {"by": "colour"}):
                assert (await admin.get("/admin/usage", params=query)).status_code == 400
            page = (await admin.get("/metrics")).text.splitlines()
        figures = dict(line.rsplit(" ", 1) for line in page if not line.startswith("#"))
        assert figures['breakwater_cost_usd_total{model="*",tenant="acme",provider="mock"}'] == str(float(cost))
        assert figures['breakwater_cost_unknown_total{model="*",tenant="acme",provider="mock"}'] == "0"
        refusals = 'breakwater_budget_refusals_total{tenant="acme",window="requests_per_minute",mode="enforce"}'
        assert figures[refusals] == "1"
        assert figures['breakwater_budget_used_ratio{tenant="acme",window="requests_per_minute"}'] == "1.0"
        assert figures['breakwater_budget_reserved{tenant="acme",unit="tokens"}'] == "0"
        assert figures["breakwater_estimate_error_ratio_count"] == "1"
        assert figures["breakwater_degraded"] == "0"


async def test_unwritten_it_refuses_nothing_and_says_what_it_would_have() -> None:
    async with gateway() as running, client_of(running) as client:
        long = {**ASK, "messages": [{"role": "user", "content": "word " * 30_000}]}
        for _ in range(3):
            answer = await client.post("/chat/completions", json=long)
            assert answer.status_code == 200
            assert "x-ratelimit-limit-tokens" not in answer.headers
        await running.quiet()
        await running.running.budget.daybook.flush()
        modes = {event.mode for event in running.events if isinstance(event, BudgetRefused)}
        assert modes == {"observe"}


async def test_false_switches_it_off_and_null_lifts_a_limit() -> None:
    tenants = [{"name": "acme", "keys": [KEYS["acme"]], "budget": {"requests_per_minute": None}}]
    async with gateway(budget={"requests_per_minute": 1}, tenants=tenants) as running, client_of(running) as client:
        assert [(await client.post("/chat/completions", json=ASK)).status_code for _ in range(3)] == [200] * 3
    tenants = [{"name": "acme", "keys": [KEYS["acme"]], "budget": False}]  # type: ignore[dict-item]
    async with gateway(budget={"requests_per_minute": 1}, tenants=tenants) as running, client_of(running) as client:
        assert [(await client.post("/chat/completions", json=ASK)).status_code for _ in range(3)] == [200] * 3
        await running.quiet()
        assert not [event for event in running.events if isinstance(event, BudgetRefused)]


async def test_requests_at_once_never_pass_the_limit() -> None:
    slow = {"first_token_ms": 200}
    async with gateway(slow, budget={"max_concurrent": 5}) as running, client_of(running) as client:
        answers = await asyncio.gather(*(client.post("/chat/completions", json=ASK) for _ in range(20)))
        codes = [answer.status_code for answer in answers]
        assert (codes.count(200), codes.count(429)) == (5, 15)
        await running.quiet()
        assert (await client.post("/chat/completions", json=ASK)).status_code == 200


async def test_all_tenants_and_an_account_have_limits_of_their_own_and_nobody_s_load_is_told() -> None:
    for sections in (
        {"global_budget": {"requests_per_minute": 1}},
        {"provider": {"limits": {"requests_per_minute": 1}}},
    ):
        async with gateway(**sections) as running, client_of(running) as client, client_of(running, "beta") as other:
            assert (await client.post("/chat/completions", json=ASK)).status_code == 200
            refused = await other.post("/chat/completions", json=ASK)
            assert refused.status_code == 429
            details = refused.json()["error"]["breakwater"]
            assert details["reset"] > 0
            assert {"window", "limit", "used", "reserved"}.isdisjoint(details)


async def test_a_client_that_hangs_up_pays_for_what_it_saw_and_blocks_nobody() -> None:
    slow = {"tokens_per_second": 20}
    async with gateway(slow, budget={"max_concurrent": 1, "tokens_per_minute": 100_000}) as running:
        async with client_of(running) as client:
            long = {**ASK, "max_tokens": 500, "stream": True}
            async with client.stream("POST", "/chat/completions", json=long) as answer:
                lines = answer.aiter_lines()
                for _ in range(8):
                    await anext(lines)
        await running.quiet()
        figures = await spent(running)
        assert figures["tokens_per_minute"].reserved == 0
        assert figures["max_concurrent"].spent == 0
        (event,) = running.outcomes()
        assert isinstance(event, RequestFinished)
        assert event.usage is not None
        assert event.usage.estimated
        assert figures["tokens_per_minute"].spent == event.usage.total < 100


async def test_a_stream_that_outgrows_a_strict_budget_is_cut_with_finish_reason_length() -> None:
    budget = {"tokens_per_minute": 125, "estimate": "max", "on_overrun": "cut"}
    async with gateway(budget=budget) as running, client_of(running) as client:
        open_ended = {"model": "gpt-4o", "messages": ASK["messages"], "stream": True}
        answer = await client.post("/chat/completions", json=open_ended)
        assert answer.status_code == 200
        assert '"finish_reason":"length"' in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")
        await running.quiet()
        assert (await spent(running))["tokens_per_minute"].spent <= 125
