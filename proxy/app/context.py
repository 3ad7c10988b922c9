"""The context layer, as the configuration wants it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Executor

from proxy.budget.hold import Budget
from proxy.config.settings import Settings
from proxy.context.settings import ContextSettings, merged
from proxy.context.summary import Summaries
from proxy.context.view import Context
from proxy.observability.events import Bus
from proxy.store.base import BudgetStore
from proxy.store.memory import MemoryStore
from proxy.store.summaries import SummaryStore
from proxy.store.summaries_memory import MemorySummaries
from proxy.tokens.count import Counter
from proxy.types import Target


def context_of(settings: Settings, bus: Bus, budget: Budget, counter: Counter, executor: Executor) -> Context:
    facts = budget.prices.facts

    def window(target: Target) -> int | None:
        return facts(target).context_window

    def tokens_per_minute(tenant: str, key: str) -> int | None:
        return budget.policies.of(tenant, key).tokens_per_minute

    return Context(
        counter,
        settings.context,
        tenants={one.name: merged(settings.context, one.context) for one in settings.tenants if one.context},
        window=window,
        tokens_per_minute=tokens_per_minute,
        emit=bus.emit,
        clock=time.monotonic,
        executor=executor,
        summaries=_summaries(settings, budget.access.store, counter, executor),
    )


def sections(settings: Settings) -> Iterator[ContextSettings]:
    """The section, and what becomes of it for each tenant that has its own."""
    yield settings.context
    for tenant in settings.tenants:
        yield merged(settings.context, tenant.context)


def _summaries(settings: Settings, store: BudgetStore, counter: Counter, executor: Executor) -> dict[str, Summaries]:
    """By the model that makes them."""
    models = {one.summary_model for one in sections(settings) if one.trim_strategy == "summary"}
    if not models:
        return {}
    kept = _kept(store)
    return {model: Summaries(kept, counter=counter, model=model, executor=executor) for model in models if model}


def _kept(store: BudgetStore) -> SummaryStore:
    if isinstance(store, MemoryStore):
        return MemorySummaries()
    from proxy.store.redis import RedisStore

    assert isinstance(store, RedisStore)
    return store.summaries()
