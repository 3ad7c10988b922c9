"""Maxima that no request can mean: 400 in the envelope over the wire, and nothing is reserved, sent or booked."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from proxy.observability.events import RequestRefused
from tests.clear import CLEAR
from tests.e2e.stack import stack

pytestmark = pytest.mark.anyio

KEY = "bw-acme-0123456789abcdef"
CONFIG: dict[str, Any] = {
    "providers": {"mock": {"kind": "mock", "limits": {"tokens_per_minute": 10_000}}},
    "tenants": [{"name": "acme", "keys": [KEY]}],
    "global_budget": {"requests_per_minute": 10_000},
    "budget": {"tokens_per_minute": 10_000, "requests_per_minute": 100, "usd_per_minute": 100, "max_concurrent": 5},
    "listen": {"drain_ms": 0, "grace_ms": 1000},
}
WRONG = ("-1", "0", "2147483648", "9223372036854775808", "18446744073709551616", "true", "false", '"10"', "1e30", "1.5",
         "10.0", "-0", "NaN", "Infinity", "1e999", "[10]", '{"a":1}', '""', "9" * 400)  # fmt: skip
ROUTES = {
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "hi"}]},
        ("max_tokens", "max_completion_tokens"),
    ),
    "/v1/completions": ({"prompt": "hi"}, ("max_tokens",)),
    "/v1/responses": ({"input": "hi", "store": False}, ("max_output_tokens",)),
}


async def test_a_maximum_that_cannot_be_is_400_and_reserves_nothing() -> None:
    async with (
        stack(CONFIG) as running,
        httpx2.AsyncClient(
            base_url=running.url, headers={"authorization": f"Bearer {KEY}"}, timeout=20, verify=CLEAR
        ) as client,
    ):
        sent = 0
        for route, (body, members) in ROUTES.items():
            for member in members:
                for written in WRONG:
                    for stream in ("", ',"stream":true'):
                        text = json.dumps({"model": "gpt-4o", **body})[:-1] + f',"{member}":{written}{stream}}}'
                        answer = await client.post(route, content=text, headers={"content-type": "application/json"})
                        error = answer.json()["error"]
                        assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), text[-60:]
                        assert error["code"] in ("invalid_request", "invalid_json")
                        sent += 1
        await running.quiet()
        assert [type(event) for event in running.outcomes()] == [RequestRefused] * sent
        for scope in await running.running.budget.report():
            assert {
                (one.window, one.spent, one.reserved) for one in scope.windows if one.spent or one.reserved
            } == set()
            assert scope.live == 0
        assert await running.running.budget.access.store.usage(0, 2**50, ["tenant"]) == []
        good = {"model": "gpt-4o", **ROUTES["/v1/chat/completions"][0], "max_tokens": 2147483647}
        answer = await client.post("/v1/chat/completions", json=good)
        assert answer.status_code == 200
