"""What replies cost that are passed through: what they say themselves, or nobody knows. Real sockets."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2
import pytest

from proxy.observability.events import RequestFinished
from tests.clear import CLEAR
from tests.e2e.account import Account
from tests.e2e.scene import END, SSE, chunk, plain
from tests.e2e.stack import Stack, stack
from tests.transport.servers import serve

pytestmark = pytest.mark.anyio

KEY = "bw-acme-0123456789abcdef"
HEADERS = {"authorization": f"Bearer {KEY}"}
IMAGE = {"model": "image-1", "prompt": "a harbor"}
CHAT_USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
USAGE = {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}
NANO = 25_000_000
"""11 tokens at 1,000 dollars a million, and 7 at 2,000."""
PATH = "/images/generations"
CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"


@contextlib.asynccontextmanager
async def scene() -> AsyncIterator[tuple[Stack, Account, httpx2.AsyncClient]]:
    account = Account("a")
    async with serve(account.script) as upstream:
        config = {
            "providers": {
                "up": {
                    "kind": "openai",
                    "base_url": f"http://127.0.0.1:{upstream.port}/v1",
                    "vendor": "none",
                    "models": {"image-*": {"price": {"input": 1000, "output": 2000}}},
                }
            },
            "tenants": [{"name": "acme", "keys": [KEY], "passthrough": ["/v1/*"]}],
            "budget": {"tokens_per_minute": 1_000_000, "usd_per_day": 10},
            "listen": {"drain_ms": 0, "grace_ms": 2000},
        }
        async with (
            stack(config) as gateway,
            httpx2.AsyncClient(base_url=f"{gateway.url}/v1", headers=HEADERS, timeout=20, verify=CLEAR) as client,
        ):
            yield gateway, account, client


async def booked(gateway: Stack) -> tuple[int, int, int]:
    """Requests, tokens and nano-dollars of the tenant, once nothing is in flight."""
    await gateway.quiet()
    (one,) = [each for each in await gateway.running.budget.report() if (each.kind, each.name) == ("tenant", "acme")]
    spent = {window.window: window.spent for window in one.windows}
    return spent["requests_per_minute"], spent["tokens_per_minute"], spent["usd_per_day"]


async def unknown(gateway: Stack) -> float:
    """Requests whose cost nobody knows, as a scrape sees them."""
    async with httpx2.AsyncClient(base_url=gateway.url, timeout=20, verify=CLEAR) as client:
        page = (await client.get("/metrics")).text
    lines = [line for line in page.splitlines() if line.startswith("breakwater_cost_unknown_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.mark.parametrize("usage", [USAGE, CHAT_USAGE], ids=["responses", "chat"])
@pytest.mark.parametrize("form", ["whole", "pieces", "chunked"])
async def test_its_usage_is_read_and_priced(usage: Mapping[str, int], form: str) -> None:
    body = json.dumps({"created": 1, "data": [{"b64_json": "x" * 100_000}], "usage": usage}).encode()
    halves = body[:50_000], body[50_000:]
    async with scene() as (gateway, account, client):
        account.answers[PATH] = {
            "whole": (plain(body),),
            "pieces": (plain(body)[:-60_000], plain(body)[-60_000:]),
            "chunked": (CHUNKED, *map(chunk, halves), END),
        }[form]
        answer = await client.post(PATH, json=IMAGE)
        assert answer.content == body
        assert await booked(gateway) == (1, 18, NANO)
        assert await unknown(gateway) == 0
        again = await client.post(PATH, json=IMAGE)  # on the same connection
        assert again.content == body
        assert await booked(gateway) == (2, 36, 2 * NANO)


async def test_it_says_what_it_cost_where_that_is_known_in_time() -> None:
    async with scene() as (_, account, client):
        account.answers[PATH] = (plain(json.dumps({"usage": USAGE}).encode()),)
        answer = await client.post(PATH, json=IMAGE)
        assert answer.headers["x-breakwater-cost-usd"] == "0.025"
        assert answer.headers["x-breakwater-usage-total"] == "18"


@pytest.mark.parametrize(
    ("ask", "answer", "tokens"),
    [
        (IMAGE, plain(b'{"data":[]}'), 0),
        (IMAGE, plain(b'{"usage":null}'), 0),
        (IMAGE, plain(b'{"usage":{"type":"duration","seconds":9}}'), 0),
        (IMAGE, plain(b'{"data":[{"usage":{"input_tokens":5,"output_tokens":5}}]}'), 0),
        (IMAGE, plain(b'{"usage":{"input_tokens":5,"output_tokens":5}'), 0),
        (IMAGE, plain(b"[" * 100_000), 0),
        (IMAGE, plain(b'\xff{"usage":{"input_tokens":5,"output_tokens":5}}'), 0),
        (IMAGE, plain(b'{"usage":{"input_tokens":5,"output_tokens":5}}', kind=b"text/plain"), 0),
        (IMAGE, plain(b'{"x":"' + b"x" * 17_000_000 + b'","usage":{"input_tokens":5,"output_tokens":5}}'), 0),
        # Tokens, but at no price: nobody knows the model, or its price.
        ({"prompt": "x"}, plain(b'{"usage":{"input_tokens":5,"output_tokens":5}}'), 10),
        ({"model": "other"}, plain(b'{"usage":{"input_tokens":5,"output_tokens":5}}'), 10),
    ],
    ids=["none", "null", "seconds", "inside", "cut", "deep", "no-utf8", "text", "large", "no-model", "no-price"],
)
async def test_what_it_does_not_say_nobody_knows(ask: Any, answer: bytes, tokens: int) -> None:
    async with scene() as (gateway, account, client):
        account.answers[PATH] = (answer,)
        got = await client.post(PATH, json=ask)
        assert got.status_code == 200
        assert got.content == answer.partition(b"\r\n\r\n")[2]
        assert await booked(gateway) == (1, tokens, 0)
        assert await unknown(gateway) == 1
        (event,) = gateway.outcomes()
        assert isinstance(event, RequestFinished)
        assert event.nano_usd is None


async def test_the_last_event_of_a_passed_stream_may_say_it() -> None:
    events = [b'{"type":"speech.audio.delta","audio":"AAAA"}', json.dumps({"type": "done", "usage": USAGE}).encode()]
    blocks = [b"data: " + event + b"\n\n" for event in events]
    async with scene() as (gateway, account, client):
        account.answers["/audio/speech"] = (SSE, *map(chunk, blocks), END)
        answer = await client.post("/audio/speech", json={"model": "image-voice", "input": "x"})
        assert answer.content == b"".join(blocks)
        assert await booked(gateway) == (1, 18, NANO)


async def test_reading_is_not_paying_for_it_again() -> None:
    async with scene() as (gateway, account, client):
        account.answers["/batches/b"] = (plain(json.dumps({"id": "b", "model": "image-1", "usage": USAGE}).encode()),)
        await client.get("/batches/b")
        assert await booked(gateway) == (1, 0, 0)


async def test_a_refusal_costs_nothing() -> None:
    async with scene() as (gateway, account, client):
        account.answers[PATH] = (plain(json.dumps({"error": {}, "usage": USAGE}).encode(), 400),)
        assert (await client.post(PATH, json=IMAGE)).status_code == 400
        assert await booked(gateway) == (1, 0, 0)
        assert await unknown(gateway) == 0


async def test_a_list_of_models_that_cannot_be_had_was_tried() -> None:
    async with scene() as (gateway, account, client):
        account.answers["/models"] = (plain(b"{}", 500),)
        answer = await client.get("/models")
        assert (answer.status_code, answer.headers["x-breakwater-attempts"]) == (503, "1")
        await gateway.quiet()
        (event,) = gateway.outcomes()
        assert isinstance(event, RequestFinished)
        assert (event.status, event.provider, event.attempts) == (503, "up", 1)
        assert event.error_code == "upstream_unavailable"
