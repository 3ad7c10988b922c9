"""How many share the limits, and who may take a share while the store is away; and when a process is ready."""

from __future__ import annotations

import pytest

from proxy.budget.fleet import LIFE_SECONDS, Fleet
from proxy.budget.policy import Policies, TenantBudget
from proxy.budget.readiness import Readiness
from proxy.budget.settings import UNWRITTEN, BudgetSettings, LimitSettings
from proxy.store.base import Beat


def test_who_is_alone_has_a_share_at_once_and_who_joins_others_after_they_heard_of_it() -> None:
    fleet = Fleet(1.0)
    fleet.heard(Beat(1, 7), 100.0)
    assert fleet.has_share(100.0)
    late = Fleet(1.0)
    late.heard(Beat(2, 7), 100.0)
    assert late.processes == 2
    assert not late.has_share(101.9)
    late.heard(Beat(2, 7), 102.0)
    assert late.has_share(102.0)


def test_who_fell_silent_has_no_share_until_others_heard_of_it_again() -> None:
    fleet = Fleet(1.0)
    fleet.heard(Beat(2, 7), 100.0)
    fleet.heard(Beat(2, 7), 105.0)
    assert fleet.has_share(105.0 + LIFE_SECONDS - 0.1)
    assert not fleet.has_share(105.0 + LIFE_SECONDS), "the others have given it up"
    fleet.heard(Beat(2, 7), 120.0)
    assert not fleet.has_share(121.0)
    fleet.heard(Beat(2, 7), 122.0)
    assert fleet.has_share(122.0)


def test_after_an_outage_nobody_is_counted_out_before_they_had_time_to_come_back() -> None:
    fleet = Fleet(1.0)
    fleet.heard(Beat(4, 7), 100.0)
    fleet.heard(Beat(1, 8), 200.0)
    assert fleet.processes == 1, "three left while the store was there"
    fleet.heard(Beat(4, 8), 300.0)
    fleet.returned(400.0)
    fleet.heard(Beat(1, 9), 400.0)
    fleet.heard(Beat(2, 9), 419.0)
    assert fleet.processes == 4
    fleet.heard(Beat(5, 9), 419.5)
    assert fleet.processes == 5
    fleet.heard(Beat(2, 9), 420.0)
    assert fleet.processes == 2


class Known:
    def __init__(self, *, reached: bool = True, seeding: bool = False, away: bool = False) -> None:
        self.reached, self.seeding, self.away = reached, seeding, away


LIMITED = BudgetSettings(requests_per_minute=5)
DENY = BudgetSettings(requests_per_minute=5, on_store_error="deny")
FREE = TenantBudget(BudgetSettings(requests_per_minute=None))


def state(known: Known, policies: Policies, *tenants: str) -> str:
    return Readiness(known, policies, tenants or ("default",), ["a", "b"])()


@pytest.mark.parametrize(
    ("known", "watched", "local", "deny"),
    [
        (Known(), "ok", "ok", "ok"),
        (Known(reached=False), "ok", "starting", "starting"),
        (Known(reached=False, seeding=True), "ok", "seeding", "seeding"),
        (Known(seeding=True), "ok", "seeding", "seeding"),
        (Known(reached=False, away=True), "degraded", "starting", "starting"),
        (Known(away=True), "degraded", "degraded", "unavailable"),
    ],
)
def test_a_process_is_ready_if_it_knows_what_was_spent_and_serves_somebody(
    known: Known, watched: str, local: str, deny: str
) -> None:
    assert state(known, Policies(UNWRITTEN)) == watched
    assert state(known, Policies(LIMITED)) == local
    assert state(known, Policies(DENY)) == deny


def test_one_tenant_that_is_served_is_enough() -> None:
    away = Known(away=True)
    of_b = TenantBudget(BudgetSettings(on_store_error="allow"))
    assert state(away, Policies(DENY, tenants={"b": of_b}), "a", "b") == "degraded"
    assert state(away, Policies(DENY, tenants={"b": FREE}), "a", "b") == "degraded"
    assert state(away, Policies(DENY, tenants={"b": TenantBudget()}), "a", "b") == "unavailable"


def test_limits_of_accounts_and_of_all_together_are_limits_too() -> None:
    section = BudgetSettings(on_store_error="deny")
    limits = LimitSettings(requests_per_minute=1)
    away = Known(away=True)
    assert state(away, Policies(section)) == "degraded"
    assert state(away, Policies(section, everyone=limits)) == "unavailable"
    assert state(away, Policies(section, accounts={"a": limits})) == "degraded", "the other provider serves"
    assert state(away, Policies(section, accounts={"a": limits, "b": limits})) == "unavailable"
    assert state(Known(reached=False), Policies(section, accounts={"a": limits})) == "starting"
