"""Which keys open the door, as the registry changes, forgets, and comes back with less. Values in, values out."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest

from proxy.budget.settings import BudgetSettings
from proxy.edge.keyring import Keyring
from proxy.store.registry import KeyRecord, Secret, Snapshot, Stamp
from proxy.types import Tenant

ACME = Tenant("acme", models=("gpt-*",), providers=("p",), passthrough=("/v1/audio/*",))
NOW = 1_800_000_000_000
LIMIT = '{"usd_per_day":"5"}'


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def key(name: str, **more: Any) -> KeyRecord:
    first = KeyRecord(f"key_{name}", "acme", "", None, "", NOW - 1000, None, None, (Secret(digest(name)),))
    return msgspec.structs.replace(first, **more)


class Scene:
    """A ring, and everything it was told to let in or to hold to a budget."""

    def __init__(self) -> None:
        self.open: dict[bytes, Tenant] = {}
        self.budgets: dict[tuple[str, str], BudgetSettings] = {}
        self.changes = 0
        self.ring = Keyring({"acme": ACME}, self, self)
        self.stamps = 0

    def admit(self, digest: bytes, tenant: Tenant) -> None:
        self.open[digest] = tenant

    def dismiss(self, digest: bytes) -> None:
        del self.open[digest]

    def put_key(self, tenant: str, key: str, section: BudgetSettings) -> None:
        assert (tenant, key) not in self.budgets
        self.budgets[tenant, key] = section

    def drop_key(self, tenant: str, key: str) -> None:
        self.budgets.pop((tenant, key), None)

    def take(self, *records: KeyRecord, life: str = "one", now: int = NOW) -> tuple[int | None, tuple[str, ...]]:
        self.stamps += 1
        stamp = Stamp(f"{life} {self.stamps} x" if life else "", now)
        taken = self.ring.take(Snapshot(stamp, {record.id: record for record in records}))
        return taken.lost, taken.again

    @property
    def names(self) -> set[str]:
        """Which of the secrets a, b, c, … are let in."""
        return {name for name in "abcdef" if digest(name) in self.open}


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_keys_come_and_go_with_the_registry(scene: Scene) -> None:
    a, b = key("a"), key("b")
    assert scene.take(a) == (None, ())
    assert scene.open == {digest("a"): Tenant("acme", ("gpt-*",), ("p",), ("/v1/audio/*",), key="key_a")}
    scene.take(a, b)
    assert scene.names == {"a", "b"}
    scene.take(key("a", revoked_ms=NOW), b)
    assert scene.names == {"b"}
    scene.take(b)  # what is over leaves one day
    scene.take()
    assert scene.names == set()


def test_a_key_narrows_its_tenant_and_never_widens_it(scene: Scene) -> None:
    scene.take(key("a", models=("*",)))
    holder = scene.open[digest("a")]
    assert (holder.models, holder.key_models, holder.providers, holder.passthrough) == (("gpt-*",), ("*",), ("p",), ())


def test_keys_of_tenants_that_are_not_configured_open_nothing(scene: Scene) -> None:
    scene.take(key("a", tenant="beta"), key("b", tenant=""))
    assert scene.open == {}
    assert scene.ring.next_end_ms is None


def test_an_expiry_needs_no_news(scene: Scene) -> None:
    scene.take(key("a", expires_ms=NOW + 10), key("b", expires_ms=NOW + 5), key("c"), key("d", expires_ms=NOW))
    assert scene.names == {"a", "b", "c"}
    assert scene.ring.next_end_ms == NOW + 5
    scene.ring.sweep(NOW + 4)
    assert scene.names == {"a", "b", "c"}
    scene.ring.sweep(NOW + 5)
    assert scene.names == {"a", "c"}
    scene.ring.sweep(NOW + 1_000_000)
    assert scene.names == {"c"}
    assert scene.ring.next_end_ms is None


def test_a_rotation_ends_the_old_secret_at_its_time_and_its_key_at_none(scene: Scene) -> None:
    a = key("a", budget=LIMIT)
    scene.take(a)
    rotated = msgspec.structs.replace(a, secrets=(Secret(digest("b")), Secret(digest("a"), NOW + 10)))
    scene.take(rotated)
    assert scene.names == {"a", "b"}
    assert {tenant.key for tenant in scene.open.values()} == {"key_a"}  # one budget for both
    scene.ring.sweep(NOW + 10)
    assert scene.names == {"b"}
    again = msgspec.structs.replace(a, secrets=(Secret(digest("c")),), expires_ms=NOW + 50)
    scene.take(again)
    assert scene.names == {"c"}
    assert scene.ring.next_end_ms == NOW + 50


def test_an_end_may_come_nearer(scene: Scene) -> None:
    a = key("a", expires_ms=NOW + 100)
    scene.take(a)
    scene.take(msgspec.structs.replace(a, secrets=(Secret(digest("b")), Secret(digest("a"), NOW + 10))))
    scene.ring.sweep(NOW + 10)
    assert scene.names == {"b"}
    scene.ring.sweep(NOW + 100)
    assert scene.names == set()


@pytest.mark.parametrize("life", ["", "two"])
def test_a_registry_that_lost_everything_ends_no_key_and_says_so_once(scene: Scene, life: str) -> None:
    a, b = key("a", expires_ms=NOW + 10), key("b", budget=LIMIT)
    scene.take(a, b, key("c", revoked_ms=NOW))
    assert scene.take(life=life) == (2, ())
    assert scene.names == {"a", "b"}
    assert scene.budgets.keys() == {("acme", "key_b")}
    assert scene.take(key("d"), life="two") == (None, ())
    assert scene.names == {"a", "b", "d"}
    scene.take(life="two")  # keys of the new life follow it
    assert scene.names == {"a", "b"}
    scene.ring.sweep(NOW + 10)  # and those of the old one expire
    assert scene.names == {"b"}


def test_a_registry_that_was_never_written_has_lost_nothing(scene: Scene) -> None:
    assert scene.take(life="") == (None, ())
    assert scene.take(key("a")) == (None, ())


def test_what_has_ended_never_comes_back(scene: Scene) -> None:
    a, b, c = key("a"), key("b"), key("c", expires_ms=NOW + 5)
    scene.take(a, b, c)
    scene.take(key("a", revoked_ms=NOW), msgspec.structs.replace(b, secrets=(Secret(digest("d")),)), c)
    scene.ring.sweep(NOW + 5)
    assert scene.names == {"d"}
    # a failover to a copy that had not heard of any of it
    assert scene.take(key("a"), key("b"), key("c", expires_ms=NOW + 5000)) == (None, ("key_a",))
    assert scene.names == set()
    assert scene.take(life="two") == (0, ())
    assert scene.take(key("a"), life="two") == (None, ("key_a",))
    assert scene.names == set()


def test_a_key_that_is_missing_in_the_same_life_has_ended(scene: Scene) -> None:
    a = key("a", budget=LIMIT)
    scene.take(a, key("b"))
    scene.take(key("b"))
    assert scene.names == {"b"}
    assert scene.budgets == {}
    scene.take(key("a", budget=LIMIT), key("b"))
    assert scene.names == {"b"}


def test_a_budget_holds_before_its_key_is_let_in_and_as_long_as_the_key_is_known(scene: Scene) -> None:
    a = key("a", budget=LIMIT)
    scene.take(a)
    section = scene.budgets["acme", "key_a"]
    assert section.model_fields_set == {"usd_per_day"}
    scene.take(msgspec.structs.replace(a, revoked_ms=NOW))
    assert scene.budgets.keys() == {("acme", "key_a")}  # a request that came before may still ask for it
    scene.take()
    assert scene.budgets == {}


@pytest.mark.parametrize("budget", ["{", "[]", '{"usd_per_day":-1}', '{"usd_per_week":"5"}', "null"])
def test_a_key_whose_budget_cannot_be_read_may_spend_nothing(scene: Scene, budget: str) -> None:
    scene.take(key("a", budget=budget), key("b"))
    assert scene.names == {"b"}


def test_what_did_not_change_is_not_looked_at_again(scene: Scene) -> None:
    a = key("a")
    scene.take(a)
    before = scene.open[digest("a")]
    scene.take(a, key("b"))
    assert scene.open[digest("a")] is before
