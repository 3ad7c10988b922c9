"""The store of summaries: the same answers in memory, in a real Redis, and in memory in front of a real Redis."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

import pytest

from proxy.store.base import StoreUnavailable
from proxy.store.redis import RedisStore
from proxy.store.summaries import KEPT_SECONDS, MOST_BYTES, SummaryStore
from proxy.store.summaries_memory import ENTRY_BYTES, MemorySummaries, NearSummaries
from tests.conformance.stores import namespace
from tests.redis_server import RedisServer
from tests.store.faults import TcpProxy, open_store

pytestmark = pytest.mark.anyio

Open = Callable[[], Any]
TEXTS = ("a", "Größe ✓\n\0\r\n", "x" * MOST_BYTES, "*1\r\n$4\r\nPING\r\n", "𝔞" * 100, " ")


def key(number: int | str) -> bytes:
    return sha256(str(number).encode()).digest()


@asynccontextmanager
async def in_memory() -> AsyncIterator[SummaryStore]:
    yield MemorySummaries()


@pytest.fixture(params=["memory", "redis", "near"])
def opening(request: pytest.FixtureRequest) -> Open:
    if request.param == "memory":
        return in_memory
    server: RedisServer = request.getfixturevalue("redis_server")

    @asynccontextmanager
    async def in_redis() -> AsyncIterator[SummaryStore]:
        async with open_store(server.url) as store:
            shared = store.summaries()
            yield shared if request.param == "redis" else NearSummaries(MemorySummaries(), shared)

    return in_redis


async def test_the_first_text_stays(opening: Open) -> None:
    async with opening() as one:
        assert await one.find([key(1)]) is None
        assert await one.keep(key(1), "first") == "first"
        assert await one.keep(key(1), "second") == "first"
        assert await one.find([key(1)]) == (0, "first")
        assert await one.find([key(2)]) is None


async def test_the_first_key_that_has_one_is_found(opening: Open) -> None:
    async with opening() as one:
        assert await one.find([]) is None
        for number in (3, 5):
            await one.keep(key(number), f"text {number}")
        asked = [key(number) for number in range(8)]
        assert await one.find(asked) == (3, "text 3")
        assert await one.find(asked[::-1]) == (2, "text 5")
        assert await one.find(asked[:3]) is None
        assert await one.find([key(5), key(3)]) == (0, "text 5")


async def test_a_text_comes_back_as_it_was(opening: Open) -> None:
    async with opening() as one:
        for number, text in enumerate(TEXTS):
            assert await one.keep(key(number), text) == text
        for number, text in enumerate(TEXTS):
            assert await one.find([key(number)]) == (0, text)


async def test_what_cannot_be_kept_is_refused(opening: Open) -> None:
    async with opening() as one:
        for text in ("", "x" * (MOST_BYTES + 1), "é" * (MOST_BYTES // 2 + 1), "\ud800"):
            with pytest.raises(ValueError):
                await one.keep(key(1), text)
        for odd in (b"", b"x", b"x" * 33):
            with pytest.raises(ValueError):
                await one.keep(odd, "text")
            with pytest.raises(ValueError):
                await one.find([odd])
        assert await one.find([key(1)]) is None


async def test_of_many_at_once_one_is_first(opening: Open) -> None:
    async with opening() as one:
        texts = await asyncio.gather(*(one.keep(key(1), f"text {number}") for number in range(50)))
        assert len(set(texts)) == 1
        assert await one.find([key(1)]) == (0, texts[0])


# --- Redis ----------------------------------------------------------------------------------------------------------


async def test_processes_see_one_text(redis_server: RedisServer) -> None:
    name = namespace()
    async with open_store(redis_server.url, namespace=name) as one, open_store(redis_server.url, namespace=name) as two:
        first, second = one.summaries(), NearSummaries(MemorySummaries(), two.summaries())
        assert await first.keep(key(1), "of one") == "of one"
        assert await second.keep(key(1), "of two") == "of one"
        assert await second.find([key(1)]) == (0, "of one")


async def test_keys_share_the_tag_and_end(redis_server: RedisServer) -> None:
    name = namespace()
    async with open_store(redis_server.url, namespace=name) as store:
        await store.summaries().keep(key(1), "text")
        client = redis_server.client()
        (found,) = client.scan_iter(f"*{name}*")
        assert found == b"{bw:" + name.encode() + b"}sum:" + key(1).hex().encode()
        assert KEPT_SECONDS - 60 < client.ttl(found) <= KEPT_SECONDS
        client.expire(found, 60)
        await store.summaries().keep(key(1), "another")
        assert client.ttl(found) <= 60


async def test_namespaces_share_no_summary(redis_server: RedisServer) -> None:
    async with open_store(redis_server.url) as one, open_store(redis_server.url) as other:
        await one.summaries().keep(key(1), "text")
        assert await other.summaries().find([key(1)]) is None


@pytest.mark.parametrize("spoilt", [b"", b"\xff\xfe", b"x" * (MOST_BYTES + 1), None], ids=lambda one: repr(one)[:12])
async def test_what_is_no_summary_is_none(redis_server: RedisServer, spoilt: bytes | None) -> None:
    name = namespace()
    async with open_store(redis_server.url, namespace=name) as store:
        one = store.summaries()
        await one.keep(key(1), "text")
        await one.keep(key(2), "earlier")
        client = redis_server.client()
        where = b"{bw:" + name.encode() + b"}sum:" + key(1).hex().encode()
        client.delete(where)
        if spoilt is None:
            client.rpush(where, b"x")
        else:
            client.set(where, spoilt)
        assert await one.find([key(1)]) is None
        assert await one.find([key(1), key(2)]) == (1, "earlier")
        with pytest.raises(StoreUnavailable) as raised:
            await one.keep(key(1), "text")
        assert raised.value.reason == "corrupt"
        near = NearSummaries(MemorySummaries(), one)
        assert await near.keep(key(1), "text") == "text"
        assert await near.find([key(1)]) == (0, "text")


async def test_a_server_that_is_away_is_said_to_be() -> None:
    store = RedisStore("redis://127.0.0.1:1/0", timeout_ms=200)
    try:
        for asked in (store.summaries().find([key(1)]), store.summaries().keep(key(1), "text")):
            with pytest.raises(StoreUnavailable):
                await asked
    finally:
        await store.aclose()


async def test_a_server_that_hangs_costs_its_own_time_limit(redis_server: RedisServer) -> None:
    proxy = TcpProxy(redis_server.port)
    async with proxy.running():
        store = RedisStore(f"redis://127.0.0.1:{proxy.port}/0", namespace=namespace(), timeout_ms=300)
        try:
            one = store.summaries()
            await one.keep(key(1), "text")
            proxy.swallow_replies = True
            for asked in (one.find([key(1)]), one.keep(key(2), "text")):
                async with asyncio.timeout(5):
                    with pytest.raises(StoreUnavailable):
                        await asked
        finally:
            await store.aclose()


# --- memory in front ------------------------------------------------------------------------------------------------


class Away:
    """A shared store that can be taken away, and counts what it is asked."""

    def __init__(self) -> None:
        self.kept = MemorySummaries()
        self.away = False
        self.asked = 0
        self.gate: asyncio.Event | None = None

    async def find(self, keys: Any) -> tuple[int, str] | None:
        await self._ask()
        return await self.kept.find(keys)

    async def keep(self, one: bytes, text: str) -> str:
        await self._ask()
        return await self.kept.keep(one, text)

    async def _ask(self) -> None:
        self.asked += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.away:
            raise StoreUnavailable("timeout")


async def test_what_was_read_once_is_read_here() -> None:
    far = Away()
    await far.kept.keep(key(1), "text")
    one = NearSummaries(MemorySummaries(), far)
    assert await one.find([key(0), key(1)]) == (1, "text")
    assert await one.find([key(1)]) == (0, "text")
    assert far.asked == 1
    await far.kept.keep(key(0), "newer")
    assert await one.find([key(0), key(1)]) == (0, "newer")  # what is wanted more may be there by now
    assert far.asked == 2


async def test_while_the_shared_store_is_away_the_session_goes_on() -> None:
    far = Away()
    one = NearSummaries(MemorySummaries(), far)
    far.away = True
    with pytest.raises(StoreUnavailable):
        await one.find([key(1)])
    assert await one.keep(key(1), "mine") == "mine"
    assert await one.find([key(0), key(1)]) == (1, "mine")
    far.away = False
    await far.kept.keep(key(1), "theirs")
    assert await one.find([key(1)]) == (0, "mine")


async def test_a_text_whose_keeper_left_is_kept_here() -> None:
    far = Away()
    far.gate = asyncio.Event()
    one = NearSummaries(MemorySummaries(), far)
    keeping = asyncio.create_task(one.keep(key(1), "paid for"))
    while not far.asked:
        await asyncio.sleep(0)
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping
    far.gate = None
    assert await one.find([key(1)]) == (0, "paid for")


# --- memory ---------------------------------------------------------------------------------------------------------


class Seconds:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_day() -> None:
    clock = Seconds()
    one = MemorySummaries(clock=clock)
    await one.keep(key(1), "text")
    clock.now = KEPT_SECONDS - 1
    assert await one.find([key(1)]) == (0, "text")
    clock.now += 1
    assert await one.find([key(1)]) is None
    assert len(one) == one.size == 0
    assert await one.keep(key(1), "another") == "another"


async def test_the_least_recently_used_go_first() -> None:
    size = ENTRY_BYTES + 10
    one = MemorySummaries(most=10 * size)
    for number in range(10):
        await one.keep(key(number), "0123456789")
    assert one.size == 10 * size
    assert await one.find([key(0)]) is not None
    assert await one.keep(key(1), "x") == "0123456789"  # as good as read
    for number in range(10, 18):
        await one.keep(key(number), "0123456789")
    assert len(one) == 10
    assert await one.find([key(number) for number in range(2, 10)]) is None
    assert await one.find([key(0)]) is not None
    assert await one.find([key(1)]) is not None
    await one.keep(key(99), "x" * (5 * size))
    assert one.size <= 10 * size
    assert await one.find([key(99)]) is not None


async def test_memory_is_bounded() -> None:
    most = 4 * 1024 * 1024
    one = MemorySummaries(most=most)

    async def fill(first: int, length: int) -> int:
        for number in range(first, first + 2 * most // (length + ENTRY_BYTES)):
            await one.keep(key(number), str(number).ljust(length))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        for round_, length in enumerate((MOST_BYTES, 8, 4000)):
            assert await fill(round_ * 100_000, length) < 1.1 * most
    finally:
        tracemalloc.stop()
