"""What a key's own section does to what its caller is held to: it adds, and takes nothing away."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.budget.amounts import Limits
from proxy.budget.policy import Policies, TenantBudget
from proxy.budget.settings import UNWRITTEN, BudgetSettings

KEY = "key_0123456789abcdef"


def section(**values: Any) -> BudgetSettings:
    return BudgetSettings.model_validate(values)


def policies(base: BudgetSettings, own: BudgetSettings | None = None, made: BudgetSettings | None = None) -> Policies:
    """`own`: of the tenant; `made`: of its key."""
    found = Policies(base, tenants={"acme": TenantBudget(own)})
    if made is not None:
        found.put_key("acme", KEY, made)
    return found


def held(found: Policies, key: str = KEY) -> dict[str, tuple[Limits, bool]]:
    """Limits and whether they are enforced, by kind of scope."""
    return {scope.kind: (scope.limits, scope.enforced) for scope in found.of("acme", key).own}


def test_both_hold_at_once() -> None:
    found = policies(section(tokens_per_minute=100), section(max_concurrent=3), section(requests_per_minute=2))
    assert held(found) == {
        "tenant": (Limits(tokens_per_minute=100, max_concurrent=3), True),
        "key": (Limits(requests_per_minute=2), True),
    }
    assert [scope.name for scope in found.of("acme", KEY).own] == ["acme", f"acme/{KEY}"]
    assert found.of("acme", "another").own == found.of("acme").own == found.of("acme", KEY).own[:1]
    assert found.of("beta", KEY).own[0].name == "beta"
    assert len(found.of("beta", KEY).own) == 1  # a name is a key's only with its tenant


@pytest.mark.parametrize("mode", ["off", "observe"])
def test_a_key_cannot_lift_what_holds_its_tenant(mode: str) -> None:
    found = policies(section(requests_per_minute=5), made=section(mode=mode, requests_per_minute=9))
    assert held(found)["tenant"] == (Limits(requests_per_minute=5), True)
    policy = found.of("acme", KEY)
    assert policy.enforces
    assert policy.at("m").enforced
    assert held(found).get("key") == (None if mode == "off" else (Limits(requests_per_minute=9), False))


def test_a_key_enforces_beside_a_tenant_that_only_observes() -> None:
    found = policies(UNWRITTEN, made=section(requests_per_minute=2))
    tenant, key = held(found)["tenant"], held(found)["key"]
    assert tenant[0].tokens_per_minute == 40_000
    assert not tenant[1]  # nobody wrote those limits, and nobody is refused by them
    assert key == (Limits(requests_per_minute=2), True)
    assert found.of("acme", KEY).enforces
    assert not found.of("acme").enforces
    observing = policies(section(mode="observe", requests_per_minute=1), made=section(requests_per_minute=2))
    assert held(observing)["key"][1] is False  # what it does not say is its tenant's
    off = policies(section(mode="off", requests_per_minute=1), made=section(mode="enforce", requests_per_minute=2))
    assert held(off) == {"tenant": (Limits(), False), "key": (Limits(requests_per_minute=2), True)}


def test_reports_name_the_scopes_of_such_keys_apart() -> None:
    found = policies(section(tokens_per_minute=100), made=section(requests_per_minute=2))
    found.of("acme", KEY)
    assert [scope.kind for scope in found.scopes] == ["tenant"]
    assert [scope.name for scope in found.of_keys("acme")] == [f"acme/{KEY}"]
    assert found.of_keys("acm") == found.of_keys("beta") == ()


def test_a_key_that_is_forgotten_leaves_nothing() -> None:
    found = policies(section(tokens_per_minute=100))
    before = (len(found._policies), len(found._scopes), len(found._made))
    found.of("acme")
    after = (len(found._policies), len(found._scopes), len(found._made))
    for number in range(50):
        found.put_key("acme", f"key_{number}", section(requests_per_minute=2))
        found.of("acme", f"key_{number}")
        found.drop_key("acme", f"key_{number}")
    found.drop_key("acme", "key_1")
    assert (len(found._policies), len(found._scopes), len(found._made)) == after != before
    assert found.of("acme", "key_1") is found.of("acme")
