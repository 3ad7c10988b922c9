"""Whose a stored object is, in memory and in a real Redis: the same answers, and keys that no id can choose."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.store.base import StoreUnavailable
from proxy.store.ownership import KEPT_MS, Owner, Ownership
from proxy.store.ownership_memory import MemoryOwnership
from proxy.store.redis import RedisStore
from tests.conformance.stores import Clock, namespace
from tests.redis_server import RedisServer
from tests.store.faults import open_store

pytestmark = pytest.mark.anyio

ACME = Owner("acme", "openai", "gpt-5", "ours")
BETA = Owner("beta", "openai", "gpt-5", "ours")
ODD_IDS = (
    "resp_1",
    "}o:",
    "s:6:global",
    "epoch",
    "a" * 512,
    "Grüße ✓",
    "\ud800",
    " ",
    "x\r\nSET y z\r\n",
    "\x00",
    "{bw:0}epoch",
)

Open = Callable[[], Any]


@asynccontextmanager
async def in_memory() -> AsyncIterator[Ownership]:
    yield MemoryOwnership()


@pytest.fixture(params=["memory", "redis"])
def opening(request: pytest.FixtureRequest) -> Open:
    if request.param == "memory":
        return in_memory
    server: RedisServer = request.getfixturevalue("redis_server")

    @asynccontextmanager
    async def in_redis() -> AsyncIterator[Ownership]:
        async with open_store(server.url) as store:
            yield store.ownership()

    return in_redis


async def test_the_first_claim_wins(opening: Open) -> None:
    async with opening() as one:
        assert await one.owner("resp_1") is None
        assert await one.claim("resp_1", ACME) == ACME
        assert await one.claim("resp_1", BETA) == ACME
        assert await one.owner("resp_1") == ACME
        moved = Owner("acme", "elsewhere")
        assert await one.claim("resp_1", moved) == moved  # its own tenant may say where it lives now
        assert await one.owner("resp_1") == moved
        assert await one.owner("resp_2") is None


async def test_any_id_is_an_id_of_its_own(opening: Open) -> None:
    async with opening() as one:
        for number, object_id in enumerate(ODD_IDS):
            assert await one.owner(object_id) is None
            assert await one.claim(object_id, Owner("acme", str(number))) == Owner("acme", str(number))
        for number, object_id in enumerate(ODD_IDS):
            assert await one.owner(object_id) == Owner("acme", str(number))


@pytest.mark.parametrize("name", ["acm", "acme ", 'acme","openai', 'acme","', "ACME", "acmé", "", '"', "\\"])
async def test_no_name_passes_for_another(opening: Open, name: str) -> None:
    async with opening() as one:
        await one.claim("resp_1", ACME)
        assert await one.claim("resp_1", Owner(name, "openai")) == ACME
        await one.claim("resp_2", Owner(name, "openai"))
        assert await one.claim("resp_2", ACME) == Owner(name, "openai")


# --- Redis ----------------------------------------------------------------------------------------------------------


async def test_keys_share_the_tag_hold_no_id_and_end(redis_server: RedisServer) -> None:
    name = namespace()
    async with open_store(redis_server.url, namespace=name) as store:
        for object_id in ODD_IDS:
            await store.ownership().claim(object_id, ACME)
    client = redis_server.client()
    keys = list(client.scan_iter(f"*{name}*"))
    assert len(keys) == len(ODD_IDS)
    for key in keys:
        head, _, digest = key.partition(b"}o:")
        assert head == b"{bw:" + name.encode()
        assert len(digest) == 64
        assert not digest.strip(b"0123456789abcdef")
        assert KEPT_MS - 60_000 < client.pttl(key) <= KEPT_MS


async def test_a_claim_that_is_repeated_is_kept_anew(redis_server: RedisServer) -> None:
    name = namespace()
    async with open_store(redis_server.url, namespace=name) as store:
        await store.ownership().claim("resp_1", ACME)
        client = redis_server.client()
        (key,) = client.scan_iter(f"*{name}*")
        client.pexpire(key, 60_000)
        await store.ownership().claim("resp_1", BETA)
        assert client.pttl(key) <= 60_000  # not by another tenant's
        await store.ownership().claim("resp_1", ACME)
        assert client.pttl(key) > KEPT_MS - 60_000


async def test_namespaces_share_no_owner(redis_server: RedisServer) -> None:
    async with open_store(redis_server.url) as one, open_store(redis_server.url) as other:
        await one.ownership().claim("resp_1", ACME)
        assert await other.ownership().owner("resp_1") is None


@pytest.mark.parametrize("spoilt", [b"no json", b"[]", b"{}", b"[1,2]", None], ids=str)
async def test_a_key_that_holds_something_else_is_nobody_s_claim(
    redis_server: RedisServer, spoilt: bytes | None
) -> None:
    name = namespace()
    async with open_store(redis_server.url, namespace=name) as store:
        one = store.ownership()
        await one.claim("resp_1", ACME)
        client = redis_server.client()
        (key,) = client.scan_iter(f"*{name}*")
        client.delete(key)
        if spoilt is None:
            client.rpush(key, b"x")
        else:
            client.set(key, spoilt)
        for asked in (one.owner("resp_1"), one.claim("resp_1", ACME)):
            with pytest.raises(StoreUnavailable) as raised:
                await asked
            assert raised.value.reason == "corrupt"
        assert await one.claim("resp_2", ACME) == ACME  # the way to the server is none the worse for it


async def test_a_server_that_is_away_is_said_to_be(redis_server: RedisServer) -> None:
    store = RedisStore("redis://127.0.0.1:1/0", timeout_ms=200)
    try:
        for asked in (store.ownership().owner("resp_1"), store.ownership().claim("resp_1", ACME)):
            with pytest.raises(StoreUnavailable):
                await asked
    finally:
        await store.aclose()


# --- memory ---------------------------------------------------------------------------------------------------------


async def test_thirty_days() -> None:
    clock = Clock()
    one = MemoryOwnership(clock=clock)
    await one.claim("resp_1", ACME)
    clock.now += KEPT_MS - 1
    assert await one.owner("resp_1") == ACME
    await one.claim("resp_1", ACME)
    clock.now += KEPT_MS - 1
    assert await one.owner("resp_1") == ACME
    clock.now += 1
    assert await one.owner("resp_1") is None
    assert len(one) == 0
    await one.claim("resp_1", BETA)
    assert await one.owner("resp_1") == BETA


async def test_a_tenant_that_makes_many_forgets_its_own() -> None:
    one = MemoryOwnership(most=100)
    for number in range(10):
        await one.claim(f"acme-{number}", ACME)
    for number in range(1000):
        await one.claim(f"beta-{number}", BETA)
    assert len(one) == 100
    for number in range(10):
        assert await one.owner(f"acme-{number}") == ACME
    assert await one.owner("beta-999") == BETA
    assert await one.owner("beta-909") is None
    await one.claim("beta-910", BETA)  # claimed again, it is the newest
    for number in range(50):
        await one.claim(f"beta-more-{number}", BETA)
    assert await one.owner("beta-910") == BETA
    assert len(one) == 100


async def test_memory_is_bounded() -> None:
    one = MemoryOwnership(most=1000)

    async def fill(first: int) -> int:
        for number in range(first, first + 3000):
            await one.claim(f"{number:0500d}", ACME)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = await fill(0)
        assert await fill(3000) < before + 100_000
        assert before < 1_000_000
    finally:
        tracemalloc.stop()
