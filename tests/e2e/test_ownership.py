"""Stored objects belong to the tenant that made them, and are asked for where they live. Real sockets, a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from proxy.observability.events import OwnershipLost, RequestFinished
from tests import clear
from tests.conformance.stores import namespace
from tests.e2e.account import Account
from tests.e2e.scene import until
from tests.e2e.stack import ServeProcess, Stack, serving, stack
from tests.e2e.upstreams import scripted
from tests.redis_server import RedisServer, redis_binary, redis_server, running
from tests.transport.servers import serve

__all__ = ["redis_binary", "redis_server"]  # fixtures, found here by pytest

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

KEYS = {name: f"bw-{name}-0123456789abcdef" for name in ("acme", "beta")}
ASK: dict[str, Any] = {"model": "gpt-5", "input": "Hello"}
PRICE = {"input": 1000, "output": 2000}


def config(ports: dict[str, int], **sections: Any) -> dict[str, Any]:
    """Tenants acme and beta before providers of these names; the first one serves every model."""
    return {
        "providers": {
            name: {
                "kind": "openai",
                "base_url": f"http://127.0.0.1:{port}/v1",
                "vendor": "none",
                "models": {"*": {"price": PRICE}},
            }
            for name, port in ports.items()
        },
        "tenants": [
            {"name": name, "keys": [key], "passthrough": ["/v1/conversations*", "/v1/images/*", "/v1/moderations"]}
            for name, key in KEYS.items()
        ],
        "listen": {"drain_ms": 0, "grace_ms": 2000},
        **sections,
    }


@pytest.fixture(params=["memory", "redis"])
def state(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "memory":
        return {}
    return shared(request.getfixturevalue("redis_server"))


def shared(server: RedisServer) -> dict[str, Any]:
    """A namespace of its own. A busy machine must not look like a fault: the short timeout has tests of its own."""
    return {"state": server.url, "state_namespace": namespace(), "state_timeout_ms": 10_000}


@contextlib.asynccontextmanager
async def accounts(*names: str) -> AsyncIterator[tuple[dict[str, int], list[Account]]]:
    async with contextlib.AsyncExitStack() as stacked:
        made = [Account(name) for name in names]
        ports = {one.name: (await stacked.enter_async_context(serve(one.script))).port for one in made}
        yield ports, made


def sdk(running: Stack, tenant: str = "acme") -> openai.AsyncOpenAI:
    key = KEYS.get(tenant, "any")
    return openai.AsyncOpenAI(
        base_url=f"{running.url}/v1", api_key=key, max_retries=0, timeout=20, http_client=clear.async_client()
    )


def both(running: Stack) -> tuple[openai.AsyncOpenAI, openai.AsyncOpenAI]:
    return sdk(running), sdk(running, "beta")


async def refusal(asked: Any) -> tuple[Any, ...]:
    """All that a 404 of ours tells."""
    with pytest.raises(openai.NotFoundError) as raised:
        await asked
    error = raised.value
    assert error.code == "unsupported_route"
    kept = {name for name in error.response.headers if name not in ("x-request-id", "traceparent", "date")}
    return error.body, kept


async def reaching(client: openai.AsyncOpenAI, object_id: str) -> list[tuple[Any, ...]]:
    """What a client is told of an object, on all ways that lead to it. Not one of them may lead there."""
    responses = client.responses
    asked = [
        responses.retrieve(object_id),
        responses.delete(object_id),
        responses.cancel(object_id),
        responses.input_items.list(object_id),
        responses.create(**ASK, previous_response_id=object_id),
        responses.create(**ASK, conversation=object_id),
        responses.create(**ASK, conversation={"id": object_id}),
        responses.create(**ASK, stream=True, previous_response_id=object_id),
        responses.input_tokens.count(**ASK, previous_response_id=object_id),
        responses.input_tokens.count(**ASK, conversation=object_id),
        responses.compact(model="gpt-5", previous_response_id=object_id),
        client.conversations.retrieve(object_id),
        client.conversations.delete(object_id),
        client.conversations.items.list(object_id),
        client.conversations.items.create(object_id, items=[]),
    ]
    return [await refusal(_first(one)) for one in asked]


async def _first(asked: Any) -> Any:
    return await asked


async def _last(events: Any) -> Any:
    return [event async for event in events][-1]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_its_maker_s_alone(state: dict[str, Any], stream: bool) -> None:
    async with accounts("a") as (ports, (account,)), stack(config(ports, **state)) as gateway:
        acme, beta = both(gateway)
        async with acme, beta:
            made = await acme.responses.create(**ASK, stream=stream)
            made_id = (await _last(made)).response.id if stream else made.id
            asked = len(account.asked)
            told = await reaching(beta, made_id)
            assert told == await reaching(beta, "resp_never_was")  # no oracle
            assert len(account.asked) == asked  # and nothing of it reached the provider

            assert (await acme.responses.retrieve(made_id)).output_text == "Hello from a"
            await acme.responses.input_items.list(made_id)
            await acme.responses.cancel(made_id)
            after = await acme.responses.create(**ASK, previous_response_id=made_id)
            assert after.previous_response_id == made_id
            assert (await acme.responses.retrieve(after.id)).id == after.id
            await acme.responses.delete(made_id)
            assert account.last[:2] == ("DELETE", f"/responses/{made_id}")
            with pytest.raises(openai.NotFoundError, match="Not found here"):  # the provider's own word
                await acme.responses.retrieve(made_id)
            await refusal(beta.responses.retrieve(made_id))


async def test_a_conversation_is_its_maker_s_alone(state: dict[str, Any]) -> None:
    async with accounts("a") as (ports, _), stack(config(ports, **state)) as gateway:
        acme, beta = both(gateway)
        async with acme, beta:
            made = await acme.conversations.create()
            told = await reaching(beta, made.id)
            assert told == await reaching(beta, "conv_never_was")
            assert (await acme.conversations.retrieve(made.id)).id == made.id
            for conversation in (made.id, {"id": made.id}):
                answer = await acme.responses.create(**ASK, conversation=conversation)
                assert (await acme.responses.retrieve(answer.id)).id == answer.id


async def test_what_is_not_kept_is_nobody_s(state: dict[str, Any]) -> None:
    async with accounts("a") as (ports, _), stack(config(ports, **state)) as gateway, sdk(gateway) as acme:
        made = await acme.responses.create(**ASK, store=False)
        await refusal(acme.responses.retrieve(made.id))


async def test_counting_and_compacting_are_routes_like_others(state: dict[str, Any]) -> None:
    models = [{"name": "ours", "targets": ["b/theirs"]}, {"name": "*", "targets": ["a/*"]}]
    async with accounts("a", "b") as (ports, (one, other)), stack(config(ports, models=models, **state)) as gateway:
        acme, _ = both(gateway)
        async with acme:
            counted = await acme.responses.input_tokens.count(model="ours", input="Hello")
            assert counted.input_tokens == 11
            assert other.last == ("POST", "/responses/input_tokens", {"model": "theirs", "input": "Hello"})
            await acme.responses.input_tokens.count(input="Hello")
            assert one.last == ("POST", "/responses/input_tokens", {"input": "Hello"})
            compacted = await acme.responses.with_raw_response.compact(model="ours", input="Hello")
            assert other.last == ("POST", "/responses/compact", {"model": "theirs", "input": "Hello"})
            assert compacted.headers["x-breakwater-cost-usd"] == "0.025"  # 11 x 1000 and 7 x 2000 dollars a million
            await gateway.quiet()
            costs = [
                (event.route, event.nano_usd) for event in gateway.outcomes() if isinstance(event, RequestFinished)
            ]
            assert costs == [
                ("/v1/responses/input_tokens", 0),
                ("/v1/responses/input_tokens", 0),
                ("/v1/responses/compact", 25_000_000),
            ]


async def test_a_compaction_is_told_no_maximum() -> None:
    budget = {"tokens_per_minute": 20_000, "estimate": "max", "on_overrun": "cut"}
    async with (
        accounts("a") as (ports, (account,)),
        stack(config(ports, budget=budget)) as gateway,
        sdk(gateway) as acme,
    ):
        await acme.responses.create(**ASK)
        assert account.last[2]["max_output_tokens"] > 0
        await acme.responses.compact(**ASK)
        assert account.last[2] == ASK


async def test_reading_what_was_paid_for_costs_nothing() -> None:
    budget = {"tokens_per_minute": 20_000, "usd_per_day": 10}
    async with accounts("a") as (ports, _), stack(config(ports, budget=budget)) as gateway, sdk(gateway) as acme:
        made = await acme.responses.with_raw_response.create(**ASK)
        assert made.headers["x-breakwater-cost-usd"] == "0.025"
        read = await acme.responses.with_raw_response.retrieve(made.parse().id)
        assert read.parse().usage is not None
        assert read.headers["x-breakwater-cost-usd"] == "0"
        await gateway.quiet()
        (acme_s,) = [one for one in await gateway.running.budget.report() if (one.kind, one.name) == ("tenant", "acme")]
        spent = {window.window: window.spent for window in acme_s.windows}
        assert (spent["tokens_per_minute"], spent["usd_per_day"]) == (18, 25_000_000)
        assert (spent["requests_per_minute"]) == 2


async def test_an_object_is_asked_for_where_it_lives(redis_server: RedisServer) -> None:
    state = shared(redis_server)
    before = [{"name": "*", "targets": ["a/*"]}]
    after = [{"name": "gpt-5", "targets": ["b/gpt-5"]}, {"name": "both", "targets": ["b/x"]}]
    async with accounts("a", "b") as (ports, (one, other)):
        async with stack(config(ports, models=before, **state)) as gateway, sdk(gateway) as acme:
            made = await acme.responses.create(**ASK)
        turned = dict(reversed(ports.items()))  # the first provider is another one now, too
        async with stack(config(turned, models=after, **state)) as gateway, sdk(gateway) as acme:
            assert (await acme.responses.retrieve(made.id)).output_text == "Hello from a"
            new = await acme.responses.create(**ASK)
            assert new.output_text == "Hello from b"
            follow_up = await acme.responses.create(**ASK, previous_response_id=made.id)
            assert (follow_up.output_text, follow_up.model) == ("Hello from a", "gpt-5")
            with pytest.raises(openai.BadRequestError) as raised:  # not silently by another model
                await acme.responses.create(model="both", input="x", previous_response_id=made.id)
            assert raised.value.param == "model"
            with pytest.raises(openai.BadRequestError, match="different providers"):
                await acme.responses.create(**ASK, previous_response_id=made.id, conversation=new.id)
            assert [path for _, path, _ in other.asked] == ["/responses"]
        gone = config({"b": ports["b"]}, **state)
        async with stack(gone) as gateway, sdk(gateway) as acme:
            await refusal(acme.responses.retrieve(made.id))
        assert all(method != "DELETE" for method, _, _ in one.asked)


async def test_without_tenants_all_passes_and_goes_where_it_lives() -> None:
    async with accounts("a", "b") as (ports, (one, other)):
        models = [{"name": "ours", "targets": ["b/x"]}, {"name": "*", "targets": ["a/*"]}]
        settings = config(ports, models=models)
        del settings["tenants"]
        async with stack(settings) as gateway, sdk(gateway, "nobody") as client:
            made = await client.responses.create(model="ours", input="x")
            assert (await client.responses.retrieve(made.id)).output_text == "Hello from b"
            with pytest.raises(openai.NotFoundError, match="Not found here"):
                await client.responses.retrieve("resp_unknown")
            assert one.last[:2] == ("GET", "/responses/resp_unknown")
            await client.responses.create(model="any", input="x", previous_response_id="resp_unknown")
            assert one.last[2]["previous_response_id"] == "resp_unknown"
            assert len(other.asked) == 2


# --- replicas -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replicas(server: RedisServer) -> Iterator[tuple[list[ServeProcess], Account]]:
    account = Account("a")
    with scripted(account.script) as upstream, contextlib.ExitStack() as stacked:
        settings = config({"a": upstream.port}, **shared(server))
        yield [stacked.enter_context(serving(settings)) for _ in range(2)], account


def test_two_processes_know_the_same_owners(redis_server: RedisServer) -> None:
    with replicas(redis_server) as ((first, second), _), contextlib.ExitStack() as stacked:

        def client(process: ServeProcess, tenant: str) -> openai.OpenAI:
            return stacked.enter_context(
                openai.OpenAI(
                    base_url=f"{process.url}/v1",
                    api_key=KEYS[tenant],
                    max_retries=0,
                    timeout=20,
                    http_client=clear.client(),
                )
            )

        acme, elsewhere = client(first, "acme"), client(second, "acme")
        for number in range(20):
            made = acme.responses.create(**ASK)
            assert elsewhere.responses.retrieve(made.id).id == made.id  # at once
            with acme.responses.create(**ASK, stream=True) as events:
                for event in events:
                    if event.type == "response.completed":  # with the last event in hand, the rest still to come
                        after = elsewhere.responses.create(**ASK, previous_response_id=event.response.id)
            assert after.previous_response_id is not None
            with pytest.raises(openai.NotFoundError):
                client(second, "beta").responses.retrieve(made.id)
            if number == 10:
                elsewhere.responses.delete(made.id)


# --- a store that is away -------------------------------------------------------------------------------------------


@pytest.fixture
def own_redis(redis_binary: Any, tmp_path: Any) -> Iterator[RedisServer]:
    with running(tmp_path) as server:
        yield server


async def test_while_the_store_hangs_streams_flow_and_strangers_wait(own_redis: RedisServer) -> None:
    state = {"state": own_redis.url}
    async with accounts("a") as (ports, (account,)):
        account.pause = asyncio.Event()
        async with (
            stack(config(ports, **state)) as gateway,
            stack(config(ports, **state)) as replica,
            sdk(gateway) as acme,
            sdk(gateway, "beta") as beta,
            sdk(replica) as elsewhere,
        ):
            before = await acme.responses.create(**ASK)
            await elsewhere.responses.retrieve(before.id)
            own_redis.signal(signal.SIGSTOP)
            try:
                stream = await acme.responses.create(**ASK, stream=True)
                made = (await anext(stream)).response  # no event waits for the store
                assert (await anext(stream)).type == "response.output_text.delta"
                account.pause.set()
                assert (await anext(stream)).type == "response.completed"
                assert (await acme.responses.retrieve(made.id)).id == made.id  # this process knows it itself
                assert (await elsewhere.responses.retrieve(before.id)).id == before.id  # it was told once
                for asked in (elsewhere.responses.retrieve(made.id), beta.responses.retrieve(made.id)):
                    with pytest.raises(openai.InternalServerError) as raised:
                        await asked
                    assert (raised.value.status_code, raised.value.code) == (503, "store_unavailable")
                    assert raised.value.response.headers["retry-after"] == "1"
            finally:
                own_redis.signal(signal.SIGCONT)
            await until(lambda: not gateway.running._owners._waiting, "the claim to be stored")
            async with asyncio.timeout(20):
                while True:
                    with contextlib.suppress(openai.InternalServerError):  # its circuit is open for a moment yet
                        assert (await elsewhere.responses.retrieve(made.id)).id == made.id
                        break
                    await asyncio.sleep(0.05)
            await refusal(beta.responses.retrieve(made.id))
            assert not any(isinstance(event, OwnershipLost) for event in gateway.events)


async def test_a_claim_that_was_never_stored_is_told(own_redis: RedisServer) -> None:
    async with accounts("a") as (ports, _):
        async with stack(config(ports, state=own_redis.url)) as gateway, sdk(gateway) as acme:
            own_redis.stop()
            await acme.responses.create(**ASK)
        assert [event.objects for event in gateway.events if isinstance(event, OwnershipLost)] == [1]
