"""Who leaves when: the client at every moment of a request, the provider at every moment of an answer.

Whatever happens: one event with the right status, the provider's socket closed at once, no task, slot or socket left
(`scene` looks), and the next request is served. There is one slot to the provider, so a leaked one would be missed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from proxy.observability.events import RequestFinished
from proxy.providers.mock.handler import Mock
from proxy.providers.mock.server import MockServer
from proxy.tokens.vocabularies import SHARED
from proxy.types import Usage
from tests.e2e.scene import (
    ANSWER,
    END,
    SOON,
    SSE,
    Client,
    Scene,
    chunk,
    flushed,
    piece_of,
    plain,
    playing,
    request,
    scene,
    until,
)
from tests.e2e.stack import stack
from tests.transport.servers import Peer, black_hole, refusing

pytestmark = pytest.mark.anyio

ENCODING = "o200k_base"
BIG = ANSWER[:-1] + b',"x":"%b"}' % (b"x" * 8 * 1024 * 1024)
"""More than the kernel takes off our hands."""


@pytest.fixture(scope="module", autouse=True)
def _vocabulary() -> None:
    """Loading takes half a second of one core, which would be taken for a slow reaction."""
    SHARED.load(ENCODING)


@dataclass
class Upstream:
    """An upstream that says when it has come to the point, and when the proxy has left it."""

    opening: bytes = b""
    """What it answers at once."""
    flood: bytes = b""
    """What it then sends without end."""
    there: asyncio.Event = field(default_factory=asyncio.Event)
    left_at: float = 0.0

    async def __call__(self, peer: Peer) -> None:
        if self.opening:
            await peer.send(self.opening)
        self.there.set()
        try:
            while self.flood:
                await peer.send(self.flood)
            await peer.gone()
        finally:
            self.left_at = asyncio.get_running_loop().time()
        raise ConnectionResetError  # this connection has played its part


def leave(client: Client, how: str) -> float:
    """When it left."""
    client.reset() if how == "reset" else client.close()
    return asyncio.get_running_loop().time()


leaving = pytest.mark.parametrize("how", ["reset", "close"])


async def served_after(on_stage: Scene, model: str = "good") -> None:
    """The next request gets its answer and its own event."""
    before = len(on_stage.stack.outcomes())
    status, _, body = await on_stage.post(model)
    assert (status, "choices" in json.loads(body)) == (200, True)
    assert [event.status for event in (await on_stage.over(before + 1))[before:]] == [200]


async def told_at_once(upstream: Upstream, left: float) -> None:
    await until(lambda: upstream.left_at, "the upstream to be left")
    assert upstream.left_at - left < SOON


def is_hangup(event: Any, *, stream: bool, attempts: int = 1) -> None:
    assert isinstance(event, RequestFinished)
    assert (event.status, event.error_code, event.disconnected) == (499, "client_disconnected", True)
    assert (event.stream, event.attempts, event.interrupted) == (stream, attempts, False)


# --- the client leaves ----------------------------------------------------------------------------------------------


@leaving
@pytest.mark.parametrize("sent", [0, 1, 10])
async def test_while_its_body_is_still_coming_in(how: str, sent: int) -> None:
    async with scene(playing({}), max_connections=1) as on_stage:
        client = await on_stage.client()
        head, _, body = request().partition(b"\r\n\r\n")
        client.send(head + b"\r\n\r\n" + body[:sent])
        await until(lambda: on_stage.stack.running.gateway.in_flight, "the request to arrive")
        leave(client, how)
        (event,) = await on_stage.over()
        is_hangup(event, stream=False, attempts=0)
        assert on_stage.upstream.accepted == 0
        await served_after(on_stage)


@leaving
async def test_while_a_chunked_body_is_coming_in(how: str) -> None:
    async with scene(playing({}), max_connections=1) as on_stage:
        client = await on_stage.client()
        client.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        client.send(chunk(b'{"model":"any","messages":[]'))
        await until(lambda: on_stage.stack.running.gateway.in_flight, "the request to arrive")
        leave(client, how)
        is_hangup((await on_stage.over())[0], stream=False, attempts=0)
        assert on_stage.upstream.accepted == 0
        await served_after(on_stage)


@leaving
@pytest.mark.parametrize("stream", [False, True])
async def test_while_we_connect_to_the_provider(how: str, stream: bool) -> None:
    with black_hole() as nowhere:
        base_url = f"http://127.0.0.1:{nowhere.port}/v1"
        async with scene(playing({}), base_url=base_url, max_connections=1) as on_stage:
            client = await on_stage.client()
            client.ask(stream=stream)
            await until(lambda: on_stage.slots.in_use == 1, "the slot to be taken")
            left = leave(client, how)
            await until(lambda: on_stage.slots.in_use == 0, "the slot to be free")
            assert asyncio.get_running_loop().time() - left < SOON
            is_hangup((await on_stage.over())[0], stream=stream)
            await served_after(on_stage, "spare")


@leaving
async def test_while_it_waits_for_a_slot(how: str) -> None:
    holding = Upstream()
    async with scene(playing({"hold": holding}), max_connections=1) as on_stage:
        holder, waiter = await on_stage.client(), await on_stage.client()
        holder.ask("hold")
        await holding.there.wait()
        waiter.ask("wait")
        await until(lambda: on_stage.slots.waiting == 1, "the second request to wait")
        leave(waiter, how)
        is_hangup((await on_stage.ended(1))[0], stream=False)
        assert (on_stage.slots.in_use, on_stage.slots.waiting) == (1, 0)
        await told_at_once(holding, leave(holder, how))
        await on_stage.over(2)
        assert on_stage.upstream.accepted == 1
        await served_after(on_stage)


BEFORE = {
    "a plain answer": (b"", False),
    "a stream's head": (b"", True),
    "a stream's first event": (SSE, True),
    "a stream's first event, after a comment": (SSE + chunk(b": PROCESSING\n\n"), True),
    "the end of a stream's first event": (SSE + chunk(b'data: {"choices":['), True),
    "the end of a plain body": (plain(ANSWER)[:-10], False),
}


@leaving
@pytest.mark.parametrize("what", BEFORE)
async def test_before(what: str, how: str) -> None:
    opening, stream = BEFORE[what]
    upstream = Upstream(opening)
    async with scene(playing({"any": upstream}), max_connections=1) as on_stage:
        client = await on_stage.client()
        client.ask(stream=stream)
        await upstream.there.wait()
        await told_at_once(upstream, leave(client, how))
        (event,) = await on_stage.over()
        is_hangup(event, stream=stream)
        assert isinstance(event, RequestFinished)
        assert event.bytes_out == 0
        assert event.usage is not None  # the provider was at work on the prompt
        assert (event.usage.input > 0, event.usage.output, event.usage.estimated) == (True, 0, True)
        await served_after(on_stage)


@leaving
async def test_mid_stream(how: str) -> None:
    upstream = Upstream(SSE + chunk(piece_of("Hello") + piece_of(" world")))
    async with scene(playing({"any": upstream}), max_connections=1) as on_stage:
        client = await on_stage.client()
        client.ask(stream=True)
        await client.head()
        await client.read_until(b"world")
        await told_at_once(upstream, leave(client, how))
        (event,) = await on_stage.over()
        is_hangup(event, stream=True)
        assert isinstance(event, RequestFinished)
        assert event.usage is not None
        assert (event.usage.estimated, event.usage.output, event.bytes_out) == (True, 2, len(client.seen))
        await served_after(on_stage)


@leaving
async def test_mid_stream_of_a_pass_through(how: str) -> None:
    upstream = Upstream(b"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ncontent-length: 1000\r\n\r\n" + b"x" * 10)
    async with scene(playing({"any": upstream}), max_connections=1) as on_stage:
        client = await on_stage.client()
        client.ask(path="/v1/audio/speech", input="Hello")
        assert (await client.head())[1]["content-length"] == "1000"
        await told_at_once(upstream, leave(client, how))
        is_hangup((await on_stage.over())[0], stream=False)
        await served_after(on_stage)


@leaving
@pytest.mark.parametrize("kept_alive", [False, True])
async def test_while_a_keep_alive_is_all_that_was_said(how: str, kept_alive: bool) -> None:
    upstream = Upstream(SSE if kept_alive else b"")
    async with scene(playing({"any": upstream}), max_connections=1, silence=0.05) as on_stage:
        client = await on_stage.client()
        client.ask(stream=True)
        await client.head()
        await client.read_until(b": keep-alive\n\n")
        await told_at_once(upstream, leave(client, how))
        is_hangup((await on_stage.over())[0], stream=True)
        await served_after(on_stage)


@leaving
@pytest.mark.parametrize("silence", [None, 0.02])
async def test_while_we_write_to_it(how: str, silence: float | None) -> None:
    """The client reads nothing: our buffers are full and the provider is held back. With keep-alives due as well."""
    upstream = Upstream(SSE, flood=chunk(piece_of("x" * 1000) * 60))
    async with scene(playing({"any": upstream}), max_connections=1, silence=silence) as on_stage:
        client = await on_stage.client(receive_buffer=4096)
        client.ask(stream=True)
        await until(lambda: any(one.flow.write_paused for one in on_stage.connections), "the buffers to be full")
        await told_at_once(upstream, leave(client, how))
        (event,) = await on_stage.over()
        is_hangup(event, stream=True)
        assert isinstance(event, RequestFinished)
        assert event.usage is not None
        assert event.usage.estimated
        await served_after(on_stage)


@leaving
async def test_with_a_second_request_waiting_behind_the_first(how: str) -> None:
    upstream = Upstream(SSE + chunk(piece_of("Hello")))
    async with scene(playing({"any": upstream}), max_connections=1) as on_stage:
        client = await on_stage.client()
        client.ask(stream=True)
        client.ask("second")
        await client.head()
        await client.read_until(b"Hello")
        await told_at_once(upstream, leave(client, how))
        is_hangup((await on_stage.over())[0], stream=True)
        assert len(on_stage.upstream.requests) == 1  # the second was never served: nobody would read its answer
        await served_after(on_stage)


@leaving
async def test_in_the_second_request_of_a_connection(how: str) -> None:
    upstream = Upstream(SSE + chunk(piece_of("Hello")))
    async with scene(playing({"any": upstream}), max_connections=1) as on_stage:
        client = await on_stage.client()
        client.ask("good")
        client.ask(stream=True)
        assert (await client.answer())[0] == 200
        await client.head()
        await client.read_until(b"Hello")
        await told_at_once(upstream, leave(client, how))
        first, second = await on_stage.over(2)
        assert first.status == 200
        is_hangup(second, stream=True)
        await served_after(on_stage)


@leaving
async def test_during_an_error_answer(how: str) -> None:
    """It waits behind an answer that fills our buffers and that the client does not read."""
    parts = {"big": lambda peer: peer.send(plain(BIG)), "any": lambda peer: peer.send(plain(b"{}", 400))}
    async with scene(playing(parts), max_connections=1) as on_stage:
        client = await on_stage.client(receive_buffer=4096)
        client.ask("big")
        client.ask(stream=True)
        await until(lambda: on_stage.slots.in_use == 0 and len(on_stage.upstream.requests) == 2, "the refusal")
        assert on_stage.stack.running.gateway.in_flight == 1
        leave(client, how)
        first, second = await on_stage.over(2)
        assert first.status == 200  # handed over whole: what the kernel makes of it is not known
        is_hangup(second, stream=True)
        assert isinstance(second, RequestFinished)
        assert second.usage is None  # a refusal costs nothing
        await served_after(on_stage)


@leaving
@pytest.mark.parametrize("end", ["terminator", "error event"])
async def test_while_the_last_bytes_of_a_stream_wait_for_it(end: str, how: str) -> None:
    gate = asyncio.Event()

    async def part(peer: Peer) -> None:
        await peer.send(SSE + chunk(piece_of("x" * len(BIG))))
        await gate.wait()
        if end == "terminator":
            await peer.send(chunk(b"data: [DONE]\n\n") + END)
        else:
            peer.reset()
            raise ConnectionResetError

    async with scene(playing({"any": part}), max_connections=1) as on_stage:
        client = await on_stage.client(receive_buffer=4096)
        client.ask(stream=True)
        await until(lambda: any(one.flow.write_paused for one in on_stage.connections), "the buffers to be full")
        gate.set()
        await until(lambda: on_stage.slots.in_use == 0, "the provider to be done")
        assert on_stage.stack.running.gateway.in_flight == 1
        leave(client, how)
        is_hangup((await on_stage.over())[0], stream=True)
        await served_after(on_stage)


async def test_a_client_that_closes_its_sending_side_has_left() -> None:
    """No client of the API half-closes and waits on; whoever dies behind a proxy looks exactly like this."""
    upstream = Upstream(SSE + chunk(piece_of("Hello")))
    async with scene(playing({"any": upstream}), max_connections=1) as on_stage:
        client = await on_stage.client()
        client.ask(stream=True)
        await client.head()
        await client.read_until(b"Hello")
        client.half_close()
        await told_at_once(upstream, asyncio.get_running_loop().time())
        is_hangup((await on_stage.over())[0], stream=True)
        await client.ended()
        client.close()
        await served_after(on_stage)


async def test_many_at_once() -> None:
    """Ten in flight, five in the queue, one slot each; all leave in the same turn of the loop."""
    upstreams = {f"m{n}": Upstream(SSE + chunk(piece_of("Hello"))) for n in range(10)}
    async with scene(playing(upstreams), max_connections=10) as on_stage:
        clients = [await on_stage.client() for _ in range(15)]
        for number, client in enumerate(clients[:10]):
            client.ask(f"m{number}", stream=True)
            await client.head()
            await client.read_until(b"Hello")
        for client in clients[10:]:
            client.ask("queued")
        await until(lambda: on_stage.slots.waiting == 5, "five requests to wait")
        for number, client in enumerate(clients):
            left = leave(client, "reset" if number % 2 else "close")
        for upstream in upstreams.values():
            await told_at_once(upstream, left)
        events = await on_stage.over(15)
        assert {event.status for event in events} == {499}
        assert len(on_stage.upstream.requests) == 10
        for _ in range(10):
            await served_after(on_stage)


async def test_a_client_that_leaves_with_the_terminator_in_hand_has_its_whole_answer() -> None:
    """The official client closes on `[DONE]`; a provider may still have the end of its body to send then."""

    async def late_end(peer: Peer) -> None:
        await peer.send(SSE + chunk(piece_of("Hello") + b"data: [DONE]\n\n"))
        await peer.gone()

    async with scene(playing({"any": late_end}), max_connections=1) as on_stage:
        client = await on_stage.client()
        client.ask(stream=True)
        await client.head()
        await client.read_until(b"[DONE]")
        client.close()
        (event,) = await on_stage.over()
        assert isinstance(event, RequestFinished)
        assert (event.status, event.error_code, event.disconnected) == (200, None, False)
        await served_after(on_stage)


@leaving
async def test_what_was_forwarded_is_what_is_counted(how: str) -> None:
    """Against the books of a provider that bills every piece it sent, at 200 tokens a second."""
    mock = Mock(SHARED.load(ENCODING).count, tokens_per_second=200)
    server = MockServer(mock)
    port = await server.start("127.0.0.1", 0)
    try:
        config = {"providers": {"up": {"kind": "openai", "base_url": f"http://127.0.0.1:{port}/v1"}}}
        async with stack({**config, "listen": {"drain_ms": 0, "grace_ms": 1000}}) as running:
            on_stage = Scene(running, None)  # type: ignore[arg-type]  # the upstream is another one
            for pieces in (1, 20):
                client = await on_stage.client()
                client.ask("gpt-4o", stream=True, messages=[{"role": "user", "content": "word " * 300}])
                await client.head()
                while client.seen.count(b'"content":"') <= pieces:
                    assert await client.more()
                received = _content(client.seen)
                leave(client, how)
                event = (await on_stage.over(1))[-1]
                running.events.clear()
                await until(lambda: mock.ledger.read()["totals"]["in_flight"] == 0, "the books to be closed")
                entry = mock.ledger.read()["entries"][-1]
                assert entry["client_gone"]
                assert isinstance(event, RequestFinished)
                assert isinstance(event.usage, Usage)
                assert event.usage.estimated
                assert event.usage.input == entry["prompt_tokens"]
                assert SHARED.load(ENCODING).count(received) <= event.usage.output
                assert abs(event.usage.output - entry["completion_tokens"]) <= 1
    finally:
        await server.aclose()


def _content(stream: bytes) -> str:
    chunks = [json.loads(line[6:]) for line in stream.split(b"\n\n") if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for one in chunks for choice in one["choices"])


# --- the provider leaves --------------------------------------------------------------------------------------------


def dies(opening: bytes, how: str) -> Callable[[Peer], Awaitable[None]]:
    async def part(peer: Peer) -> None:
        if opening:
            await peer.send(opening)
        if how == "stall":
            await peer.gone()
        elif how == "reset":
            await flushed(peer)
            peer.reset()
        else:
            peer.fin()
        raise ConnectionResetError

    return part


DEATHS = ["reset", "close", "stall"]
SHORT = {"first_event_ms": 200, "idle_ms": 200, "total_ms": 200}


def error_of(body: bytes) -> dict[str, Any]:
    return dict(json.loads(body)["error"])


@pytest.mark.parametrize("how", DEATHS)
@pytest.mark.parametrize("what", BEFORE)
async def test_the_provider_dies_before(what: str, how: str) -> None:
    opening, stream = BEFORE[what]
    timeouts = SHORT if how == "stall" else {}
    async with scene(playing({"any": dies(opening, how)}), max_connections=1, timeouts=timeouts) as on_stage:
        status, headers, body = await on_stage.post(stream=stream)
        expected = (504, "upstream_timeout") if how == "stall" else (503, "upstream_unavailable")
        assert (status, error_of(body)["code"]) == expected
        assert error_of(body)["type"] == "upstream_error"
        assert headers["x-should-retry"] == "false"
        (event,) = await on_stage.over()
        assert isinstance(event, RequestFinished)
        assert (event.status, event.error_code, event.attempts, event.stream) == (*expected, 1, stream)
        assert (event.disconnected, event.interrupted) == (False, False)
        # After a timeout the provider may have made all that was expected of it.
        assert event.usage is None or (event.error_code == "upstream_timeout" and event.usage.estimated)
        await served_after(on_stage)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_provider_refuses_the_connection(stream: bool) -> None:
    base_url = f"http://127.0.0.1:{refusing().port}/v1"
    async with scene(playing({}), base_url=base_url, max_connections=1) as on_stage:
        status, _, body = await on_stage.post(stream=stream)
        assert (status, error_of(body)["code"]) == (503, "upstream_unavailable")
        assert error_of(body)["breakwater"]["attempts"][0]["reason"] == "refused"
        (event,) = await on_stage.over()
        assert (event.status, event.event) == (503, "request.finished")
        await served_after(on_stage, "spare")


@pytest.mark.parametrize("how", DEATHS)
@pytest.mark.parametrize("rest", [b"", b"data: {", b": hm\n\n"])
async def test_the_provider_dies_mid_stream(how: str, rest: bytes) -> None:
    timeouts = {"idle_ms": 200} if how == "stall" else {}
    opening = SSE + chunk(piece_of("Hello") + rest)
    async with scene(playing({"any": dies(opening, how)}), max_connections=1, timeouts=timeouts) as on_stage:
        status, _, body = await on_stage.post(stream=True)
        assert status == 200
        before, last = body.split(b"\n\n")[0], body.split(b"\n\n")[-2]
        assert b"Hello" in before
        assert error_of(last.removeprefix(b"data: "))["code"] == "stream_interrupted"
        assert b"[DONE]" not in body
        (event,) = await on_stage.over()
        assert isinstance(event, RequestFinished)
        assert (event.status, event.error_code, event.interrupted) == (200, "stream_interrupted", True)
        assert not event.disconnected
        assert event.usage is not None
        assert (event.usage.estimated, event.usage.output) == (True, 1)
        await served_after(on_stage)


@pytest.mark.parametrize("how", DEATHS)
async def test_the_provider_dies_in_the_body_of_a_pass_through(how: str) -> None:
    """Its length is promised: a clean end would look like a whole file, so the connection is cut."""
    timeouts = {"idle_ms": 200} if how == "stall" else {}
    opening = b"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"x" * 10)
    async with scene(playing({"any": dies(opening, how)}), max_connections=1, timeouts=timeouts) as on_stage:
        client = await on_stage.client()
        client.ask(path="/v1/audio/speech", input="Hello")
        assert (await client.head())[0] == 200
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await client.rest()
        client.close()
        (event,) = await on_stage.over()
        assert isinstance(event, RequestFinished)
        assert event.error_code == ("upstream_timeout" if how == "stall" else "upstream_unavailable")
        assert not event.disconnected
        await served_after(on_stage)


async def test_both_leave_at_once() -> None:
    gate = asyncio.Event()

    async def part(peer: Peer) -> None:
        await peer.send(SSE + chunk(piece_of("Hello")))
        await gate.wait()
        peer.reset()
        raise ConnectionResetError

    async with scene(playing({"any": part}), max_connections=1) as on_stage:
        client = await on_stage.client()
        client.ask(stream=True)
        await client.head()
        await client.read_until(b"Hello")
        gate.set()
        client.reset()
        (event,) = await on_stage.over()
        assert (event.status, getattr(event, "error_code", "")) in (
            (499, "client_disconnected"),
            (200, "stream_interrupted"),
        )
        await served_after(on_stage)
