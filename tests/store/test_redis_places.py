"""Where Redis lives: behind TLS, behind sentinels, in a cluster whose slot moves while we use it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import trustme

from proxy.store.base import Cold, Granted, Settled, StoreUnavailable
from proxy.store.dial import SLOTS, slot_of
from tests.conformance.stores import ask, opened, reservation_id, settle, tenant
from tests.redis_server import RedisServer, Sentinel, running
from tests.store.faults import TcpProxy, open_store, row_of

pytestmark = pytest.mark.anyio

NAMESPACE = "places"
SLOT = slot_of(b"bw:places")


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.mark.parametrize(
    ("name", "options", "works"),
    [
        ("127.0.0.1", "ssl_ca_certs={ca}", True),
        ("127.0.0.1", "ssl_cert_reqs=none", True),
        ("elsewhere.example", "ssl_ca_certs={ca}&ssl_check_hostname=false", True),
        ("elsewhere.example", "ssl_ca_certs={ca}", False),
        ("127.0.0.1", "ssl_check_hostname=false", False),
    ],
)
async def test_tls_is_spoken_and_certificates_are_looked_at(
    redis_server: RedisServer, authority: trustme.CA, tmp_path: Path, name: str, options: str, works: bool
) -> None:
    """The server of the tests speaks no TLS, so the proxy in front of it does."""
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    scope = tenant()
    async with (
        TcpProxy(redis_server.port, server_context(authority, name)).running() as proxy,
        open_store(f"rediss://127.0.0.1:{proxy.port}/0?{options.format(ca=ca)}") as store,
    ):
        if works:
            await opened(store, scope)
            assert isinstance(await store.reserve(ask(1, scope)), Granted)
        else:
            with pytest.raises(StoreUnavailable) as caught:
                await store.seed([])
            assert caught.value.reason == "connect"


# -- databases -------------------------------------------------------------------------------------------------------


async def test_the_path_of_the_url_chooses_the_database(redis_server: RedisServer) -> None:
    scope = tenant()
    async with open_store(redis_server.url.replace("/0", "/3"), scope, namespace="third"):
        assert redis.Redis(port=redis_server.port, db=3).exists("{bw:third}epoch")
        assert not redis_server.client().exists("{bw:third}epoch")
    async with open_store(redis_server.url.replace("/0", "/9999")) as store:
        with pytest.raises(StoreUnavailable) as caught:
            await store.balance([scope])
        assert caught.value.reason == "refused"


# -- sentinels -------------------------------------------------------------------------------------------------------


async def test_the_master_is_whom_the_sentinels_name_and_another_after_it_is_gone(
    redis_binary: Path, tmp_path: Path
) -> None:
    scope = tenant()
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(running(tmp_path)) for _ in range(2))
        sentinel = Sentinel(tmp_path, first.port)
        stack.callback(sentinel.stop)
        sentinel.start()
        told = sentinel.client()
        # The first of the sentinels is not there at all.
        url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/mymaster/2"
        async with open_store(url, scope, namespace=NAMESPACE) as store:
            assert isinstance(await store.reserve(ask(1, scope)), Granted)
            assert redis.Redis(port=first.port, db=2).exists("{bw:places}epoch")
            told.execute_command("SENTINEL", "REMOVE", "mymaster")
            told.execute_command("SENTINEL", "MONITOR", "mymaster", "127.0.0.1", second.port, 1)
            first.stop()
            assert await store.balance([scope]) == Cold(), "found, and it knows nothing yet"
            await opened(store, scope)
            settled = await store.settle(settle(1, scope, tokens=5))
            assert isinstance(settled, Settled)
            assert settled.outcome == "unknown"
            # A master that became a replica is left at the first answer, and found again when it is one no more.
            second.client().execute_command("REPLICAOF", "127.0.0.1", 1)
            with pytest.raises(StoreUnavailable) as caught:
                await store.settle(settle(2, scope))
            assert caught.value.reason == "refused"
            async with open_store(url, namespace=NAMESPACE) as another:
                with pytest.raises(StoreUnavailable) as caught:
                    await another.balance([scope])
                assert caught.value.reason == "refused", "what a replica says may be old"
            second.client().execute_command("REPLICAOF", "NO", "ONE")
            assert isinstance(await store.settle(settle(2, scope)), Settled)


async def test_a_master_that_no_sentinel_knows_is_refused(redis_binary: Path, tmp_path: Path) -> None:
    with running(tmp_path) as server:
        sentinel = Sentinel(tmp_path, server.port)
        try:
            sentinel.start()
            async with open_store(f"redis+sentinel://127.0.0.1:{sentinel.port}/another") as store:
                with pytest.raises(StoreUnavailable) as caught:
                    await store.balance([tenant()])
                assert caught.value.reason == "refused"
        finally:
            sentinel.stop()


# -- cluster ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(redis_binary: Path, tmp_path: Path) -> Iterator[tuple[RedisServer, RedisServer]]:
    """Two members; the first owns our slot."""
    with contextlib.ExitStack() as stack:
        members = []
        for number in range(2):
            folder = tmp_path / str(number)
            folder.mkdir()
            options = ("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf")
            options += ("--cluster-require-full-coverage", "no")
            members.append(stack.enter_context(running(folder, *options)))
        first, second = (member.client() for member in members)
        assert SLOT >= 100
        first.execute_command("CLUSTER", "ADDSLOTS", *range(100, SLOTS))
        second.execute_command("CLUSTER", "ADDSLOTS", *range(100))
        first.execute_command("CLUSTER", "MEET", "127.0.0.1", members[1].port)
        for client in (first, second):
            wait_for_cluster(client)
        yield members[0], members[1]


def wait_for_cluster(client: redis.Redis) -> None:
    """Members tell one another by gossip; the only way to know that they did is to ask again."""
    for _ in range(1500):
        info = client.execute_command("CLUSTER", "INFO")
        text = info.decode() if isinstance(info, bytes) else "\n".join(f"{k}:{v}" for k, v in info.items())
        if "cluster_state:ok" in text and "cluster_known_nodes:2" in text:
            return
        time.sleep(0.02)
    raise AssertionError("the cluster did not form")


def identity(server: RedisServer) -> str:
    return server.client().execute_command("CLUSTER", "MYID").decode()


@pytest.mark.slow
async def test_a_cluster_is_followed_wherever_our_slot_goes(cluster: tuple[RedisServer, RedisServer]) -> None:
    old, new = cluster
    scope = tenant(tokens_per_minute=1000)
    url = f"redis+cluster://127.0.0.1:1,127.0.0.1:{new.port}"  # a member that is gone, and one that does not own it
    async with (
        open_store(url, scope, namespace=NAMESPACE) as store,
        open_store(f"redis+cluster://127.0.0.1:{old.port}", namespace=NAMESPACE) as quiet,
    ):
        for number in range(20):
            assert isinstance(await store.reserve(ask(number, scope, tokens=10)), Granted)
        assert isinstance(await quiet.balance([scope]), tuple)
        new.client().execute_command("CLUSTER", "SETSLOT", SLOT, "IMPORTING", identity(old))
        old.client().execute_command("CLUSTER", "SETSLOT", SLOT, "MIGRATING", identity(new))
        keys = old.client().execute_command("CLUSTER", "GETKEYSINSLOT", SLOT, 1000)
        assert len(keys) == 23
        moved = [key for key in keys if not key.endswith(reservation_id(3).encode())]
        old.client().execute_command("MIGRATE", "127.0.0.1", new.port, "", 0, 5000, "KEYS", *moved)
        for call in (store.reserve(ask(30, scope)), store.settle(settle(3, scope)), store.balance([scope])):
            with pytest.raises(StoreUnavailable) as caught:
                await call
            assert (caught.value.reason, caught.value.uncertain) == ("moving", False)
        rest = set(keys) - set(moved)
        old.client().execute_command("MIGRATE", "127.0.0.1", new.port, "", 0, 5000, "KEYS", *rest)
        for member in (new, old):
            member.client().execute_command("CLUSTER", "SETSLOT", SLOT, "NODE", identity(new))
        verdicts = await asyncio.gather(*(store.settle(settle(number, scope, tokens=5)) for number in range(20)))
        assert {each.outcome for each in verdicts if isinstance(each, Settled)} == {"settled"}
        row = await row_of(store, scope)
        assert (row.live, row.held_tokens, row.minute_tokens) == (0, 0, 100)
        assert old.client().info("errorstats")["errorstat_MOVED"]["count"] <= 20, "one turn's worth, and no more"
        # Whoever slept through all this finds the old owner gone, and asks the member that it once heard of.
        old.stop()
        found = await quiet.balance([scope])
        assert isinstance(found, tuple)
        assert found[0].row.minute_tokens == 100
