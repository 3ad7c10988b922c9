"""What a client hears never waits for our books, and the books are kept all the same."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from proxy.observability.events import InternalFault, RequestFinished
from proxy.tokens.count import Counter
from proxy.tokens.recall import Measured
from proxy.tokens.vocabularies import VocabularyError
from tests.e2e.scene import END, SSE, Client, Scene, chunk, piece_of, plain, scene
from tests.e2e.stack import stack
from tests.transport.servers import Peer, serve

pytestmark = pytest.mark.anyio

LONG = [{"role": "user", "content": "many words " * 4000}]
"""Too long to be counted on the loop."""


async def begins(peer: Peer) -> None:
    await peer.request()
    await peer.send(SSE + chunk(piece_of("one")))
    await peer.gone()


async def breaks(peer: Peer) -> None:
    await peer.request()
    await peer.send(SSE + chunk(piece_of("one")))
    peer.fin()


async def ends(peer: Peer) -> None:
    await peer.request()
    await peer.send(SSE + chunk(piece_of("one")) + chunk(b"data: [DONE]\n\n") + END)
    await peer.gone()


@contextlib.contextmanager
def counting_held_up(there: Scene) -> Iterator[threading.Event]:
    """The thread that counts is busy until the event is set."""
    release = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(release.wait, 60)
        there.stack.running.gateway.service.pipeline.budget.counter = Counter(executor=executor)
        try:
            yield release
        finally:
            release.set()


async def test_at_a_shutdown_every_stream_hears_of_it_first() -> None:
    async with scene(begins) as there:
        with counting_held_up(there) as release:
            clients = [await there.client() for _ in range(3)]
            for client in clients:
                client.ask(stream=True, messages=LONG)
                await client.head()
                await client.read_until(b"one")
            there.stack.server.stop()
            for client in clients:
                assert b'"code":"stream_interrupted"' in await client.rest()
            assert there.stack.outcomes() == []
            release.set()
            for outcome in await there.over(3):
                assert isinstance(outcome, RequestFinished)
                assert outcome.usage is not None
                assert outcome.usage.estimated
                assert outcome.usage.input > 8000
            for client in clients:
                client.close()


@pytest.mark.parametrize(("script", "last"), [(breaks, b'"code":"stream_interrupted"'), (ends, b"data: [DONE]\n\n")])
async def test_a_stream_ends_before_it_is_counted(script: object, last: bytes) -> None:
    async with scene(script) as there:  # type: ignore[arg-type]
        with counting_held_up(there) as release:
            started = time.monotonic()
            client = await there.client()
            client.ask(stream=True, messages=LONG)
            await client.head()
            assert last in await client.rest()
            assert there.stack.outcomes() == []
            answered = time.monotonic()
            await asyncio.sleep(0.05)
            release.set()
            (outcome,) = await there.over()
            assert isinstance(outcome, RequestFinished)
            assert outcome.usage is not None
            assert outcome.usage.output == 1
            assert outcome.duration < answered - started
            client.close()


class Damaged(Counter):
    """As on an installation whose rank files are damaged."""

    async def measure(self, *args: object) -> Measured:
        raise VocabularyError("damaged")


async def test_what_goes_wrong_in_the_books_is_logged_and_harms_no_answer() -> None:
    async with scene(ends) as there:
        there.stack.running.gateway.service.pipeline.budget.counter = Damaged()
        client = await there.client()
        client.ask(stream=True)
        assert (await client.head())[0] == 200
        assert (await client.rest()).endswith(b"data: [DONE]\n\n")
        (outcome,) = await there.over()
        assert (outcome.status, isinstance(outcome, RequestFinished)) == (200, True)
        (fault,) = [event for event in there.stack.events if isinstance(event, InternalFault)]
        assert fault.request_id == outcome.request_id
        client.close()


async def test_who_leaves_is_counted_as_well() -> None:
    async with scene(begins) as there:
        with counting_held_up(there) as release:
            client = await there.client()
            client.ask(stream=True, messages=LONG)
            await client.head()
            await client.read_until(b"one")
            client.reset()
            await asyncio.sleep(0)
            release.set()
            (outcome,) = await there.over()
            assert isinstance(outcome, RequestFinished)
            assert (outcome.status, outcome.usage is not None) == (499, True)


async def test_a_process_that_ends_before_the_books_are_done_says_so_to_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with scene(ends) as there:
        with counting_held_up(there):
            client = await there.client()
            client.ask(stream=True, messages=LONG)
            await client.head()
            assert (await client.rest()).endswith(b"data: [DONE]\n\n")
            there.stack.running.gateway.service.pipeline.budget.counter._executor.shutdown(
                wait=False, cancel_futures=True
            )  # type: ignore[union-attr]
            (outcome,) = await there.over()
            assert isinstance(outcome, RequestFinished)
            assert (outcome.status, outcome.usage) == (200, None)
            client.close()
    assert caplog.records == []


@pytest.mark.parametrize(
    ("line", "route", "model"),
    [
        ("POST /v1/chat/completions", "/v1/chat/completions", "other"),  # without a body
        ("GET /embeddings/", "/v1/embeddings", "other"),
        ("POST /v1/models", "/v1/models", "other"),
        ("GET /v1/models/none", "/v1/models/{id}", "other"),
        ("TRACE /v1/files", "unmatched", "other"),
        ("GET /v1/files", "passthrough", "other"),
    ],
)
async def test_every_end_is_counted_at_its_route(line: str, route: str, model: str) -> None:
    async with scene(breaks) as there:
        client = await there.client()
        client.send(f"{line} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        await client.head()
        (outcome,) = await there.over()
        assert (outcome.route, outcome.model) == (route, model)
        client.close()


async def test_nobody_without_a_key_gets_a_body_read() -> None:
    key = "bw-tenant-key-0123456789"
    config = {
        "providers": {"up": {"kind": "mock"}},
        "tenants": [{"name": "t", "keys": [key]}],
        "listen": {"drain_ms": 0},
    }
    body = b'{"model":"x","messages":[{"role":"user","content":"%b"}]}' % (b"a" * 2_000_000)
    lines = (b"host: localhost", b"authorization: Bearer %b", b"content-length: %d")
    head = b"\r\n".join([b"POST /v1/chat/completions HTTP/1.1", *lines, b"", b""])
    async with stack(config) as running:
        client = Client(*await asyncio.open_connection("127.0.0.1", running.port))
        client.send(head % (b"wrong", len(body)))
        assert (await client.answer())[0] == 401
        client.send(body)  # as a client does that writes before it reads: nobody takes it for another request
        client.send(head % (key.encode(), len(body)) + body)
        assert (await client.answer())[0] == 200
        client.close()
        await running.quiet(20)
        assert [outcome.bytes_in for outcome in running.outcomes()] == [0, len(body)]


PATHS = [
    ("/v1/audio/x", 200, b"/v1/audio/x"),
    ("/audio/x", 200, b"/v1/audio/x"),
    ("/%761/audio/x", 200, b"/v1/audio/x"),
    ("/v%31/%61udio/x%20y", 200, b"/v1/%61udio/x%20y"),
    ("/v1%2Faudio/files", 400, None),  # without its first segment it would be a path that was never allowed
    ("/v1%2faudio", 400, None),
    ("/v1%2Faudio/x/y", 400, None),
    ("/v1/files", 404, None),
    ("/v1/audio%2Fx", 400, None),
    ("/v1%2Fmodels", 200, None),
]


@pytest.mark.parametrize(("path", "status", "forwarded"), PATHS, ids=[path for path, _, _ in PATHS])
async def test_what_is_forwarded_is_the_path_that_was_allowed(path: str, status: int, forwarded: bytes | None) -> None:
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(plain(b'{"data":[]}'))

    key = "bw-tenant-key-0123456789"
    async with serve(script) as upstream:
        config = {
            "providers": {"up": {"kind": "openai", "base_url": f"http://127.0.0.1:{upstream.port}/v1"}},
            "tenants": [{"name": "t", "keys": [key], "passthrough": ["/v1/audio/*"]}],
            "listen": {"drain_ms": 0, "grace_ms": 100},
        }
        async with stack(config) as running:
            client = Client(*await asyncio.open_connection("127.0.0.1", running.port))
            client.send(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n\r\n".encode())
            assert (await client.answer())[0] == status
            client.close()
            await running.quiet(20)
        targets = [received.head.split(b" ")[1] for received in upstream.requests]
        assert targets == ([forwarded] if forwarded else [b"/v1/models"] if path.endswith("models") else [])
