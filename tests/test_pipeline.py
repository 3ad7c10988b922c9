"""The way of one request, over real parts: what is recorded of it, and what it leaves behind on each way out."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from proxy.budget.plan import want_of
from proxy.catalog import Catalog
from proxy.context.settings import ContextSettings
from proxy.context.view import Context
from proxy.edge.auth import KeyedTenants, Keyless
from proxy.errors import (
    InvalidKey,
    InvalidRequest,
    NotFound,
    StreamInterrupted,
    UpstreamBroken,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.owners import Owners
from proxy.pipeline import Pipeline
from proxy.providers.openai import Timeouts
from proxy.routing import Route, Routing
from proxy.store.ownership_memory import MemoryOwnership
from proxy.tokens.count import Counter
from proxy.transport.answer import NEVER, Answer, End, Outcome
from proxy.types import Ask, Call, Event, Record, Target, Tenant, Usage
from tests.budget.scene import RATES, Scene
from tests.fault_tolerance.scene import failover_of
from tests.providers.upstream import HEADERS, MESSAGES, Upstream, body_of, call, chat, events, whole
from tests.receiver import Receiver

pytestmark = pytest.mark.anyio

REPLY = {"choices": [{"message": {"content": "Hi"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
CHUNK = b'{"choices":[{"index":0,"delta":{"content":"Hi"}}]}'
USAGE = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
TARGET = Target("up", "m-1", "alias")
ROUTES = [Route("alias", [["up/m-1"]]), Route("gpt-*", [["up/gpt-*"]])]


def pipeline(upstream: Upstream, **more: Any) -> Pipeline:
    providers = {"up": upstream.provider(**more)}
    routing = Routing(ROUTES, providers)
    clock = asyncio.get_running_loop().time
    catalog = Catalog(routing, providers, uncached=[], clock=clock)
    budget = Scene(rates={"up": RATES}).budget
    owners = Owners(MemoryOwnership(), strict=False, providers=providers, emit=lambda notice: None)
    failover = failover_of(providers, max_attempts=1)
    context = Context(
        Counter(),
        ContextSettings(),
        window=lambda target: None,
        tokens_per_minute=lambda tenant, key: None,
        emit=lambda notice: None,
        clock=clock,
    )
    return Pipeline(
        Keyless(), routing, failover, catalog, context, budget, owners, tenants_configured=False, clock=clock
    )


async def handled(one: Pipeline, sent: Call, client: Receiver) -> None:
    """Serves `sent`, whose body comes when it is asked for."""

    async def read() -> bytes:
        client.was_read = True
        return sent.body

    await one.handle(replace(sent, body=b""), read, client.answer)


def ask_for(model: str = "alias", **more: Any) -> Call:
    return call({"model": model, "messages": MESSAGES, **more})


async def books(client: Receiver) -> Record:
    """The record, once all that was left for afterwards is done."""
    for job in client.answer.left_to_do:
        await job()
    return client.answer.record


# --- the whole ------------------------------------------------------------------------------------------------------


async def test_a_plain_reply() -> None:
    upstream, client = Upstream(whole(REPLY)), Receiver()
    await handled(pipeline(upstream), ask_for(), client)
    assert (client.status, client.ended, client.json) == (200, True, REPLY)
    assert client.headers[b"x-breakwater-provider"] == b"up"
    assert client.headers[b"x-breakwater-model"] == b"m-1"
    assert client.headers[b"x-breakwater-usage-total"] == b"5"
    record = await books(client)
    assert (record.route, record.tenant, record.model) == ("/v1/chat/completions", "default", "alias")
    assert (record.provider, record.upstream_model, record.upstream_request_id) == ("up", "m-1", "their-id")
    assert (record.attempts, record.upstream_status, record.stream) == (1, 200, False)
    assert record.usage == Usage(3, 2)
    assert 0 < record.upstream_started <= record.first_event <= record.upstream_ended


async def test_a_stream() -> None:
    upstream, client = Upstream(events(CHUNK, USAGE)), Receiver()
    await handled(pipeline(upstream), ask_for("gpt-5", stream=True), client)
    assert (client.status, client.ended) == (200, True)
    assert client.body == b"data: %b\n\ndata: [DONE]\n\n" % CHUNK
    record = await books(client)
    assert (record.model, record.upstream_model, record.stream) == ("gpt-*", "gpt-5", True)
    assert record.usage == Usage(3, 2)
    assert upstream.ended == [Outcome.FINISHED]
    client.answer.close()


@pytest.mark.parametrize(
    ("sent", "error", "model"),
    [
        (call(b"{"), InvalidRequest, "other"),
        (call(ask_for("nowhere").body), NotFound, "other"),
        (call(ask_for().body, "/v1/none", headers=HEADERS), None, "other"),
    ],
    ids=["body", "model", "pass-through"],
)
async def test_what_is_refused_reaches_no_provider(sent: Call, error: type[Exception] | None, model: str) -> None:
    upstream, client = Upstream(whole(REPLY)), Receiver()
    if error is None:
        await handled(pipeline(upstream), sent, client)
        assert client.answer.record.route == "passthrough"
    else:
        with pytest.raises(error):
            await handled(pipeline(upstream), sent, client)
        assert upstream.asked == []
        assert client.answer.record.attempts == 0
    assert client.answer.record.model == model


async def test_a_wrong_key_is_refused_before_the_body_is_read() -> None:
    client = Receiver()
    refusing = pipeline(Upstream(whole(REPLY)))
    refusing.tenants = KeyedTenants({"bw-key-0123456789": Tenant("t")})
    with pytest.raises(InvalidKey):
        await handled(refusing, call(b"no JSON"), client)
    assert client.answer.record.tenant == "other"
    assert not client.was_read


@pytest.mark.parametrize("status", [204, 304])
async def test_a_pass_through_without_a_body_declares_none(status: int) -> None:
    client = Receiver()
    upstream = Upstream(Answer(status, [(b"etag", b"e")], length=0))
    await handled(pipeline(upstream), call(b"", "/v1/files/f", method="GET"), client)
    await client.answer.end()
    assert (client.status, client.body, client.ended) == (status, b"", True)
    assert b"content-length" not in client.headers


# --- one attempt ----------------------------------------------------------------------------------------------------


async def attempted(upstream: Upstream, ask: Ask, record: Record, **more: Any) -> None:
    failover = failover_of({"up": upstream.provider(**more)}, max_attempts=1)
    hold = Scene(rates={"up": RATES}).budget.hold("default", "", want_of(ask), [TARGET], record)
    async with hold as charge, failover.open(ask, [TARGET], charge, record, failover.bounds(ask.call)) as reply:
        await body_of(reply)


NOBODY = Answer(200, [], delay=NEVER, end=End.RESET)


@pytest.mark.parametrize(
    ("answer", "error", "status", "reason"),
    [
        (whole(b"{}", 500), UpstreamUnavailable, 500, "server_error"),
        (whole(b"{}", 401), UpstreamUnavailable, 401, "credential"),
        (whole(b"{}", 429), UpstreamRateLimited, 429, "rate_limited"),
        (NOBODY, UpstreamBroken, None, "reset"),
        (Answer(200, [], delay=NEVER, end=End.STALL), UpstreamTimeout, None, "upstream_timeout"),
        (whole(b"<html>"), UpstreamBroken, None, "protocol"),
    ],
)
async def test_an_attempt_that_failed_says_where_and_why(
    answer: Answer, error: type[UpstreamError], status: int | None, reason: str
) -> None:
    record = Record()
    with pytest.raises(error) as raised:
        await attempted(Upstream(answer), chat(), record, timeouts=Timeouts(0.05, 0.05, 0.05))
    (attempt,) = raised.value.details.pop("attempts")
    assert raised.value.details == {}
    assert attempt.pop("ms") >= 0
    assert attempt == {"target": "up/m-1", "status": status, "reason": reason}
    assert ((b"x-should-retry", b"false") in raised.value.headers) == (error is not UpstreamRateLimited)
    assert (record.attempts, record.upstream_status) == (1, status or 0)
    assert record.upstream_request_id == ("their-id" if status else "")
    assert 0 < record.upstream_started <= record.upstream_ended


async def test_so_does_one_that_fails_between_its_head_and_its_body() -> None:
    passing = Answer(200, [(b"content-type", b"x/y")], end=End.RESET)
    client, upstream = Receiver(), Upstream(passing)
    with pytest.raises(UpstreamBroken) as raised:
        await handled(pipeline(upstream), call(b"", "/v1/files/f", method="GET"), client)
    assert raised.value.details["attempts"][0]["target"] == "up"
    assert (b"x-should-retry", b"false") in raised.value.headers
    assert client.status == 0


async def test_once_something_was_forwarded_the_error_is_the_stream_s_own() -> None:
    client = Receiver()
    upstream = Upstream(
        Answer(200, [(b"content-type", b"text/event-stream")], [(0.0, b"data: %b\n\n" % CHUNK)], end=End.CLOSE)
    )
    with pytest.raises(StreamInterrupted) as raised:
        await handled(pipeline(upstream), ask_for(stream=True), client)
    assert (raised.value.details, raised.value.headers) == ({}, [])
    client.answer.close()


class Exploding(Upstream):
    """A provider whose code is wrong."""

    def handle(self, *args: Any) -> Any:
        raise RuntimeError("a fault of ours")


async def test_a_fault_of_ours_is_no_fault_of_the_provider_s() -> None:
    record = Record()
    with pytest.raises(RuntimeError):
        await attempted(Exploding(whole(REPLY)), chat(), record)
    assert record.upstream_status == 0
    assert record.upstream_ended >= record.upstream_started > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancelled_attempt_closes_what_it_opened(stream: bool) -> None:
    waiting = Answer(200, [(b"content-type", b"text/event-stream")], [(0.0, b"data: %b\n\n" % CHUNK)], end=End.STALL)
    upstream, client = Upstream(waiting), Receiver()
    task = asyncio.create_task(handled(pipeline(upstream), ask_for(stream=stream), client))
    while not (client.body if stream else upstream.asked):
        await asyncio.sleep(0)
    task.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert upstream.ended == [Outcome.GONE]
    record = await books(client)
    if stream:  # what was forwarded was paid for
        assert record.usage is not None
        assert (record.usage.output, record.usage.estimated) == (1, True)
    else:  # the provider was at work on the prompt
        assert record.usage is not None
        assert (record.usage.output, record.usage.estimated) == (0, True)
    client.answer.close()


# --- what it costs --------------------------------------------------------------------------------------------------


async def metered(
    *seen: Event, ask: Ask | None = None, status: int = 200, fault: BaseException | None = None
) -> Record:
    client = Receiver()
    hold = Scene(rates={"up": RATES}).budget.hold(
        "default",
        "",
        want_of(ask or chat()),
        [TARGET],
        client.answer.record,
        afterwards=client.answer.afterwards,
    )
    try:
        async with hold as charge:
            await charge.cover(TARGET)
            charge.answered(status)
            for event in seen:
                charge.see(event)
            if fault is not None:
                raise fault
    except BaseException as raised:
        assert raised is fault  # noqa: PT017 - and nothing else
    return await books(client)


TEXT = Event(b"data: %b\n\n" % CHUNK)


async def test_what_the_provider_says_counts_the_last_time_it_says_it() -> None:
    record = await metered(Event(TEXT.data, Usage(1, 1)), Event(TEXT.data, Usage(1, 2)), TEXT)
    assert record.usage == Usage(1, 2)


async def test_nothing_used_is_not_the_same_as_nothing_said() -> None:
    assert (await metered(Event(TEXT.data, Usage(0, 0)))).usage == Usage(0, 0)
    said_nothing = (await metered(TEXT, TEXT)).usage
    assert said_nothing is not None
    assert (said_nothing.output, said_nothing.estimated) == (2, True)
    assert said_nothing.input > 1


@pytest.mark.parametrize("fault", [asyncio.CancelledError(), UpstreamBroken("x", reason="reset"), RuntimeError()])
async def test_what_was_forwarded_is_counted_on_every_way_out(fault: BaseException) -> None:
    usage = (await metered(TEXT, fault=fault)).usage
    assert usage is not None
    assert (usage.output, usage.estimated) == (1, True)


async def test_nothing_is_counted_where_nothing_was_served() -> None:
    assert (await metered(status=500)).usage is None
    assert (await metered(Event(b'{"error":{}}'), status=400)).usage is None
    passing = Ask("passthrough", "passthrough", call(b"", "/v1/files", method="GET"))
    assert (await metered(Event(b"bytes"), ask=passing)).usage is None
