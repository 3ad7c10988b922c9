"""The transport without a network keeps the transport port's promises."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from proxy.errors import ConnectFailed, UpstreamBroken, UpstreamTimeout
from proxy.providers.mock.handler import Mock
from proxy.transport.answer import NEVER, Answer, End, Outcome, Serving
from proxy.transport.base import Origin, Request, Response, Transport
from proxy.transport.scripted import ScriptedTransport
from proxy.types import Headers

REQUEST = Request(Origin("http", "mock", 80), b"POST", b"/v1/x?y=1", [(b"a", b"b")], b"body")
SOON, LATER = 0.02, 30.0


class Books:
    """Answers every request alike and notes how each serving ended."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[tuple[bytes, bytes, Headers, bytes]] = []
        self.closed: list[tuple[int, Outcome]] = []

    def handle(self, method: bytes, target: bytes, headers: Headers, body: bytes) -> Serving:
        self.asked.append((method, target, headers, body))
        return Serving(self.answer, b"id-1", self)

    def close(self, steps: int, outcome: Outcome) -> None:
        self.closed.append((steps, outcome))


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def with_clean_up() -> None:
        await test()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(with_clean_up())


def now() -> float:
    return asyncio.get_running_loop().time()


async def read_all(response: Response) -> list[bytes]:
    out = []
    while data := await response.read(now() + LATER):
        out.append(data)
    assert await response.read(now() + LATER) == b""
    return out


def test_an_answer_comes_whole_and_in_its_pieces() -> None:
    async def test() -> None:
        books = Books(Answer(201, [(b"x", b"1"), (b"x", b"2")], ((0.0, b"one"), (0.01, b"two"), (0.0, b"three"))))
        transport: Transport = ScriptedTransport(books)
        response = await transport.send(REQUEST, now() + LATER)
        assert response.status == 201
        assert response.headers == [
            (b"x", b"1"),
            (b"x", b"2"),
            (b"x-request-id", b"id-1"),
            (b"transfer-encoding", b"chunked"),
        ]
        assert await read_all(response) == [b"one", b"two", b"three"]
        for _ in range(3):
            await response.aclose()
        assert books.closed == [(3, Outcome.FINISHED)]
        assert books.asked == [(b"POST", b"/v1/x?y=1", [(b"a", b"b")], b"body")]

    run(test)


def test_a_known_length_is_told_and_a_head_request_has_no_body() -> None:
    async def test() -> None:
        books = Books(Answer(200, [], ((0.0, b"12345"),), length=5))
        transport = ScriptedTransport(books)
        head = Request(REQUEST.origin, b"HEAD", b"/", [])
        response = await transport.send(head, now() + LATER)
        assert (b"content-length", b"5") in response.headers
        assert await read_all(response) == []
        assert books.closed == [(0, Outcome.FINISHED)]

    run(test)


@pytest.mark.parametrize(("end", "reason"), [(End.RESET, "reset"), (End.CLOSE, "closed")])
def test_a_body_that_breaks_off(end: End, reason: str) -> None:
    async def test() -> None:
        books = Books(Answer(200, [], ((0.0, b"half"),), end=end, length=8))
        response = await ScriptedTransport(books).send(REQUEST, now() + LATER)
        assert await response.read(now() + LATER) == b"half"
        for _ in range(2):
            with pytest.raises(UpstreamBroken) as broken:
                await response.read(now() + LATER)
            assert broken.value.reason == reason
        await response.aclose()
        assert books.closed == [(1, Outcome.CUT)]

    run(test)


def test_a_complete_body_is_complete_whatever_happens_to_the_connection_after_it() -> None:
    async def test() -> None:
        books = Books(Answer(200, [], ((0.0, b"whole"),), end=End.RESET, length=5))
        assert await read_all(await ScriptedTransport(books).send(REQUEST, now() + LATER)) == [b"whole"]
        assert books.closed == [(1, Outcome.FINISHED)]

    run(test)


def test_no_head_at_all() -> None:
    async def test() -> None:
        reset = Books(Answer(200, [], end=End.RESET, delay=NEVER))
        with pytest.raises(UpstreamBroken) as broken:
            await ScriptedTransport(reset).send(REQUEST, now() + LATER)
        assert broken.value.reason == "reset"
        assert reset.closed == [(0, Outcome.CUT)]
        stalled = Books(Answer(200, [], end=End.STALL, delay=NEVER))
        with pytest.raises(UpstreamTimeout):
            await ScriptedTransport(stalled).send(REQUEST, now() + SOON)
        assert stalled.closed == [(0, Outcome.GONE)]

    run(test)


