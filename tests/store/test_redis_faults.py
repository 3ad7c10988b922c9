"""What goes wrong between us and Redis, and what must not follow from it: nothing twice, nothing lost, nobody waits."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis

from proxy.budget.amounts import Amounts
from proxy.store.base import Cold, Entry, Granted, Refused, Remembered, Scope, Settled, StoreUnavailable, Tally
from proxy.store.redis import RedisStore
from tests.conformance.stores import ask, namespace, opened, reservation_id, settle, tenant
from tests.redis_server import RedisServer, free_port, running
from tests.store.faults import LONG_MS, TcpProxy, open_store, row_of

pytestmark = pytest.mark.anyio

BOOKED = (Entry(("acme", "", "m", "p", "", "true"), Tally(requests=1, nano_usd=3), ("id", "1")),)


@pytest.fixture
def own_server(redis_binary: Path, tmp_path: Path):
    """A server that a test may stop, fill or empty."""
    with running(tmp_path) as server:
        yield server


@contextlib.asynccontextmanager
async def through_proxy(
    server: RedisServer, scope: Scope, timeout_ms: int = LONG_MS
) -> AsyncIterator[tuple[TcpProxy, RedisStore]]:
    """A store behind a proxy; the server knows the scripts, so that the next reply is the one of a verb."""
    async with (
        TcpProxy(server.port).running() as proxy,
        open_store(f"redis://127.0.0.1:{proxy.port}", scope, timeout_ms=timeout_ms) as store,
    ):
        await store.reserve(ask(0, scope, requests=0))
        await store.settle(settle(0, scope, requests=0))
        yield proxy, store


async def unavailable(call: object) -> StoreUnavailable:
    with pytest.raises(StoreUnavailable) as caught:
        await call  # type: ignore[misc]
    return caught.value


# -- lost replies ----------------------------------------------------------------------------------------------------


async def test_a_reply_lost_after_the_script_ran_does_not_reserve_twice(redis_server: RedisServer) -> None:
    scope = tenant(tokens_per_minute=100)
    async with through_proxy(redis_server, scope) as (proxy, store):
        proxy.swallow_replies = proxy.reset = True
        granted = await store.reserve(ask(1, scope, tokens=70))
        assert proxy.swallowed.is_set()
        assert isinstance(granted, Granted)
        assert granted.balances[0].row.held_tokens == 70


async def test_a_reply_lost_after_the_script_ran_does_not_settle_twice(redis_server: RedisServer) -> None:
    scope = tenant()
    async with through_proxy(redis_server, scope) as (proxy, store):
        await store.reserve(ask(1, scope, nano_usd=9))
        proxy.swallow_replies = proxy.reset = True
        settled = await store.settle(settle(1, scope, nano_usd=3, entries=BOOKED))
        assert isinstance(settled, Settled)
        assert settled.outcome == "already"
        assert settled.balances[0].row.day_nano_usd == 3
        (usage,) = await store.usage(0, time.time_ns() // 1_000_000 + 3_600_000, ())
        assert usage.usage.nano_usd == 3
        assert len(await store.outbox("", 10)) == 1


async def test_a_reply_that_never_comes_is_uncertain_and_can_be_undone(redis_server: RedisServer) -> None:
    scope = tenant()
    async with through_proxy(redis_server, scope, timeout_ms=100) as (proxy, store):
        proxy.swallow_replies = True
        error = await unavailable(store.reserve(ask(1, scope, tokens=70)))
        assert (error.reason, error.uncertain) == ("timeout", True)
        proxy.swallow_replies = False
        settled = await store.settle(settle(1, scope, requests=0))
        assert isinstance(settled, Settled)
        assert settled.outcome == "settled", "it had been reserved"
        row = settled.balances[0].row
        assert (row.held_tokens, row.live, row.minute_tokens) == (0, 0, 0)


async def test_a_broken_connection_is_tried_once_more_and_not_again(redis_server: RedisServer) -> None:
    scope = tenant()
    async with through_proxy(redis_server, scope) as (proxy, store):
        before = proxy.connections
        call = asyncio.ensure_future(store.reserve(ask(1, scope)))
        for _ in range(2):
            proxy.swallow_replies, proxy.reset = True, True
            await proxy.swallowed.wait()
            proxy.swallowed.clear()
        error = await unavailable(call)
        assert (error.reason, error.uncertain) == ("closed", True)
        assert proxy.connections == before + 1


# -- a server that hangs, is gone, or comes back ---------------------------------------------------------------------


async def test_a_server_that_hangs_costs_one_timeout_and_then_nothing(own_server: RedisServer) -> None:
    scope = tenant()
    heard: list[tuple[bool, str | None]] = []
    async with open_store(own_server.url, scope, timeout_ms=50, listener=lambda *said: heard.append(said)) as store:
        own_server.signal(signal.SIGSTOP)
        waits = []
        try:
            for number in range(5):
                began = time.perf_counter()
                error = await unavailable(store.reserve(ask(number, scope)))
                waits.append(time.perf_counter() - began)
                assert error.reason in ("timeout", "connect")
            began = time.perf_counter()
            for number in range(1000):
                assert (await unavailable(store.reserve(ask(number, scope)))).reason == "open"
            while_open = (time.perf_counter() - began) / 1000
        finally:
            own_server.signal(signal.SIGCONT)
        assert sorted(waits)[2] < 0.1, waits
        assert while_open < 0.001
        assert heard == [(False, "timeout")] or heard == [(False, "connect")]
        async with asyncio.timeout(20):
            while len(heard) == 1:
                await asyncio.gather(store.balance([scope]), asyncio.sleep(0.02), return_exceptions=True)
        assert heard[1:] == [(True, None)]
        assert isinstance(await store.reserve(ask(2000, scope)), Granted)


async def test_a_loop_that_was_held_up_itself_does_not_blame_the_server(own_server: RedisServer) -> None:
    scope = tenant()
    async with open_store(own_server.url, scope, timeout_ms=100) as store:
        await store.reserve(ask(0, scope))
        for number in range(1, 4):
            call = asyncio.ensure_future(store.reserve(ask(number, scope)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            time.sleep(0.3)  # the answer arrives meanwhile, and lies in the socket when the timer is due
            assert isinstance(await call, Granted)


async def test_a_slow_script_of_somebody_else_delays_but_does_not_break(own_server: RedisServer) -> None:
    scope = tenant()
    async with open_store(own_server.url, scope) as store:
        own_server.client().execute_command("CLIENT", "PAUSE", 200, "ALL")
        assert isinstance(await store.reserve(ask(1, scope)), Granted)


async def test_a_server_that_is_not_there_is_said_at_once(redis_binary: Path) -> None:
    scope = tenant()
    async with open_store(f"redis://127.0.0.1:{free_port()}") as store:
        for _ in range(5):
            error = await unavailable(store.reserve(ask(1, scope)))
            assert (error.reason, error.uncertain) == ("connect", False)
        assert (await unavailable(store.reserve(ask(1, scope)))).reason == "open"


async def test_a_host_that_swallows_everything_costs_one_timeout() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with open_store(f"redis://:secret@127.0.0.1:{port}", timeout_ms=50) as store:
        began = time.perf_counter()
        error = await unavailable(store.balance([tenant()]))
        assert time.perf_counter() - began < 0.5
        assert error.reason == "connect"
    server.close()


async def test_after_an_empty_restart_windows_are_seeded_and_settlements_applied(
    tmp_path: Path, redis_binary: Path
) -> None:
    scope = tenant(nano_usd_per_day=1000)
    port = free_port()
    with running(tmp_path, port=port) as server:
        async with open_store(server.url, scope) as store:
            await store.reserve(ask(1, scope, nano_usd=500))
            await store.reserve(ask(2, scope, nano_usd=300))
            settled = await store.settle(settle(1, scope, nano_usd=400))
            assert isinstance(settled, Settled)
            row, epoch = settled.balances[0].row, settled.epoch
            server.stop()
            with running(tmp_path, port=port):
                seen = Remembered(
                    scope, (row.hour, row.day, row.month), (row.hour_nano_usd, row.day_nano_usd, row.month_nano_usd)
                )
                assert await store.settle(settle(2, scope, nano_usd=300)) == Cold()
                seeded = await store.seed([seen], 0)
                assert seeded.first
                late = await store.settle(settle(2, scope, nano_usd=300))
                assert isinstance(late, Settled)
                assert late.outcome == "unknown"
                assert late.balances[0].row.day_nano_usd == 700
                assert late.epoch != epoch
                assert isinstance(await store.reserve(ask(3, scope, nano_usd=301)), Refused)


async def test_flushall_is_not_nothing_spent(own_server: RedisServer) -> None:
    scope = tenant()
    async with open_store(own_server.url, scope) as store:
        await store.reserve(ask(1, scope))
        own_server.client().flushall()
        assert await store.reserve(ask(2, scope)) == Cold()
        assert await store.extend([reservation_id(1)], 1000) == Cold()


async def test_a_deleted_scope_is_cold_and_the_others_are_not(redis_server: RedisServer) -> None:
    one, two = tenant("one"), tenant("two")
    name = namespace()
    async with open_store(redis_server.url, one, two, namespace=name) as store:
        await store.reserve(ask(1, one, two, tokens=5))
        assert redis_server.client().delete(f"{{bw:{name}}}s:tenant:3:one") == 1
        assert await store.reserve(ask(2, one, two)) == Cold((one,))
        assert await store.settle(settle(1, one, two, tokens=5)) == Cold((one,))
        assert (await row_of(store, two)).held_tokens == 5
        await opened(store, one)
        settled = await store.settle(settle(1, one, two, tokens=5))
        assert isinstance(settled, Settled)
        rows = [each.row for each in settled.balances]
        assert [row.minute_tokens for row in rows] == [5, 5]
        assert [(row.live, row.held_tokens) for row in rows] == [(0, 0)] * 2, (
            "what it never held, it does not give back"
        )


async def test_windows_that_began_anew_take_part_in_a_reservation_from_its_next_raise_on(
    redis_server: RedisServer,
) -> None:
    scope, name = tenant(tokens_per_minute=100), namespace()
    client = redis_server.client()
    async with open_store(redis_server.url, scope, namespace=name) as store:
        await store.reserve(ask(1, scope, tokens=50))
        await store.reserve(ask(2, scope, tokens=10, lease_ms=1))
        client.delete(f"{{bw:{name}}}s:tenant:4:acme")
        await opened(store, scope)
        assert isinstance(await store.top_up(reservation_id(1), Amounts(1, 60, 0), (scope,)), Granted)
        row = await row_of(store, scope)
        assert (row.live, row.held_tokens, row.minute_tokens) == (1, 60, 10)
        await store.settle(settle(1, scope, tokens=60))
        await store.settle(settle(2, scope, tokens=10))
        row = await row_of(store, scope)
        assert (row.live, row.held_tokens, row.minute_tokens) == (0, 0, 70)


async def test_a_deleted_set_of_leases_is_restored_by_extend(redis_server: RedisServer) -> None:
    scope, name = tenant(), namespace()
    async with open_store(redis_server.url, scope, namespace=name) as store:
        await store.reserve(ask(1, scope))
        leases = f"{{bw:{name}}}leases"
        assert redis_server.client().delete(leases) == 1
        assert await store.extend([reservation_id(1), reservation_id(2)], 30_000) == (reservation_id(2),)
        assert redis_server.client().zcard(leases) == 1


# -- memory, scripts, keys of another kind ---------------------------------------------------------------------------


async def test_when_memory_is_full_nothing_is_reserved_but_everything_settles(own_server: RedisServer) -> None:
    scope = tenant()
    client = own_server.client()
    async with open_store(own_server.url, scope) as store:
        for number in range(8):
            await store.reserve(ask(number, scope, tokens=10))
        client.config_set("maxmemory", "1")
        for number in range(8, 20):
            error = await unavailable(store.reserve(ask(number, scope)))
            assert (error.reason, error.uncertain) == ("full", False)
        assert (await unavailable(store.top_up(reservation_id(1), Amounts(1, 99, 0), (scope,)))).reason == "full"
        assert await store.extend([reservation_id(0)], 60_000) == ()
        for number in range(8):
            settled = await store.settle(settle(number, scope, tokens=4, nano_usd=3, entries=BOOKED))
            assert isinstance(settled, Settled)
            assert settled.outcome == "settled"
        row = settled.balances[0].row
        assert (row.live, row.held_tokens, row.minute_tokens) == (0, 0, 32)
        assert len(await store.outbox("", 100)) == 8
        client.config_set("maxmemory", "0")
        assert isinstance(await store.reserve(ask(30, scope)), Granted)


async def test_scripts_that_the_server_forgets_are_sent_again(redis_server: RedisServer) -> None:
    scope = tenant()
    client = redis_server.client()
    async with open_store(redis_server.url, scope) as store:
        for number in range(20):
            client.script_flush()
            calls = [store.reserve(ask(10 * number + each, scope)) for each in range(5)]
            assert all(isinstance(verdict, Granted) for verdict in await asyncio.gather(*calls))
            client.script_flush()
            calls = [store.settle(settle(10 * number + each, scope)) for each in range(5)]
            assert {each.outcome for each in await asyncio.gather(*calls)} == {"settled"}
        assert (await row_of(store, scope)).minute_requests == 100


async def test_a_user_without_the_script_commands_can_be_served(own_server: RedisServer) -> None:
    scope = tenant()
    client = own_server.client()
    client.execute_command("ACL", "SETUSER", "gateway", "on", ">pass word", "~*", "&*", "+@all", "-script", "-config")
    async with open_store(own_server.url.replace("//", "//gateway:pass%20word@"), scope) as store:
        assert isinstance(await store.reserve(ask(1, scope)), Granted)


@pytest.mark.parametrize("user", ["default:wrong-secret", ":wrong-secret", "nobody:wrong-secret"])
async def test_a_wrong_password_is_refused_and_never_quoted(own_server: RedisServer, user: str) -> None:
    own_server.client().config_set("requirepass", "right")
    async with open_store(own_server.url.replace("//", f"//{user}@")) as store:
        error = await unavailable(store.balance([tenant()]))
    assert error.reason == "refused"
    assert "wrong-secret" not in f"{error!r} {error} {error.__cause__!r} {error.__context__!r}"


async def test_a_replica_is_not_written_to(own_server: RedisServer) -> None:
    scope = tenant()
    async with open_store(own_server.url, scope) as store:
        await store.reserve(ask(1, scope))
        own_server.client().execute_command("REPLICAOF", "127.0.0.1", free_port())
        error = await unavailable(store.settle(settle(1, scope)))
        assert error.reason == "refused"
        own_server.client().execute_command("REPLICAOF", "NO", "ONE")
        settled = await store.settle(settle(1, scope))
        assert isinstance(settled, Settled)
        assert settled.outcome == "settled"


async def test_a_key_of_another_kind_stops_its_own_tenant_only(redis_server: RedisServer) -> None:
    broken, sound = tenant("broken"), tenant("sound")
    name = namespace()
    client = redis_server.client()
    async with open_store(redis_server.url, broken, sound, namespace=name) as store:
        await store.reserve(ask(1, broken, sound, tokens=7, lease_ms=1))
        key = f"{{bw:{name}}}s:tenant:6:broken"
        client.delete(key)
        client.rpush(key, "something else")
        for number in range(10):
            error = await unavailable(store.reserve(ask(10 + number, broken)))
            assert (error.reason, error.uncertain) == ("corrupt", False)
        row = await row_of(store, sound)
        assert (row.live, row.minute_tokens) == (0, 7), "the lost reservation was booked where that was possible"
        assert isinstance(await store.reserve(ask(2, sound)), Granted)
        assert client.type(key) == b"list"


@pytest.mark.parametrize("key", ["outbox", "r:" + reservation_id(1), "u:HOUR:4:acme", "leases", "epoch"])
async def test_a_script_finds_a_wrong_key_before_it_writes_anything(redis_server: RedisServer, key: str) -> None:
    scope, name = tenant(), namespace()
    client = redis_server.client()
    async with open_store(redis_server.url, scope, namespace=name) as store:
        await store.reserve(ask(1, scope, tokens=7))
        place = f"{{bw:{name}}}{key}".replace("HOUR", str(int(client.time()[0]) // 3600))
        before = client.get(f"{{bw:{name}}}s:tenant:4:acme")
        client.delete(place)
        client.rpush(place, "something else")
        error = await unavailable(store.settle(settle(1, scope, tokens=3, entries=BOOKED)))
        assert (error.reason, error.uncertain) == ("corrupt", False)
        after = client.get(f"{{bw:{name}}}s:tenant:4:acme")
        assert before is not None
        assert after == before
        assert client.type(place) == b"list"


async def test_windows_of_another_layout_are_not_guessed_at(redis_server: RedisServer) -> None:
    scope, name = tenant(), namespace()
    client = redis_server.client()
    async with open_store(redis_server.url, scope, namespace=name) as store:
        key = f"{{bw:{name}}}s:tenant:4:acme"
        whole = client.get(key)
        assert whole is not None
        for other in (b"of another time", whole[:-8], whole + whole[:8], struct.pack("<d", 2) + whole[8:]):
            client.set(key, other)
            assert (await unavailable(store.reserve(ask(1, scope)))).reason == "corrupt"
            assert client.get(key) == other


async def test_no_key_of_ours_lacks_the_tag_or_lives_for_ever(redis_server: RedisServer) -> None:
    scope, name = tenant("a}{b"), namespace()
    client = redis_server.client()
    async with open_store(redis_server.url, scope, namespace=name) as store:
        await store.reserve(ask(1, scope))
        await store.reserve(ask(2, scope))
        await store.settle(settle(1, scope, entries=BOOKED))
        keys = [key for key in client.scan_iter("*") if name.encode() in key]
        assert all(key.startswith(f"{{bw:{name}}}".encode()) for key in keys)
        lasting = {key.decode().partition("}")[2] for key in keys if client.ttl(key) == -1}
        assert lasting == {"epoch", "leases", "outbox", "r:" + reservation_id(2)}


# -- many at once ----------------------------------------------------------------------------------------------------


async def test_the_calls_of_one_turn_of_the_loop_leave_in_one_piece(redis_server: RedisServer) -> None:
    scope = tenant()
    async with through_proxy(redis_server, scope) as (proxy, store):
        await asyncio.gather(*(store.reserve(ask(number, scope)) for number in range(40)))
        before = proxy.pieces
        await asyncio.gather(*(store.settle(settle(number, scope)) for number in range(40)))
        assert proxy.pieces == before + 1


async def test_two_stores_on_one_server_share_one_budget(redis_server: RedisServer) -> None:
    scope, name = tenant(tokens_per_minute=1000), namespace()
    async with (
        open_store(redis_server.url, scope, namespace=name) as one,
        open_store(redis_server.url, namespace=name) as two,
        open_store(redis_server.url, scope) as elsewhere,
    ):
        calls = [(one, two)[number % 2].reserve(ask(number, scope, tokens=10)) for number in range(300)]
        verdicts = await asyncio.gather(*calls)
        assert sum(isinstance(verdict, Granted) for verdict in verdicts) == 100
        assert (await row_of(two, scope)).held_tokens == 1000
        assert (await row_of(elsewhere, scope)).held_tokens == 0


async def test_a_call_that_is_refused_before_it_is_sent_leaves_the_others_alone(redis_server: RedisServer) -> None:
    scope = tenant()
    async with open_store(redis_server.url, scope) as store:
        bad = Entry(("\ud800", *[""] * 5), Tally())
        results = await asyncio.gather(
            store.reserve(ask(1, scope)), store.settle(settle(2, scope, entries=(bad,))), return_exceptions=True
        )
        assert isinstance(results[0], Granted)
        assert isinstance(results[1], ValueError)


async def test_a_closed_store_answers_everybody(redis_server: RedisServer) -> None:
    scope = tenant()
    async with through_proxy(redis_server, scope) as (proxy, store):
        proxy.swallow_replies = True
        waiting = asyncio.ensure_future(store.reserve(ask(1, scope)))
        await proxy.swallowed.wait()
        await store.aclose()
        error = await unavailable(waiting)
        assert (error.reason, error.uncertain) == ("stopped", True)
        assert (await unavailable(store.reserve(ask(1, scope)))).reason == "stopped"


def test_the_server_of_the_tests_is_real_and_its_client_another(redis_server: RedisServer) -> None:
    assert isinstance(redis_server.client(), redis.Redis)
    assert redis_server.client().config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
