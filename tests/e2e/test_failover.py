"""Several targets over real sockets: what a client sees when one of them fails, and what each of them was asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest

from proxy.observability.events import RequestFinished
from proxy.observability.upstream_events import UpstreamFailedOver, UpstreamRetried
from tests import clear
from tests.clear import CLEAR
from tests.e2e.scene import ANSWER, CHAT, END, PATIENCE, SOON, SSE, Client, chunk, piece_of, plain, request, until
from tests.e2e.stack import Stack, stack
from tests.transport.servers import Peer, Received, Server, refusing, serve

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
DONE = b"data: [DONE]\n\n"
ERROR = b'{"error":{"message":"down","type":"server_error","code":null}}'
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
FAST = {"base_delay_ms": 1, "max_delay_ms": 2000}


class Provider:
    """One upstream on a socket of its own; `answer` is called for each request with its peer."""

    def __init__(self, server: Server, answer: list[Any]) -> None:
        self.server = server
        self._answer = answer

    def plays(self, answer: Any) -> None:
        """`answer`: bytes, or a coroutine function of (peer, request)."""
        self._answer[0] = answer

    @property
    def asked(self) -> list[Received]:
        return self.server.requests

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "openai", "base_url": f"http://127.0.0.1:{self.server.port}/v1"}


@contextlib.asynccontextmanager
async def provider(answer: Any = None) -> AsyncIterator[Provider]:
    plays = [plain(ANSWER) if answer is None else answer]

    async def script(peer: Peer) -> None:
        while True:
            received = await peer.request()
            if isinstance(plays[0], bytes):
                await peer.send(plays[0])
            else:
                await plays[0](peer, received)

    async with serve(script) as server:
        yield Provider(server, plays)


@contextlib.asynccontextmanager
async def pair(
    *,
    silence: float | None = None,
    first: dict[str, Any] | None = None,
    second: dict[str, Any] | None = None,
    **more: Any,
) -> AsyncIterator[tuple[Stack, Provider, Provider]]:
    """`m` leads to `a`, then to `b`; `first` and `second` are further settings of them."""
    async with provider() as a, provider() as b:
        tolerance = {"retry": FAST, **more.pop("fault_tolerance", {})}
        config = {
            "providers": {"a": {**a.settings, **(first or {})}, "b": {**b.settings, **(second or {})}},
            "models": [{"name": "m", "targets": ["a/m-a", "b/m-b"]}, {"name": "only-a", "targets": ["a/m-a"]}],
            "listen": {"drain_ms": 0, "grace_ms": 1000},
            "fault_tolerance": tolerance,
            **more,
        }
        async with stack(config, silence=silence) as running:
            yield running, a, b
            await running.quiet(PATIENCE)


@contextlib.asynccontextmanager
async def client_of(running: Stack) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=running.url, timeout=PATIENCE, verify=CLEAR) as client:
        yield client


async def ask(running: Stack, headers: dict[str, str] | None = None, **body: Any) -> httpx2.Response:
    async with client_of(running) as client:
        return await client.post(CHAT, json={**BODY, **body}, headers=headers or {})


def finished(running: Stack) -> RequestFinished:
    (event,) = [event for event in running.events if isinstance(event, RequestFinished)]
    return event


async def streams(peer: Peer, received: Received) -> None:
    await peer.send(SSE + chunk(piece_of("Hi")) + chunk(DONE) + END)


async def stalls(peer: Peer, received: Received) -> None:
    await peer.gone()


async def streams_an_error(peer: Peer, received: Received) -> None:
    await peer.send(SSE + chunk(ROLE) + chunk(b"data: " + ERROR + b"\n\n") + END)


# --- who answers ----------------------------------------------------------------------------------------------------


async def test_the_first_target_answers_while_it_can() -> None:
    async with pair() as (running, a, b):
        answer = await ask(running)
        assert answer.status_code == 200
        named = {name: answer.headers[f"x-breakwater-{name}"] for name in ("provider", "model", "attempts")}
        assert named == {"provider": "a", "model": "m-a", "attempts": "1"}
        assert (len(a.asked), len(b.asked)) == (1, 0)


@pytest.mark.parametrize("status", [401, 402, 403, 429, 500, 502, 503, 529])
async def test_another_one_answers_when_it_cannot(status: int) -> None:
    async with pair() as (running, a, b):
        a.plays(plain(ERROR, status))
        answer = await ask(running)
        assert answer.status_code == 200
        assert answer.json() == json.loads(ANSWER)
        named = {name: answer.headers[f"x-breakwater-{name}"] for name in ("provider", "model", "attempts")}
        assert named == {"provider": "b", "model": "m-b", "attempts": "2"}
        assert json.loads(b.asked[0].body)["model"] == "m-b"
        await running.quiet()
        event = finished(running)
        assert (event.provider, event.upstream_model, event.attempts, event.status) == ("b", "m-b", 2, 200)
        assert event.overhead is not None
        assert event.overhead < 1.0


async def test_a_provider_that_is_not_there_costs_a_moment() -> None:
    nobody = {"base_url": f"http://127.0.0.1:{refusing().port}/v1"}
    async with pair(first=nobody) as (running, _, _):
        answer = await ask(running)
        assert answer.headers["x-breakwater-provider"] == "b"
        assert isinstance(running.events[0], UpstreamFailedOver)
        assert running.events[0].reason == "refused"


async def test_a_refusal_of_the_request_is_the_provider_s_own_and_goes_nowhere_else() -> None:
    async with pair() as (running, a, b):
        body = b'{"error":{"message":"no","type":"invalid_request_error","param":"x","code":null}}'
        a.plays(plain(body, 400))
        answer = await ask(running)
        assert (answer.status_code, answer.content) == (400, body)
        assert len(b.asked) == 0


@pytest.mark.parametrize("fallback", ["b", "b/other"])
async def test_a_fallback_serves_models_that_do_not_list_it(fallback: str) -> None:
    async with pair(fault_tolerance={"fallback_provider": fallback}) as (running, a, b):
        a.plays(plain(ERROR, 500))
        answer = await ask(running, model="only-a")
        assert answer.headers["x-breakwater-provider"] == "b"
        wanted = "other" if "/" in fallback else "only-a"
        assert json.loads(b.asked[0].body)["model"] == wanted


async def test_a_tenant_is_served_by_its_own_providers_only() -> None:
    tenants = [{"name": "acme", "keys": ["bw-acme-0123456789"], "providers": ["a"]}]
    async with pair(tenants=tenants, fault_tolerance={"retry": {"max_attempts": 1}}) as (running, a, b):
        a.plays(plain(ERROR, 500))
        answer = await ask(running, {"authorization": "Bearer bw-acme-0123456789"})
        assert answer.status_code == 503
        assert len(b.asked) == 0


async def test_targets_that_share_keep_a_run_together() -> None:
    models = [{"name": "m", "targets": [["a/m", "b/m"]]}]
    async with pair(models=models) as (running, a, b), client_of(running) as client:
        served: dict[str, set[str]] = {}
        for _ in range(3):
            for run in range(12):
                answer = await client.post(CHAT, json=BODY, headers={"x-breakwater-run-id": f"run-{run}"})
                served.setdefault(f"run-{run}", set()).add(answer.headers["x-breakwater-provider"])
        assert all(len(providers) == 1 for providers in served.values())
        assert len(a.asked) + len(b.asked) == 36
        assert min(len(a.asked), len(b.asked)) >= 3
        a.plays(plain(ERROR, 500))
        answers = [await client.post(CHAT, json=BODY) for _ in range(8)]
        assert {answer.headers["x-breakwater-provider"] for answer in answers} == {"b"}


async def test_least_in_flight_comes_first() -> None:
    models = [{"name": "m", "targets": [["a/m", "b/m"]]}]
    async with pair(models=models) as (running, a, b), client_of(running) as client:
        gate = asyncio.Event()

        async def held(peer: Peer, received: Received) -> None:
            await gate.wait()
            await peer.send(plain(ANSWER))

        a.plays(held)
        b.plays(held)
        tasks = [asyncio.create_task(client.post(CHAT, json=BODY)) for _ in range(6)]
        await until(lambda: len(a.asked) + len(b.asked) == 6, "all to be asked")
        assert len(a.asked) == len(b.asked) == 3
        gate.set()
        assert all(answer.status_code == 200 for answer in await asyncio.gather(*tasks))


async def test_keys_of_one_provider_are_a_pool() -> None:
    keys = ["sk-one-0123456789", "sk-two-0123456789"]
    async with pair(first={"api_keys": keys}) as (running, a, _), client_of(running) as client:

        async def one_is_spent(peer: Peer, received: Received) -> None:
            spent = "sk-one" in received.header("authorization")[0]
            await peer.send(plain(ERROR, 429, more=b"retry-after: 100\r\n") if spent else plain(ANSWER))

        a.plays(one_is_spent)
        answers = [await client.post(CHAT, json=BODY) for _ in range(8)]
        assert Counter(answer.headers["x-breakwater-provider"] for answer in answers) == {"a": 8}
        used = Counter(received.header("authorization")[0] for received in a.asked)
        assert used == {"Bearer sk-one-0123456789": 1, "Bearer sk-two-0123456789": 8}


# --- streams --------------------------------------------------------------------------------------------------------


async def test_a_stream_that_begins_with_an_error_fails_over() -> None:
    async with pair() as (running, a, b):
        a.plays(streams_an_error)
        b.plays(streams)
        answer = await ask(running, stream=True)
        assert answer.content == piece_of("Hi") + DONE
        assert answer.headers["x-breakwater-provider"] == "b"


async def test_after_a_silence_the_failover_goes_on_behind_keep_alives() -> None:
    async with pair(silence=0.05, first={"timeouts": {"first_event_ms": 400}}) as (running, a, b):
        a.plays(stalls)
        b.plays(streams)
        answer = await ask(running, {"x-breakwater-trailer": "1"}, stream=True)
        assert answer.status_code == 200
        assert "x-breakwater-provider" not in answer.headers  # nobody knew it then
        comments, _, rest = answer.content.partition(piece_of("Hi"))
        assert comments.replace(b": keep-alive\n\n", b"") == b""
        assert comments
        assert rest.endswith(DONE)
        trailer = json.loads(rest.removesuffix(DONE).removeprefix(b": breakwater "))
        assert (trailer["provider"], trailer["model"]) == ("b", "m-b")
        assert (len(a.asked), len(b.asked)) == (1, 1)


async def test_a_failure_behind_keep_alives_is_the_error_that_the_status_would_have_been() -> None:
    quick = {"timeouts": {"first_event_ms": 300}}
    async with pair(silence=0.05, first=quick, second=quick) as (running, a, b):
        a.plays(stalls)
        b.plays(stalls)
        answer = await ask(running, stream=True)
        assert answer.status_code == 200
        last = answer.content.rsplit(b"data: ", 1)[1]
        error = json.loads(last)["error"]
        assert (error["code"], error["type"]) == ("upstream_timeout", "upstream_error")
        assert [one["target"] for one in error["breakwater"]["attempts"]] == ["a/m-a", "b/m-b"]
        assert answer.content.endswith(b"}\n\n")
        await running.quiet()
        assert finished(running).status == 504


async def test_after_the_first_event_the_stream_is_interrupted_and_nobody_else_asked() -> None:
    async def cuts(peer: Peer, received: Received) -> None:
        await peer.send(SSE + chunk(piece_of("Hi")))
        await asyncio.sleep(0.05)
        peer.reset()

    async with pair() as (running, a, b):
        a.plays(cuts)
        answer = await ask(running, stream=True)
        assert b'"code":"stream_interrupted"' in answer.content
        assert len(b.asked) == 0


# --- the end of it --------------------------------------------------------------------------------------------------


async def test_the_final_error_lists_every_attempt_and_nothing_secret() -> None:
    async with pair(
        first={"api_key": "sk-secret-0123456789"}, fault_tolerance={"retry": {**FAST, "max_attempts": 3}}
    ) as (
        running,
        a,
        b,
    ):
        a.plays(plain(b'{"error":{"message":"sk-secret-0123456789"}}', 500))
        b.plays(plain(ERROR, 401))
        answer = await ask(running)
        assert answer.status_code == 503
        assert answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("upstream_unavailable", "upstream_error")
        attempts = error["breakwater"]["attempts"]
        assert [(one["target"], one["status"], one["reason"]) for one in attempts] == [
            ("a/m-a", 500, "server_error"),
            ("b/m-b", 401, "credential"),
            ("a/m-a", 500, "server_error"),
        ]
        assert b"sk-secret" not in answer.content
        assert answer.headers["x-breakwater-attempts"] == "3"


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_the_official_client_makes_no_further_attempt_of_its_own(status: int) -> None:
    async with pair(fault_tolerance={"retry": {**FAST, "max_attempts": 2}}) as (running, a, _):
        a.plays(plain(ERROR, status))
        async with openai.AsyncOpenAI(
            base_url=f"{running.url}/v1", api_key="sk-any", http_client=clear.async_client()
        ) as client:
            with pytest.raises(openai.APIStatusError) as raised:
                await client.chat.completions.create(model="only-a", messages=BODY["messages"])
        assert raised.value.status_code == (429 if status == 429 else 503)
        await running.quiet()
        assert len(running.outcomes()) == 1
        assert len(a.asked) == 2


async def test_the_client_s_deadline_holds_over_all_attempts() -> None:
    async with pair() as (running, a, b):
        a.plays(stalls)
        started = asyncio.get_running_loop().time()
        answer = await ask(running, {"x-breakwater-timeout-ms": "200"})
        assert asyncio.get_running_loop().time() - started < 0.2 + 0.25 + 1.0  # the promise, and a busy machine
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")
        assert len(b.asked) == 0
        wrong = await ask(running, {"x-breakwater-timeout-ms": "soon"})
        assert wrong.status_code == 400


async def test_a_stream_that_has_begun_has_no_deadline() -> None:
    async def slowly(peer: Peer, received: Received) -> None:
        await peer.send(SSE + chunk(piece_of("Hi")))
        await asyncio.sleep(0.5)
        await peer.send(chunk(piece_of("there")) + chunk(DONE) + END)

    async with pair() as (running, a, _):
        a.plays(slowly)
        answer = await ask(running, {"x-breakwater-timeout-ms": "300"}, stream=True)
        assert answer.content == piece_of("Hi") + piece_of("there") + DONE


# --- what is told ---------------------------------------------------------------------------------------------------


async def test_retries_and_failovers_are_told_and_counted() -> None:
    async with pair() as (running, a, _):
        a.plays(plain(ERROR, 500))
        await ask(running)
        answers = iter([plain(ERROR, 500), plain(ANSWER)])

        async def second_time(peer: Peer, received: Received) -> None:
            await peer.send(next(answers))

        a.plays(second_time)
        assert (await ask(running, model="only-a")).status_code == 200
        told = [event for event in running.events if isinstance(event, UpstreamRetried | UpstreamFailedOver)]
        over, retried = told
        assert isinstance(over, UpstreamFailedOver)
        assert (over.source, over.target, over.reason, over.model) == ("a/m-a", "b/m-b", "server_error", "m")
        assert isinstance(retried, UpstreamRetried)
        assert (retried.target, retried.reason, retried.attempt) == ("a/m-a", "server_error", 2)
        async with client_of(running) as client:
            page = (await client.get("/metrics")).text
        assert 'breakwater_failovers_total{from="a",to="b"} 1\n' in page
        assert 'breakwater_retries_total{provider="a",reason="server_error"} 1\n' in page


async def test_a_request_is_billed_for_the_attempt_that_answered() -> None:
    async with pair() as (running, a, _):
        a.plays(plain(ERROR, 500))
        answer = await ask(running)
        assert answer.headers["x-breakwater-usage-total"] == "5"
        await running.quiet()
        usage = finished(running).usage
        assert usage is not None
        assert (usage.input, usage.output) == (3, 2)


# --- a client that leaves -------------------------------------------------------------------------------------------


async def left(running: Stack, client: Client) -> RequestFinished:
    """Leaves with a reset; what the program says of it, soon after."""
    client.reset()
    async with asyncio.timeout(SOON + PATIENCE / 10):
        await running.quiet()
    event = finished(running)
    assert (event.status, event.disconnected) == (499, True)
    return event


async def connected(running: Stack) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", running.port))


async def test_a_client_that_leaves_during_a_wait() -> None:
    async with pair(fault_tolerance={"retry": {"base_delay_ms": 30_000, "jitter": False}}) as (running, a, _):
        a.plays(plain(ERROR, 500))
        client = await connected(running)
        client.send(request("only-a"))
        await until(lambda: len(a.asked) == 1, "the first attempt")
        event = await left(running, client)
        assert event.attempts == 1
        assert event.usage is None
        assert len(a.asked) == 1


async def test_a_client_that_leaves_during_the_second_attempt() -> None:
    async with pair() as (running, a, b):
        a.plays(plain(ERROR, 500))
        b.plays(stalls)
        client = await connected(running)
        client.send(request("m"))
        await until(lambda: len(b.asked) == 1, "the second attempt")
        event = await left(running, client)
        assert (event.provider, event.attempts) == ("b", 2)
        await until(lambda: b.server.closed == b.server.accepted, "the upstream to see it")
