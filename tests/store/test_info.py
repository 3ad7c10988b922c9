"""What a server says of itself, and whether it will do."""

from __future__ import annotations

import pytest

from proxy.store.info import server_of
from tests.conformance.stores import reservation_id
from tests.redis_server import RedisServer
from tests.store.faults import open_store

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize(
    ("info", "said", "wrong"),
    [
        (b"redis_version:7.0.15\r\nmaxmemory_policy:noeviction\r\n", ("7.0.15", "noeviction"), ()),
        (b"redis_version:6.2.0\r\nmaxmemory_policy:noeviction\r\n", ("6.2.0", "noeviction"), ()),
        (b"redis_version:10.0\nmaxmemory_policy:noeviction\n", ("10.0", "noeviction"), ()),
        (b"redis_version:6.0.16\r\n", ("6.0.16", ""), ("version",)),
        (b"maxmemory_policy:allkeys-lru\r\n", ("", "allkeys-lru"), ("eviction",)),
        (
            b"redis_version:5.0.7\nmaxmemory_policy:volatile-ttl\n",
            ("5.0.7", "volatile-ttl"),
            ("version", "eviction"),
        ),
        (b"# Server\r\nother:1\r\n", ("", ""), ()),
        (b"redis_version:{evil}\r\nmaxmemory_policy:\x1b[31m\r\n", ("", ""), ()),
    ],
)
def test_what_it_says(info: bytes, said: tuple[str, str], wrong: tuple[str, ...]) -> None:
    server = server_of(info)
    assert (server.version, server.eviction) == said
    assert server.shortcomings == wrong


async def test_a_real_server_is_read(redis_server: RedisServer) -> None:
    async with open_store(redis_server.url) as store:
        server = await store.server()
        assert server is not None
        assert server.eviction == "noeviction"
        assert server.shortcomings == ()


async def test_one_that_may_not_be_asked_is_not_an_error(redis_server: RedisServer) -> None:
    client = redis_server.client()
    client.execute_command("ACL", "SETUSER", "narrow", "on", ">pw", "~*", "+@all", "-info", "-config")
    try:
        async with open_store(f"redis://narrow:pw@127.0.0.1:{redis_server.port}/0") as store:
            assert await store.server() is None
            assert (await store.beat(reservation_id(1), 1000)).processes == 1
    finally:
        client.execute_command("ACL", "DELUSER", "narrow")