def test_a_head_that_comes_too_late() -> None:
    async def test() -> None:
        books = Books(Answer(200, [], delay=LATER))
        begun = now()
        with pytest.raises(UpstreamTimeout):
            await ScriptedTransport(books).send(REQUEST, begun + SOON)
        assert begun + SOON <= now() < begun + LATER
        assert books.closed == [(0, Outcome.GONE)]

    run(test)


@pytest.mark.parametrize("steps", [((0.0, b"first"), (LATER, b"late")), ((0.0, b"first"),)])
def test_a_piece_that_does_not_come_in_time(steps: Any) -> None:
    async def test() -> None:
        books = Books(Answer(200, [], steps, end=End.STALL))
        response = await ScriptedTransport(books).send(REQUEST, now() + LATER)
        assert await response.read(now() + LATER) == b"first"
        deadline = now() + SOON
        with pytest.raises(UpstreamTimeout):
            await response.read(deadline)
        assert now() >= deadline
        with pytest.raises(UpstreamBroken):  # after a timeout the connection is gone
            await response.read(now() + LATER)
        await response.aclose()
        assert books.closed == [(1, Outcome.GONE)]

    run(test)


def test_pieces_fall_due_on_their_own_schedule() -> None:
    async def test() -> None:
        books = Books(Answer(200, [], ((0.05, b"a"), (0.05, b"b"), (0.05, b"c"))))
        response = await ScriptedTransport(books).send(REQUEST, now() + LATER)
        await asyncio.sleep(0.2)
        for expected in (b"a", b"b", b"c"):  # all due by now: a deadline in the past finds them
            assert await response.read(now() + 0.0) == expected

    run(test)


@pytest.mark.parametrize("phase", ["head", "body"])
def test_a_cancelled_caller_leaves_nothing_behind(phase: str) -> None:
    async def test() -> None:
        delay = LATER if phase == "head" else 0.0
        books = Books(Answer(200, [], ((0.0, b"first"), (LATER, b"never"))[:2], delay=delay))
        transport = ScriptedTransport(books)
        under_way = asyncio.Event()

        async def call() -> None:
            under_way.set()
            response = await transport.send(REQUEST, math.inf)
            try:
                while await response.read(math.inf):
                    pass
            finally:
                await response.aclose()

        task = asyncio.create_task(call())
        await under_way.wait()
        while phase == "body" and not transport._lines:
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not transport._lines
        assert books.closed == [(0 if phase == "head" else 1, Outcome.GONE)]

    run(test)


@pytest.mark.parametrize("delay", [0.0, LATER, NEVER])
def test_closing_the_transport_wakes_whoever_waits(delay: float) -> None:
    async def test() -> None:
        books = Books(Answer(200, [], (), end=End.STALL, delay=delay))
        transport = ScriptedTransport(books)

        async def call() -> None:
            response = await transport.send(REQUEST, math.inf)
            await response.read(math.inf)

        task = asyncio.create_task(call())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
        await transport.aclose()
        await transport.aclose()
        with pytest.raises(UpstreamBroken) as broken:
            await asyncio.wait_for(task, 10)
        assert broken.value.reason == "closed"
        assert books.closed == [(0, Outcome.GONE)]
        with pytest.raises(ConnectFailed):
            await transport.send(REQUEST, now() + LATER)
        assert len(books.asked) == 1

    run(test)


def test_an_answer_without_a_head_is_not_complete() -> None:
    with pytest.raises(ValueError, match="cannot be complete"):
        Answer(200, [], delay=NEVER)


def test_many_requests_at_once_keep_their_own_answers_while_some_are_cancelled() -> None:
    async def test() -> None:
        mock = Mock(lambda text: len(text.split()))
        transport = ScriptedTransport(mock)

        async def call(i: int) -> None:
            said = b"marker-%d " % i * 120
            body = b'{"model":"echo","stream":true,"messages":[{"role":"user","content":"%b"}]}' % said
            request = Request(REQUEST.origin, b"POST", b"/v1/chat/completions", [], body)
            response = await transport.send(request, math.inf)
            try:
                pieces = await read_all(response)
                assert sum(b"marker-%d" % i in piece for piece in pieces) == 120
            finally:
                await response.aclose()

        tasks = [asyncio.create_task(call(i)) for i in range(150)]
        for task in tasks[::3]:
            await asyncio.sleep(0)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::3])
        assert results[1::3] + results[2::3] == [None] * 100
        books = mock.ledger.read()["totals"]
        assert (books["in_flight"], books["finished"]) == (0, 100)
        assert books["requests"] == books["finished"] + books["client_gone"]
        assert not transport._lines

    run(test)
