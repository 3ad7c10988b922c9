"""Who is held to what: the configuration's sections, merged once for each tenant and key. Pure.

A caller is held by up to three scopes (the deployment, its tenant, its key), and at each target by the provider's
account. Limits of the deployment and of accounts hold whatever mode a tenant is in. What a key's own section limits is
the key's own; all else that it says goes over its tenant's section, as that goes over `budget`. No section of a key
takes anything from what its tenant is held to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from proxy.budget.amounts import Limits
from proxy.budget.settings import UNWRITTEN, BudgetSettings, LimitSettings, merged
from proxy.budget.spare import FAR
from proxy.money import nano_usd
from proxy.store.base import Scope, ScopeKind

_USD: Final = ("minute", "hour", "day", "month")
_STRICTER: Final = ("off", "observe", "enforce")


def limits_of(settings: LimitSettings) -> Limits:
    """The same limits as integers."""
    usd = {span: getattr(settings, f"usd_per_{span}") for span in _USD}
    return Limits(
        requests_per_minute=settings.requests_per_minute,
        tokens_per_minute=settings.tokens_per_minute,
        max_concurrent=settings.max_concurrent,
        **{f"nano_usd_per_{span}": None if amount is None else nano_usd(amount) for span, amount in usd.items()},
    )


@dataclass(frozen=True, slots=True)
class Reach:
    """What of a scope's limits concerns the size of one request: the tightest of each dimension, None for none."""

    tokens: int | None = None
    nano_usd: int | None = None

    def within(self, other: Reach) -> Reach:
        return Reach(_tighter(self.tokens, other.tokens), _tighter(self.nano_usd, other.nano_usd))


