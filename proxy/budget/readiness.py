"""Whether a process should be sent requests, as far as its store has a say in it. Pure.

Without its store a process serves whoever its policies let pass. It is not ready where they let nobody pass, nor before
it knows what was spent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from proxy.budget.amounts import Limits
from proxy.budget.policy import Policies, Policy

StoreState = Literal["ok", "degraded", "seeding", "starting", "unavailable"]
"""The first two are ready. degraded: the store is away, and some requests are served. seeding: it came back empty, and
is told what processes remember. starting: it was never reached. unavailable: it is away, and nobody is served."""


class Reach(Protocol):
    """What is known of the store."""

    reached: bool
    seeding: bool
    away: bool


class Readiness:
    """Of one configuration. `tenants` and `providers` by their names."""

    def __init__(self, reach: Reach, policies: Policies, tenants: Iterable[str], providers: Sequence[str]) -> None:
        found = [policies.of(tenant) for tenant in tenants]
        self._reach = reach
        self._limited = any(scope.enforced and scope.limits != Limits() for scope in policies.scopes)
        self._some_pass = any(_passes(policy, providers) for policy in found)

    def __call__(self) -> StoreState:
        reach = self._reach
        if self._limited and not reach.reached:
            return "seeding" if reach.seeding else "starting"
        if self._limited and reach.seeding:
            return "seeding"
        if not reach.away:
            return "ok"
        return "degraded" if self._some_pass else "unavailable"


def _passes(policy: Policy, providers: Sequence[str]) -> bool:
    """Some request of this caller is served without the store."""
    return policy.settings.on_store_error != "deny" or any(not policy.at(name).enforced for name in providers)
