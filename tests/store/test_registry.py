"""The registry of keys on a real Redis: what its verbs change, what they refuse, and what they leave behind."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.store.base import StoreUnavailable
from proxy.store.redis import RedisStore
from proxy.store.registry import KEPT_MS, MAX_KEYS, MAX_SECRETS, KeyRefused, KeyRegistry, NewKey, is_key_id
from tests.conformance.stores import Clock, namespace
from tests.redis_server import RedisServer, running
from tests.store.faults import LONG_MS, TcpProxy

pytestmark = pytest.mark.anyio

DAY = 86_400_000


def key_id(number: int) -> str:
    return f"key_{number:016x}"


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def new(number: int = 1, **more: object) -> NewKey:
    return NewKey(key_id(number), digest(f"secret {number}"), "acme", **more)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def opened(
    url: str, clock: Clock | None = None, space: str | None = None, most: int = MAX_KEYS
) -> AsyncIterator[KeyRegistry]:
    store = RedisStore(url, namespace=space or namespace(), clock=clock, timeout_ms=LONG_MS)
    try:
        yield store.registry(most)
    finally:
        await store.aclose()


async def refused(call: object) -> str:
    with pytest.raises(KeyRefused) as caught:
        await call  # type: ignore[misc]
    return caught.value.reason


async def test_a_key_is_kept_as_it_was_made(redis_server: RedisServer, clock: Clock) -> None:
    async with opened(redis_server.url, clock) as keys:
        empty = await keys.snapshot()
        assert (empty.stamp.text, empty.stamp.life, empty.records) == ("", "", {})
        wanted = new(models=("gpt-4o*", "ö,\n:"), name='{"}: 1,2\n\x00', budget='{"usd_per_day":"5"}', lives_ms=DAY)
        made = await keys.create(wanted)
        snapshot = await keys.snapshot()
        assert snapshot.records == {made.id: made}
        assert (made.tenant, made.name, made.models, made.budget) == ("acme", wanted.name, wanted.models, wanted.budget)
        assert (made.created_ms, made.expires_ms, made.revoked_ms) == (clock.now, clock.now + DAY, None)
        assert [(secret.digest, secret.until_ms) for secret in made.secrets] == [(wanted.digest, None)]
        assert (made.state(clock.now + DAY - 1), made.state(clock.now + DAY)) == ("live", "expired")
        assert (await keys.snapshot()).records[made.id] is snapshot.records[made.id]


async def test_each_change_gives_another_stamp_in_one_life(redis_server: RedisServer) -> None:
    async with opened(redis_server.url) as keys:
        stamps = [await keys.stamp()]
        for change in (
            lambda: keys.create(new(1)),
            lambda: keys.create(new(2)),
            lambda: keys.rotate(key_id(1), digest("another"), 0),
            lambda: keys.revoke(key_id(1)),
        ):
            await change()
            stamps.append(await keys.stamp())
            assert (await keys.snapshot()).stamp.text == stamps[-1].text
        assert len({stamp.text for stamp in stamps}) == 5
        assert len({stamp.life for stamp in stamps[1:]}) == 1
        assert (await keys.stamp()).text == stamps[-1].text
        assert abs(stamps[-1].now_ms - stamps[0].now_ms) < 60_000


async def test_verbs_may_be_repeated(redis_server: RedisServer) -> None:
    async with opened(redis_server.url) as keys:
        made = await keys.create(new())
        assert await keys.create(new()) == made
        rotated = await keys.rotate(made.id, digest("b"), DAY)
        assert await keys.rotate(made.id, digest("b"), 7) == rotated
        ended, now = await keys.revoke(made.id)
        assert (await keys.revoke(made.id), now) == ((ended, False), True)
        with pytest.raises(StoreUnavailable):  # an id that another secret has taken
            await keys.create(NewKey(made.id, digest("c"), "acme"))


async def test_a_reply_that_is_lost_makes_no_second_key(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port).running() as proxy, opened(f"redis://127.0.0.1:{proxy.port}") as keys:
        await keys.create(new(1))  # from here on the server knows the script
        proxy.swallow_replies = proxy.reset = True
        made = await keys.create(new(2))
        assert proxy.connections == 2
        assert (await keys.snapshot()).records.keys() == {key_id(1), made.id}


async def test_a_rotation_lets_the_secrets_of_before_end_and_never_later_than_they_would(
    redis_server: RedisServer, clock: Clock
) -> None:
    async with opened(redis_server.url, clock) as keys:
        await keys.create(new(1))
        start = clock.now

        async def ends(name: str, overlap_ms: int) -> dict[bytes, int | None]:
            record = await keys.rotate(key_id(1), digest(name), overlap_ms)
            return {secret.digest: secret.until_ms for secret in record.secrets}

        first = digest("secret 1")
        assert await ends("b", DAY) == {digest("b"): None, first: start + DAY}
        clock.now += 1000
        assert await ends("c", 5000) == {digest("c"): None, digest("b"): start + 6000, first: start + 6000}
        clock.now += 1000
        assert await ends("d", DAY) == {
            digest("d"): None,
            digest("c"): start + 2000 + DAY,
            digest("b"): start + 6000,
            first: start + 6000,
        }
        clock.now = start + 6000
        assert (await ends("e", DAY)).keys() == {digest("e"), digest("d"), digest("c")}
        assert (await ends("f", 0)) == {digest("f"): None}


async def test_what_cannot_be_rotated(redis_server: RedisServer, clock: Clock) -> None:
    async with opened(redis_server.url, clock) as keys:
        await keys.create(new(1))
        for number in range(MAX_SECRETS - 1):
            await keys.rotate(key_id(1), digest(f"more {number}"), DAY)
        before = await keys.snapshot()
        assert await refused(keys.rotate(key_id(1), digest("one too many"), DAY)) == "full"
        assert (await keys.snapshot()) == before
        await keys.rotate(key_id(1), digest("all others end"), 0)
        await keys.revoke(key_id(1))
        assert await refused(keys.rotate(key_id(1), digest("x"), DAY)) == "revoked"
        await keys.create(new(2, lives_ms=1000))
        clock.now += 1000
        assert await refused(keys.rotate(key_id(2), digest("x"), DAY)) == "expired"
        assert await refused(keys.rotate(key_id(3), digest("x"), DAY)) == "unknown"


@pytest.mark.parametrize(
    "name", ["", "stamp", "key_", key_id(9), key_id(1).upper(), key_id(1) + "\n", "*", "{x}", "\0"]
)
async def test_what_is_no_id_reaches_no_field(redis_server: RedisServer, clock: Clock, name: str) -> None:
    async with opened(redis_server.url, clock) as keys:
        await keys.create(new(1))
        before = await keys.snapshot()
        assert await refused(keys.revoke(name)) == "unknown"
        assert await refused(keys.rotate(name, digest("x"), 0)) == "unknown"
        assert await keys.snapshot() == before
        assert is_key_id(name) == (name == key_id(9))
        if name != key_id(9):
            with pytest.raises(ValueError):
                await keys.create(NewKey(name, digest("x"), "acme"))


async def test_there_is_an_end_to_keys_and_what_is_long_over_makes_room(
    redis_server: RedisServer, clock: Clock
) -> None:
    async with opened(redis_server.url, clock, most=3) as keys:
        for number in range(1, 4):
            await keys.create(new(number, lives_ms=DAY if number == 2 else None))
        await keys.revoke(key_id(1))
        clock.now += KEPT_MS - 1
        assert await refused(keys.create(new(4))) == "full"
        clock.now += 1
        await keys.create(new(4))
        assert (await keys.snapshot()).records.keys() == {key_id(2), key_id(3), key_id(4)}
        clock.now += DAY
        await keys.create(new(5))
        assert (await keys.snapshot()).records.keys() == {key_id(3), key_id(4), key_id(5)}
        assert await refused(keys.create(new(6))) == "full"


async def test_a_key_can_be_revoked_although_memory_is_full(redis_binary: Path, tmp_path: Path) -> None:
    with running(tmp_path) as server:
        async with opened(server.url) as keys:
            await keys.create(new(1))
            server.client().config_set("maxmemory", "1")
            record, now = await keys.revoke(key_id(1))
            assert now
            assert (await keys.snapshot()).records == {record.id: record}
            assert record.revoked_ms is not None


async def test_namespaces_do_not_see_each_other(redis_server: RedisServer) -> None:
    async with opened(redis_server.url) as one, opened(redis_server.url) as other:
        await one.create(new(1))
        assert (await other.snapshot()).records == {}
        assert await refused(other.revoke(key_id(1))) == "unknown"


async def test_what_cannot_be_read_lets_nobody_in_and_hides_no_other(redis_server: RedisServer) -> None:
    space = namespace()
    async with opened(redis_server.url, space=space) as keys:
        await keys.create(new(1))
        client = redis_server.client()
        place = f"{{bw:{space}}}keys"
        for number, text in enumerate(("", "1 0 0 zz:0\n{}", '1 0 0 aa:0\n{"tenant":1}', "x\ny", b"\xff\n\xff"), 2):
            client.hset(place, key_id(number), text)
        client.hset(place, b"\xff", "1 0 0 aa:0\n{}")
        assert (await keys.snapshot()).records.keys() == {key_id(1)}
        with pytest.raises(StoreUnavailable) as caught:
            await keys.revoke(key_id(5))
        assert caught.value.reason == "corrupt"
        client.set(place, "not a hash")
        with pytest.raises(StoreUnavailable):
            await keys.snapshot()


async def test_all_stands_under_one_tag_and_no_name_is_a_key(redis_server: RedisServer) -> None:
    space = namespace()
    async with opened(redis_server.url, space=space) as keys:
        await keys.create(new(1, name="}keys"))
        found = [name for name in redis_server.client().scan_iter("*") if space.encode() + b"}" in name]
        assert found == [f"{{bw:{space}}}keys".encode()]
        assert set(redis_server.client().hkeys(found[0])) == {b"stamp", key_id(1).encode()}
