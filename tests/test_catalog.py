"""Which models are listed, and what asking for them costs."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from proxy.catalog import RETRY_SECONDS, TTL_SECONDS, Catalog
from proxy.errors import NotFound, UpstreamUnavailable
from proxy.providers.openai import OpenAIProvider, Timeouts
from proxy.routing import Route, Routing
from proxy.transport.answer import NEVER, Answer, End
from proxy.transport.http1 import Http1Transport
from proxy.types import Headers, Tenant
from tests.providers.upstream import ANYONE, HEADERS, Upstream, ask, whole
from tests.receiver import Receiver
from tests.transport.servers import Peer, serve

pytestmark = pytest.mark.anyio


def listing(*ids: Any) -> Answer:
    return whole({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "them"} for name in ids]})


class Stage:
    """A catalogue over scripted providers, with a clock that the test turns."""

    def __init__(
        self, routes: list[tuple[str, str]], *, own_key: str = "", patience: float = 20.0, **ups: Upstream
    ) -> None:
        self.now = 1000.0
        self.ups = ups
        self.providers = {name: up.provider(callers_key=name == own_key) for name, up in ups.items()}
        routing = Routing([Route(name, [[target]]) for name, target in routes], self.providers)
        uncached = [own_key] if own_key else []
        self.catalog = Catalog(routing, self.providers, uncached=uncached, clock=lambda: self.now, patience=patience)

    async def get(self, path: str = "/v1/models", tenant: Tenant = ANYONE, headers: Headers = HEADERS) -> Receiver:
        client = Receiver()
        await self.catalog.answer(ask(b"", path, method="GET", headers=headers), tenant, client.answer)
        return client

    async def names(self, tenant: Tenant = ANYONE) -> list[str]:
        return [model["id"] for model in (await self.get(tenant=tenant)).json["data"]]

    def asked(self, name: str = "a") -> int:
        return len(self.ups[name].asked)


async def test_exact_names_stand_for_themselves_and_globs_for_what_the_provider_lists() -> None:
    stage = Stage(
        [("fast", "a/x-1"), ("b/*", "b/org/*"), ("*", "a/*")],
        a=Upstream(listing("x-1", "y")),
        b=Upstream(listing("org/m", "other/m")),
    )
    client = await stage.get()
    assert (client.status, client.ended) == (200, True)
    assert client.headers[b"content-type"] == b"application/json"
    assert client.json == {
        "object": "list",
        "data": [
            {"id": "fast", "object": "model", "created": 0, "owned_by": "a"},
            {"id": "b/m", "object": "model", "owned_by": "them"},
            {"id": "x-1", "object": "model", "owned_by": "them"},
            {"id": "y", "object": "model", "owned_by": "them"},
        ],
    }


async def test_a_name_that_leads_elsewhere_is_not_offered() -> None:
    stage = Stage([("gpt-*", "b/*"), ("*", "a/*")], a=Upstream(listing("gpt-5", "o9")), b=Upstream(listing("6")))
    assert await stage.names() == ["gpt-6", "o9"]


async def test_a_tenant_sees_its_own() -> None:
    stage = Stage([("n", "a/n"), ("b/*", "b/*"), ("*", "a/*")], a=Upstream(listing("x", "y")), b=Upstream(listing("z")))
    assert await stage.names(Tenant("t", models=["x", "b/*"])) == ["b/z", "x"]
    assert await stage.names(Tenant("t", providers=["b"])) == ["b/z"]
    with pytest.raises(NotFound):
        await stage.get("/v1/models/y", Tenant("t", models=["x"]))


async def test_a_provider_out_of_reach_is_no_business_of_a_tenant_that_may_not_use_it() -> None:
    stage = Stage([("b/*", "b/*"), ("*", "a/*")], a=Upstream(whole(b"", 500)), b=Upstream(listing("z")))
    client = await stage.get(tenant=Tenant("t", providers=["b"]))
    assert b"x-breakwater-warnings" not in client.headers
    assert stage.asked("a") == 0


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/models/fast", {"id": "fast", "object": "model", "created": 0, "owned_by": "a"}),
        ("/v1/models/up/org/m:1", {"id": "up/org/m:1", "object": "model", "owned_by": "them"}),
    ],
)
async def test_one_model(path: str, model: Any) -> None:
    stage = Stage([("fast", "a/x"), ("up/*", "a/*")], a=Upstream(listing("org/m:1")))
    assert (await stage.get(path)).json == model


@pytest.mark.parametrize("path", ["/v1/models/up/none", "/v1/models/none"])
async def test_one_that_is_not_there(path: str) -> None:
    stage = Stage([("up/*", "a/*")], a=Upstream(listing("m")))
    with pytest.raises(NotFound) as raised:
        await stage.get(path)
    assert raised.value.code == "model_not_found"
    assert "none" not in raised.value.message


async def test_a_list_is_kept_for_a_while() -> None:
    stage = Stage([("*", "a/*")], a=Upstream(listing("x"), listing("y")))
    assert await stage.names() == ["x"]
    stage.now += TTL_SECONDS - 1
    assert await stage.names() == ["x"]
    stage.now += 1
    assert await stage.names() == ["y"]
    assert stage.asked() == 2


async def test_many_at_once_ask_once() -> None:
    stage = Stage([("*", "a/*")], a=Upstream(listing("x")))
    assert await asyncio.gather(*[stage.names() for _ in range(20)]) == [["x"]] * 20
    assert stage.asked() == 1


async def test_who_leaves_while_it_asks_takes_nothing_from_the_others() -> None:
    stage = Stage([("*", "a/*")], a=Upstream(Answer(200, [], end=End.STALL), listing("x")))
    first = asyncio.create_task(stage.names())
    while not stage.asked():
        await asyncio.sleep(0)
    second = asyncio.create_task(stage.names())
    await asyncio.sleep(0)
    first.cancel()
    assert await second == ["x"]


async def test_no_header_of_whoever_asks_first_shapes_the_list_of_all() -> None:
    stage = Stage([("*", "a/*")], a=Upstream(listing("x")))
    await stage.get(
        headers=[*HEADERS, (b"openai-beta", b"odd"), (b"idempotency-key", b"1"), (b"authorization", b"Bearer k")]
    )
    names = {name for name, _ in stage.ups["a"].asked[0].headers}
    assert names == {b"user-agent", b"accept-encoding", b"traceparent", b"accept"}


@pytest.mark.parametrize(
    "answer",
    [
        whole(b"", 500),
        whole(b"{}", 404),
        whole(b"{}", 429),
        whole(b"[]"),
        whole(b'{"data": [{"id": "\xff"}]}'),
        whole(b'{"data": 1e999}'),
        Answer(200, [], [(0.0, b"{")], end=End.RESET),
    ],
)
async def test_a_provider_that_cannot_be_asked_costs_its_own_models_only(answer: Answer) -> None:
    stage = Stage([("b/*", "b/*"), ("exact", "a/x"), ("*", "a/*")], a=Upstream(answer), b=Upstream(listing("z")))
    client = await stage.get()
    assert [model["id"] for model in client.json["data"]] == ["b/z", "exact"]
    assert client.headers[b"x-breakwater-warnings"] == b"models of a not listed"


async def test_it_is_left_alone_for_a_moment_and_then_asked_again() -> None:
    stage = Stage([("x/*", "a/*"), ("*", "a/*")], a=Upstream(whole(b"", 500), listing("m")))
    for _ in range(3):
        with pytest.raises(UpstreamUnavailable) as raised:
            await stage.get()
    assert stage.asked() == 1
    assert (b"x-should-retry", b"false") in raised.value.headers
    assert raised.value.details == {"attempts": [{"target": "a", "reason": "upstream_unavailable"}]}
    stage.now += RETRY_SECONDS
    assert await stage.names() == ["x/m", "m"]
    assert stage.asked() == 2


async def test_a_list_that_cannot_be_had_is_the_provider_s_failure() -> None:
    for path in ("/v1/models", "/v1/models/m"):
        stage = Stage([("*", "a/*")], a=Upstream(whole(b"", 500)))
        client = Receiver()
        with pytest.raises(UpstreamUnavailable):
            await stage.catalog.answer(ask(b"", path, method="GET"), ANYONE, client.answer)
        record = client.answer.record
        assert (record.provider, record.attempts) == ("a", 1)
        assert record.upstream_started == record.upstream_ended == stage.now


async def test_a_list_that_cannot_be_renewed_is_still_good() -> None:
    stage = Stage([("*", "a/*")], a=Upstream(listing("x"), whole(b"", 500), listing("y")))
    assert await stage.names() == ["x"]
    stage.now += TTL_SECONDS
    assert await stage.names() == ["x"]
    stage.now += RETRY_SECONDS - 1
    assert await stage.names() == ["x"]
    stage.now += 1
    assert await stage.names() == ["y"]
    assert stage.asked() == 3


async def test_a_provider_that_stalls_does_not_hold_up_the_rest() -> None:
    stalls = Upstream(Answer(200, [], delay=NEVER, end=End.STALL))
    stage = Stage([("b/*", "b/*"), ("*", "a/*")], patience=0.05, a=stalls, b=Upstream(listing("z")))
    assert await asyncio.gather(*[stage.names() for _ in range(10)]) == [["b/z"]] * 10
    assert stage.asked() == 1


async def test_with_the_caller_s_own_key_everybody_asks_for_himself() -> None:
    stage = Stage([("*", "a/*")], own_key="a", a=Upstream(listing("x"), listing("y")))
    assert await stage.names() == ["x"]
    assert await stage.names() == ["y"]


@pytest.mark.parametrize("status", [401, 402, 403])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/x"])
async def test_the_refusal_of_a_caller_s_own_key_passes(status: int, path: str) -> None:
    body = orjson.dumps({"error": {"message": "Incorrect API key", "code": "invalid_api_key"}})
    stage = Stage([("*", "a/*")], own_key="a", a=Upstream(whole(body, status)))
    client = await stage.get(path)
    assert (client.status, client.body, client.ended) == (status, body, True)


@pytest.mark.parametrize("status", [401, 402, 403])
async def test_the_refusal_of_our_key_does_not(status: int) -> None:
    stage = Stage([("*", "a/*")], a=Upstream(whole(b'{"error": {}}', status)))
    with pytest.raises(UpstreamUnavailable):
        await stage.get()


async def test_a_kept_connection_that_turns_out_dead_costs_a_second_try_and_no_answer() -> None:
    body = b'{"object":"list","data":[{"id":"m"}]}'

    async def once(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await peer.request()  # and ends the connection, as one does that was idle for too long

    async with serve(once) as server:
        transport = Http1Transport(max_connections=1, connect_timeout=5)
        provider = OpenAIProvider("a", f"{server.origin_url}/v1", transport, Timeouts(20, 20, 20))
        now = 1000.0
        catalog = Catalog(
            Routing([Route("*", [["a/*"]])], ["a"]), {"a": provider}, uncached=[], clock=lambda: now, patience=20.0
        )
        for _ in range(3):
            client = Receiver()
            await catalog.answer(ask(b"", "/v1/models", method="GET", headers=HEADERS), ANYONE, client.answer)
            assert [model["id"] for model in client.json["data"]] == ["m"]
            now += TTL_SECONDS
        assert server.accepted == 3
        await provider.aclose()
