"""Budgets, as the configuration wants them: the store, the limits, the prices, and what administration sees of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from proxy.budget.access import Access
from proxy.budget.answers import store_unavailable
from proxy.budget.estimate import Expectations
from proxy.budget.hold import Budget
from proxy.budget.plan import Planner
from proxy.budget.policy import Policies, TenantBudget
from proxy.budget.pricing import (
    FREE,
    Account,
    Library,
    ModelFacts,
    NoLibrary,
    PriceBook,
    facts_of,
    vendor_of,
)
from proxy.budget.readiness import Readiness
from proxy.budget.report import by_tenant, gauges, shown
from proxy.budget.rollups import Document, document, query_of
from proxy.budget.watch import Watch
from proxy.config.settings import Settings
from proxy.edge.auth import DEFAULT
from proxy.errors import StoreUnavailable
from proxy.observability.events import Bus
from proxy.observability.metrics import Gauged, Metrics
from proxy.providers.settings import OpenAISettings, ProviderSettings
from proxy.store.address import MEMORY
from proxy.store.base import SEED_MS, BudgetStore, Dimension, UsageRow
from proxy.store.base import StoreUnavailable as StoreAway
from proxy.store.memory import MemoryStore
from proxy.tokens.count import Counter

_SCOPES_AT_ONCE = 100
"""A call that reads more holds up the reservations behind it."""


def store_of(settings: Settings) -> BudgetStore:
    """Within the event loop that uses it. It connects at the first call."""
    if settings.state.get_secret_value() == MEMORY:
        return MemoryStore()
    from proxy.store.redis import RedisStore

    return RedisStore(
        settings.state.get_secret_value(),
        namespace=settings.state_namespace,
        timeout_ms=settings.state_timeout_ms,
    )


def budget_of(settings: Settings, bus: Bus, counter: Counter) -> Budget:
    clock = asyncio.get_running_loop().time
    store = store_of(settings)
    alone = isinstance(store, MemoryStore)
    policies = Policies(
        settings.budget,
        everyone=settings.global_budget,
        accounts={name: one.limits for name, one in settings.providers.items()},
        tenants={one.name: TenantBudget(one.budget) for one in settings.tenants},
    )
    return Budget(
        Access(store, Watch(), clock=clock, emit=bus.emit, collect_ms=0 if alone else SEED_MS),
        Planner(_prices(settings), Expectations()),
        policies,
        counter,
        local=MemoryStore,
        clock=clock,
        emit=bus.emit,
        prompt=alone,
        recorded=not alone or bool(settings.ledger.sinks),
    )


def readiness_of(settings: Settings, budget: Budget) -> Readiness:
    tenants = [one.name for one in settings.tenants] or [DEFAULT.name]
    return Readiness(budget.access, budget.policies, tenants, list(settings.providers))


def _prices(settings: Settings) -> PriceBook:
    library: Library = NoLibrary()
    patterns: list[tuple[str, str]] = []
    if any(_has_list_prices(one) for one in settings.providers.values()):
        from proxy.budget.library import GenaiPrices

        known = GenaiPrices()
        library, patterns = known, list(known.patterns())
    accounts: dict[str, Account] = {}
    for name, one in settings.providers.items():
        models = {glob: facts_of(facts) for glob, facts in one.models.items()}
        if isinstance(one, OpenAISettings):
            vendor = one.vendor or vendor_of(one.base_url, patterns)
            accounts[name] = Account(None if vendor == "none" else vendor, models)
        else:
            accounts[name] = Account(None, {**models, "*": models.get("*", ModelFacts()).over(ModelFacts(FREE))})
    return PriceBook(accounts, {one.name: facts_of(one) for one in settings.models}, library, time.time)


def _has_list_prices(settings: ProviderSettings) -> bool:
    """Whether the price list, which takes a quarter of a second to load, can say anything of a provider."""
    if not isinstance(settings, OpenAISettings) or settings.vendor is not None:
        return isinstance(settings, OpenAISettings) and settings.vendor != "none"
    host = urlsplit(settings.base_url).hostname or ""
    try:
        return not ip_address(host).is_private  # no vendor's address
    except ValueError:
        return host != "localhost"


async def budgets_shown(budget: Budget, tenant: str | None) -> list[dict[str, Any]]:
    """As JSON: the figures of all scopes, or of one tenant's. Raises StoreUnavailable."""
    found = await budget.report()
    if tenant is None:
        return shown(found)
    found = by_tenant(found, tenant)
    of_keys = budget.policies.of_keys(tenant)
    for start in range(0, len(of_keys), _SCOPES_AT_ONCE):
        found += await budget.report(of_keys[start : start + _SCOPES_AT_ONCE])
    return shown(found)


ReadUsage = Callable[[int, int, Sequence[Dimension]], Awaitable[list[UsageRow]]]
"""As `BudgetStore.usage`."""


async def used(read: ReadUsage, now_ms: int, since: str, by: str) -> Document:
    """What was used in that span, in whole hours (`rollups`). Raises InvalidRequest and StoreUnavailable."""
    query = query_of(since, by, now_ms)
    try:
        return document(query, await read(query.since_ms, query.until_ms, query.by))
    except StoreAway as error:
        raise store_unavailable() from error


async def used_here(budget: Budget, since: str, by: str) -> Document:
    """The same, with what this process has not booked yet."""
    await budget.daybook.flush()
    return await used(budget.access.usage, budget.wall_ms(), since, by)


def measure(budget: Budget, metrics: Metrics) -> None:
    """Lets the metrics hear what is counted and has no event."""
    budget.admission.observe = metrics.estimated
    budget.refusals.count = metrics.budget_refused
    budget.access.failed = metrics.store_failed


async def gauges_of(budget: Budget) -> Gauged:
    try:
        return gauges(await budget.report())
    except StoreUnavailable:
        return {}, {}  # A page without them says more than figures of the past.
