"""Floods, and callers that leave: the loop stays free, and so do the threads."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import pytest

from proxy.tokens.count import Counter
from proxy.tokens.vocabularies import SHARED, Vocabularies, Vocabulary

O200K = "o200k_base"
BOB = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "hi", "name": "bob"}]

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def fields(**members: Any) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(json.dumps(value).encode()) for name, value in members.items()}


async def beside(work: Callable[[], Awaitable[T]]) -> tuple[T, int, float, float]:
    """Result, turns of the loop meanwhile, the longest of them, and the time of all (seconds)."""
    done = asyncio.ensure_future(work())
    turns, longest, started = 0, 0.0, time.perf_counter()
    while not done.done():
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - before)
        turns += 1
    return await done, turns, longest, time.perf_counter() - started


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_100_000, "\u200b" * 500_000], ids=["a", "blanks", "zw"])
def test_a_flood_leaves_the_loop_free(text: str) -> None:
    """Held back only while a slice's result is made into objects, never for a good part of the count."""

    async def scenario() -> None:
        counter = Counter()
        await counter.count_text("load", O200K)
        body = fields(messages=[{"role": "user", "content": text + "!"}])
        for work in (lambda: counter.count_text(text, O200K), lambda: counter.count_prompt("chat", body, O200K)):
            tokens, turns, longest, total = await beside(work)
            assert tokens > 5_000
            assert turns >= 5
            assert longest < max(total / 2, 0.2)

    run(scenario())


def test_a_million_messages_leave_the_loop_free() -> None:
    messages = msgspec.Raw(b"[" + b",".join([b'{"role":"user","content":"a"}'] * 600_000) + b"]")

    async def scenario() -> None:
        counter = Counter()
        await counter.count_text("load", O200K)
        tokens, turns, _, _ = await beside(lambda: counter.count_prompt("chat", {"messages": messages}, O200K))
        assert tokens == pytest.approx(600_000 * 5, rel=0.001)
        assert counter.encode_calls < 40_000
        assert turns >= 5

    run(scenario())


class Fields(dict[str, msgspec.Raw]):
    """Remembers which thread took a member out."""

    reader = ""

    def get(self, name: str, default: Any = None) -> Any:
        self.reader = threading.current_thread().name
        return super().get(name, default)


@pytest.mark.parametrize(("turns", "reader"), [(10, "MainThread"), (20_000, "counter_0")])
def test_long_bodies_are_taken_apart_in_the_thread(turns: int, reader: str) -> None:
    body = Fields(fields(messages=BOB[1:] * turns))
    with ThreadPoolExecutor(1, thread_name_prefix="counter") as executor:
        assert run(Counter(executor=executor).count_prompt("chat", body, O200K)) == pytest.approx(
            7 * turns + 3, rel=0.001
        )
    assert body.reader == reader


def test_small_counts_never_leave_the_loop() -> None:
    async def scenario() -> None:
        with ThreadPoolExecutor(1) as executor:
            counter = Counter(executor=executor)
            await counter.count_text("load", O200K)
            blocked = asyncio.Event()
            asyncio.get_running_loop().call_soon(blocked.set)
            await counter.count_text("hello " * 2000, O200K)
            await counter.count_messages(BOB, O200K)
            await counter.count_prompt("chat", fields(messages=BOB), O200K)
            assert not blocked.is_set()  # not one of them waited

    run(scenario())


class Watched(Vocabularies):
    """The real vocabulary, and a call before each slice."""

    def __init__(self, before_slice: Callable[[], None]) -> None:
        super().__init__()
        real = SHARED.load(O200K)

        def encode(text: str) -> list[int]:
            before_slice()
            return real.ids(text)

        self.vocabulary = Vocabulary("watched", b"w", encode)

    async def get(self, encoding: str) -> Vocabulary:
        return self.vocabulary


def test_whoever_leaves_stops_the_thread_at_the_next_slice() -> None:
    text = "word " * 200_000
    slices: list[int] = []
    third, go = threading.Event(), threading.Event()

    def before_slice() -> None:
        slices.append(len(slices))
        if len(slices) == 3:
            third.set()
            assert go.wait(30)

    async def scenario() -> None:
        with ThreadPoolExecutor(1) as executor:
            counter = Counter(executor=executor, vocabularies=Watched(before_slice))
            body = fields(messages=[{"role": "user", "content": text}])
            running = asyncio.create_task(counter.count_prompt("chat", body, O200K))
            while not third.is_set():
                await asyncio.sleep(0.001)
            queued = asyncio.create_task(counter.count_text(text, O200K))
            await asyncio.sleep(0)
            for leaving in (queued, running):
                leaving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await leaving
            go.set()
            executor.submit(int).result(30)  # the only thread is free again
            assert len(slices) == 3
            assert counter.encode_calls == 0
            # Nothing half-counted was remembered.
            expected = 3 + 3 + 1 + len(SHARED.load(O200K).ids(text))
            assert await counter.count_prompt("chat", body, O200K) == expected

    run(scenario())
