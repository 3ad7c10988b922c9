"""A process that follows the registry of keys: through a Redis that changes, hangs, dies and comes back empty."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.budget.policy import Policies
from proxy.budget.settings import UNWRITTEN
from proxy.edge.auth import KeyedTenants
from proxy.edge.follow import KeyFollower
from proxy.edge.keyring import Keyring
from proxy.errors import InvalidKey, StoreUnavailable
from proxy.observability.events import InternalFault, KeysFollowed, KeysLost, KeysStale, Notice
from proxy.store.redis import RedisStore
from proxy.store.registry import KeyRegistry, NewKey, Snapshot
from proxy.store.registry_redis import RedisRegistry
from proxy.types import Call, Tenant
from tests.e2e.scene import until
from tests.redis_server import RedisServer, redis_binary, running

__all__ = ["redis_binary"]  # a fixture, found here by pytest
pytestmark = pytest.mark.anyio
CONFIGURED = "bw-of-the-configuration-0123"


def key_id(name: str) -> str:
    return f"key_{ord(name):016x}"


class Replica:
    """One process's part in it. Keys are called by one letter, which stands for their secret too."""

    def __init__(self, url: str, look_seconds: float) -> None:
        self.store = RedisStore(url)
        self.keys = self.store.registry()
        self.events: list[Notice] = []
        self.door = KeyedTenants({CONFIGURED: Tenant("acme")}, complete=False)
        ring = Keyring({"acme": Tenant("acme")}, self.door, Policies(UNWRITTEN))
        clock = asyncio.get_running_loop().time
        self.follower = KeyFollower(
            self.registry(),
            ring,
            self.door,
            clock=clock,
            emit=self.events.append,
            look_seconds=look_seconds,
            stale_seconds=0.5,
        )

    def registry(self) -> KeyRegistry:
        return self.keys

    async def make(self, name: str, lives_ms: int | None = None) -> None:
        await self.keys.create(NewKey(key_id(name), hashlib.sha256(name.encode()).digest(), "acme", lives_ms=lives_ms))

    def lets_in(self, secret: str) -> bool:
        headers = [(b"authorization", f"Bearer {secret}".encode())]
        try:
            return self.door.identify(Call("POST", "", b"", b"", headers, b"", "", "", "")).name == "acme"
        except InvalidKey:
            return False

    def said(self, kind: type[Notice]) -> int:
        return sum(isinstance(event, kind) for event in self.events)


@contextlib.asynccontextmanager
async def replica(url: str, look_seconds: float = 0.02, kind: type[Replica] = Replica) -> AsyncIterator[Replica]:
    one = kind(url, look_seconds)
    try:
        await one.follower.start()
        yield one
    finally:
        await one.follower.aclose()
        await one.store.aclose()


@pytest.fixture
def server(redis_binary: Path, tmp_path: Path):
    with running(tmp_path) as one:
        yield one


async def test_what_one_makes_the_other_lets_in(server: RedisServer) -> None:
    async with replica(server.url) as one:
        await one.make("a")
        async with replica(server.url) as other:
            assert other.lets_in("a")  # before anything is served
            await one.make("b")
            await until(lambda: one.lets_in("b") and other.lets_in("b"), "the new key in both")
            await one.keys.revoke(key_id("a"))
            await until(lambda: not (one.lets_in("a") or other.lets_in("a")), "the end of the key in both")
            assert other.lets_in("b")
            assert other.lets_in(CONFIGURED)
            assert one.events == other.events == []


async def test_an_expiry_comes_by_itself_while_the_registry_is_away(server: RedisServer) -> None:
    async with replica(server.url) as one:
        await one.make("a", lives_ms=1500)
        await until(lambda: one.lets_in("a"), "the key")
        server.stop()
        await until(lambda: not one.lets_in("a"), "its end")


