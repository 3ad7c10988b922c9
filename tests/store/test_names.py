"""No name makes the key of another: hostile names in a real Redis, and in memory, never touch each other's figures."""

from __future__ import annotations

import itertools
from secrets import token_hex

import anyio
import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from proxy.budget.amounts import Amounts, Limits
from proxy.store.base import (
    DIMENSIONS,
    Cold,
    Entry,
    Granted,
    Remembered,
    Reservation,
    Scope,
    ScopeKind,
    Settled,
    Settlement,
    Tally,
)
from proxy.store.redis import RedisStore
from tests.redis_server import RedisServer

pytestmark = pytest.mark.anyio

HOSTILE = (
    "", ":", "1:a", "a", "{", "}", "{bw:0}", "{bw:0}s:tenant:1:a", "a\nb", "a\r\n", "\0", "é", "e\u0301", "a:1:b",
    "10:" + "x" * 10, "tenant:1:a", "1", "01", "*", "a*", "a b", "\u202e", "𝔞", "other", "r:" + "0" * 32,
)  # fmt: skip
kinds = st.sampled_from(["tenant", "key", "provider"])
names = st.sampled_from(HOSTILE) | st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(":{}0123456789/\n\r\0"), max_size=12
)
pairs = st.lists(st.tuples(kinds, names), min_size=2, max_size=6, unique=True)


@given(pairs)
def test_two_names_never_have_one_place(found: list[tuple[ScopeKind, str]]) -> None:
    places = [Scope(kind, name).place for kind, name in found]
    assert len(set(places)) == len(places)
    for one, other in itertools.permutations(places, 2):
        assert one.encode() != other.encode()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs)
@example([("tenant", "a"), ("tenant", "1:a"), ("key", "a"), ("tenant", "{bw:0}s:tenant:1:a"), ("tenant", "a\nb")])
def test_what_one_spends_no_other_has_spent(redis_server: RedisServer, found: list[tuple[ScopeKind, str]]) -> None:
    anyio.run(_spend, redis_server, found)


async def _spend(server: RedisServer, found: list[tuple[ScopeKind, str]]) -> None:
    namespace = f"names-{token_hex(6)}"
    store = RedisStore(server.url, namespace=namespace, timeout_ms=2000)
    try:
        scopes = [Scope(kind, name, Limits(requests_per_minute=1000)) for kind, name in found]
        await store.seed([Remembered(scope) for scope in scopes], 0)
        for number, scope in enumerate(scopes, 1):
            known = token_hex(16)
            granted = await store.reserve(Reservation(known, (scope,), Amounts(1, number, number)))
            assert isinstance(granted, Granted)
            dimensions = (scope.name, *(scope.kind for _ in DIMENSIONS[1:]))
            entry = Entry(dimensions, Tally(1, input=number), ("tenant", scope.name))
            settled = await store.settle(Settlement(known, (scope,), Amounts(1, number, number), (), (entry,)))
            assert isinstance(settled, Settled)
        balances = await store.balance(scopes)
        assert not isinstance(balances, Cold)
        assert [one.row.minute_tokens for one in balances] == list(range(1, len(scopes) + 1))
        assert [one.row.minute_requests for one in balances] == [1] * len(scopes)
        rows = await store.usage(0, 2**53 - 1, ["tenant", "key"])
        told = {row.dimensions: row.usage.input for row in rows}
        assert told == {(scope.name, scope.kind): number for number, scope in enumerate(scopes, 1)}
        _within(server.client(), namespace)
    finally:
        await store.aclose()


def _within(client: redis.Redis, namespace: str) -> None:
    """Every key stands under the namespace's own tag, and no other tag begins in front of it."""
    tag = b"{bw:%s}" % namespace.encode()
    keys = [key for key in client.scan_iter(count=1000) if namespace.encode() in key]
    assert keys
    assert all(key.startswith(tag) for key in keys)
    client.close()