def _tighter(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


def reach_of(limits: Limits) -> Reach:
    dollars = (
        limits.nano_usd_per_minute,
        limits.nano_usd_per_hour,
        limits.nano_usd_per_day,
        limits.nano_usd_per_month,
    )
    return Reach(limits.tokens_per_minute, min((one for one in dollars if one is not None), default=None))


class Bound:
    """Scopes that a reservation takes together, and what follows from their limits. Made once for each target."""

    __slots__ = ("enforced", "far", "limited", "limiting", "places", "reach", "refuses_nothing", "reserves", "risky",
                 "scopes", "watched")  # fmt: skip

    def __init__(self, scopes: tuple[Scope, ...], *, rehearses: bool, needs_price: bool) -> None:
        """`rehearses`: what is only watched is reserved like what is enforced, so that it says what that would.
        `needs_price`: what nobody knows a price of is refused, whatever the limits."""
        self.scopes = scopes
        limited = [scope for scope in scopes if scope.limits != Limits()]
        self.limited = bool(limited)
        """There is something to reserve."""
        self.enforced = any(scope.enforced for scope in limited)
        """A reservation can be refused."""
        self.reserves = self.enforced or (self.limited and rehearses)
        """Requests are reserved before they are sent. If not, they are booked when they are over."""
        self.refuses_nothing = not (self.reserves or needs_price)
        """Whatever a request asks: no limit is enforced, and its price need not be known."""
        self.watched = tuple((scope, scope.limits.bounds()) for scope in limited if not scope.enforced)
        reach = Reach()
        for scope in scopes:
            if scope.enforced:
                reach = reach.within(reach_of(scope.limits))
        self.reach = reach
        """Of the enforced scopes."""
        self.limiting = tuple(scope for scope in limited if scope.enforced)
        """Those that can refuse."""
        self.far = None if reach.tokens is None else reach.tokens // FAR
        """Tokens: a larger input is counted before it is asked for. None: whatever its size, it may not have to be."""
        risky = [(scope.place, reach_of(scope.limits)) for scope in scopes if scope.enforced]
        self.risky = tuple((place, one) for place, one in risky if one != Reach())
        """Places that can be overspent by an estimate, and how far each reaches."""
        self.places = tuple(place for place, _ in self.risky)


class Policy:
    """What one caller is held to. `at(provider)` adds the account of a target."""

    __slots__ = ("_accounts", "_bounds", "enforces", "key", "own", "settings", "strict", "tenant",
                 "tokens_per_minute")  # fmt: skip

    def __init__(
        self, tenant: str, key: str, settings: BudgetSettings, own: tuple[Scope, ...], accounts: Mapping[str, Scope]
    ) -> None:
        self.tenant = tenant
        self.key = key
        self.settings = settings
        self.own = own
        """The deployment's scope, the tenant's, the key's; those that exist."""
        self.strict = settings.estimate == "max" and settings.on_overrun == "cut" and settings.mode == "enforce"
        """Nothing is ever overspent: every figure is an upper bound, and the upstream is told the maximum."""
        self.enforces = settings.mode == "enforce"
        held = (one.limits.tokens_per_minute for one in own if one.enforced and one.kind in ("tenant", "key"))
        self.tokens_per_minute = min((one for one in held if one is not None), default=None)
        """The smallest that is enforced on the tenant and its key: no prompt can be larger."""
        self._accounts = accounts
        self._bounds: dict[str, Bound] = {}

    def account(self, provider: str) -> Scope | None:
        """The scope of a provider's account; None where it has no limits."""
        return self._accounts.get(provider)

    def at(self, provider: str) -> Bound:
        """All scopes of a request at this provider."""
        bound = self._bounds.get(provider)
        if bound is None:
            account = self._accounts.get(provider)
            scopes = self.own if account is None else (*self.own, account)
            needs_price = self.enforces and self.settings.on_unknown_price == "deny"
            rehearses = self.settings is not UNWRITTEN
            bound = self._bounds[provider] = Bound(scopes, rehearses=rehearses, needs_price=needs_price)
        return bound


@dataclass(frozen=True, slots=True)
class TenantBudget:
    """What was written for a tenant, and for its keys by their names."""

    budget: BudgetSettings | None = None
    keys: Mapping[str, BudgetSettings] = field(default_factory=dict)


class Policies:
    """All policies of a configuration. One that nobody wrote anything for is made at its first request, and kept."""

    def __init__(
        self,
        section: BudgetSettings,
        *,
        everyone: LimitSettings | None = None,
        accounts: Mapping[str, LimitSettings] | None = None,
        tenants: Mapping[str, TenantBudget] | None = None,
    ) -> None:
        """`section`: `budget`, or UNWRITTEN. `everyone`: `global_budget`. `accounts`: `providers.*.limits`."""
        self._section = section
        self._tenants = tenants or {}
        self._accounts = {
            name: Scope("provider", name, limits_of(limits))
            for name, limits in (accounts or {}).items()
            if limits.limited
        }
        limits = Limits() if everyone is None else limits_of(everyone)
        self._everyone = (Scope("global", "", limits),) if limits != Limits() else ()
        self._made: dict[tuple[str, str], BudgetSettings] = {}
        """Of keys that are made at run time, by tenant and key."""
        self._policies: dict[tuple[str, str], Policy] = {}
        self._scopes: dict[tuple[ScopeKind, str, bool, Limits], Scope] = {}

    @property
    def idle(self) -> bool:
        """Nobody is held to anything, and nobody is watched."""
        sections = [merged(self._section)]
        for tenant in self._tenants.values():
            sections += [merged(self._section, tenant.budget, key) for key in (None, *tenant.keys.values())]
        return not (self._accounts or self._everyone) and all(one.mode == "off" for one in sections)

    @property
    def refuses(self) -> bool:
        """Some request may be refused for its size."""
        return any(scope.enforced and reach_of(scope.limits) != Reach() for scope in self.scopes)

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The scopes that the configuration names, each once: for reports, and to restore what was spent in them."""
        for name, tenant in self._tenants.items():
            for key in ("", *tenant.keys):
                self.of(name, key)
        written = (one for one in self._scopes.values() if not self._is_made(one))
        found = (*self._accounts.values(), *self._everyone, *written)
        return tuple({scope.place: scope for scope in reversed(found)}.values())

    def _is_made(self, scope: Scope) -> bool:
        return bool(self._made) and scope.kind == "key" and tuple(scope.name.split("/", 1)) in self._made

    def strict(self, scope: Scope) -> bool:
        """Nobody whom this scope holds ever takes a risk."""
        held = [policy for policy in self._policies.values() if scope in policy.own or scope.kind == "provider"]
        return bool(held) and all(policy.strict for policy in held)

    def refunds(self, scope: Scope) -> bool:
        """Somebody whom this scope holds is given back what a lost reservation had asked for."""
        held = (policy for policy in self._policies.values() if scope in policy.own or scope.kind == "provider")
        return any(policy.settings.on_lost == "refund" for policy in held)

    def of(self, tenant: str, key: str = "") -> Policy:
        """The policy of a caller. `key` is the key's name, never its secret; empty where keys have no budgets."""
        found = self._tenants.get(tenant)
        if (found is None or key not in found.keys) and not (self._made and (tenant, key) in self._made):
            key = ""
        policy = self._policies.get((tenant, key))
        if policy is None:
            policy = self._policies[tenant, key] = self._make(tenant, key, found or TenantBudget())
        return policy

    def put_key(self, tenant: str, key: str, section: BudgetSettings) -> None:
        """The section of a key that is made at run time. It never changes: its key's name is never used again."""
        self._made[tenant, key] = section

    def drop_key(self, tenant: str, key: str) -> None:
        """Forgets a key that nobody can present any more."""
        self._made.pop((tenant, key), None)
        policy = self._policies.pop((tenant, key), None)
        for scope in () if policy is None else policy.own:
            if scope.kind == "key":
                self._scopes.pop((scope.kind, scope.name, scope.enforced, scope.limits), None)

    def of_keys(self, tenant: str) -> tuple[Scope, ...]:
        """The scopes of a tenant's keys that are made at run time. There may be thousands: `scopes` is without them."""
        policies = (self.of(*place) for place in list(self._made) if place[0] == tenant)
        return tuple(scope for policy in policies for scope in policy.own if scope.kind == "key")

    def _make(self, tenant: str, key: str, written: TenantBudget) -> Policy:
        of_tenant = merged(self._section, written.budget)
        own = written.keys.get(key) or self._made.get((tenant, key))
        settings = merged(of_tenant, own)
        limits = Limits() if of_tenant.mode == "off" else limits_of(of_tenant)  # What is spent is booked all the same.
        scopes = [self._scope("tenant", tenant, limits, of_tenant.mode == "enforce")]
        if own is not None and settings.mode != "off":
            # The key's own limits are those that it writes: its tenant's hold for all keys together already.
            limits = limits_of(LimitSettings.model_validate(own.model_dump(include=_limits_written(own))))
            scopes.append(self._scope("key", f"{tenant}/{key}", limits, settings.mode == "enforce"))
        if _STRICTER.index(settings.mode) < _STRICTER.index(of_tenant.mode):
            settings = settings.model_copy(update={"mode": of_tenant.mode})
        return Policy(tenant, key, settings, (*self._everyone, *scopes), self._accounts)

    def _scope(self, kind: ScopeKind, name: str, limits: Limits, enforced: bool) -> Scope:
        return self._scopes.setdefault((kind, name, enforced, limits), Scope(kind, name, limits, enforced))


def _limits_written(own: BudgetSettings) -> set[str]:
    return own.model_fields_set & LimitSettings.model_fields.keys()