async def test_known_keys_go_on_while_the_registry_hangs_and_changes_are_caught_up(server: RedisServer) -> None:
    async with replica(server.url) as one:
        await one.make("a")
        await one.make("b")
        await until(lambda: one.lets_in("b"), "the keys")
        server.signal(signal.SIGSTOP)
        await until(lambda: one.said(KeysStale), "a line about it")
        assert one.lets_in("a")
        assert not one.lets_in("c")
        server.signal(signal.SIGCONT)
        async with replica(server.url) as other:
            await other.keys.revoke(key_id("a"))
            await until(lambda: not one.lets_in("a"), "the revocation")
        await until(lambda: one.said(KeysFollowed), "a line about its end")
        assert one.lets_in("b")
        assert [type(event) for event in one.events] == [KeysStale, KeysFollowed]


async def test_a_registry_that_comes_back_empty_ends_no_key_and_a_new_process_knows_none(server: RedisServer) -> None:
    async with replica(server.url) as one:
        for name in "abc":
            await one.make(name)
        await one.keys.revoke(key_id("c"))
        await until(lambda: one.lets_in("b") and not one.lets_in("c"), "the keys")
        server.stop()
        server.start()
        await until(lambda: one.said(KeysLost), "a line about it")
        assert [event.known for event in one.events if isinstance(event, KeysLost)] == [2]
        assert (one.lets_in("a"), one.lets_in("b"), one.lets_in("c")) == (True, True, False)
        async with replica(server.url) as fresh:
            assert not fresh.lets_in("a")
            await fresh.make("d")
            await until(lambda: one.lets_in("d") and fresh.lets_in("d"), "a key of the new life")
            assert one.lets_in("a")
            assert fresh.events == []
        assert one.said(KeysLost) == 1


async def test_a_revocation_that_the_registry_lost_is_told_to_it_again(server: RedisServer) -> None:
    """As after a failover to a copy that lags behind."""
    async with replica(server.url) as one:
        await one.make("a")
        await until(lambda: one.lets_in("a"), "the key")
        before = server.client().hgetall("{bw:0}keys")
        await one.keys.revoke(key_id("a"))
        await until(lambda: not one.lets_in("a"), "its end")
        server.client().hset("{bw:0}keys", mapping=before)
        async with replica(server.url) as fresh:
            await until(lambda: not fresh.lets_in("a"), "the revocation in a process that never heard of it")
        assert not one.lets_in("a")
        record = (await one.keys.snapshot()).records[key_id("a")]
        assert record.revoked_ms is not None


async def test_before_the_registry_was_reached_an_unknown_key_is_not_called_wrong(
    redis_binary: Path, tmp_path: Path
) -> None:
    server = RedisServer(tmp_path)
    async with replica(server.url) as one:
        assert one.lets_in(CONFIGURED)
        with pytest.raises(StoreUnavailable) as caught:
            one.lets_in("a")
        assert caught.value.headers == [(b"retry-after", b"1")]
        with pytest.raises(InvalidKey):
            one.door.identify(Call("POST", "", b"", b"", [], b"", "", "", ""))
        server.start()
        try:
            await until(lambda: one.door.complete, "the registry")
            assert not one.lets_in("a")
            await one.make("a")
            await until(lambda: one.lets_in("a"), "the key")
        finally:
            server.stop()


class FaultyRegistry(RedisRegistry):
    """Has a fault of ours in it, once."""

    faults = 1

    async def snapshot(self) -> Snapshot:
        self.faults -= 1
        if self.faults >= 0:
            raise RuntimeError("a fault of ours")
        return await super().snapshot()


class Faulty(Replica):
    def registry(self) -> KeyRegistry:
        return FaultyRegistry(self.store._slow, self.store._scripts, self.store._prefix)


async def test_a_fault_of_ours_does_not_end_the_following(server: RedisServer) -> None:
    async with replica(server.url, kind=Faulty) as one:
        assert one.said(InternalFault) == 1
        await one.make("a")
        await until(lambda: one.door.complete and one.lets_in("a"), "the key")


async def test_nothing_is_left_over(server: RedisServer) -> None:
    before = asyncio.all_tasks()
    async with replica(server.url) as one:
        await one.make("a", lives_ms=3_600_000)
        await until(lambda: one.lets_in("a"), "the key")
    assert asyncio.all_tasks() == before
    await one.follower.aclose()  # twice is once
