"""Who owns stored objects, in the same store as the budgets."""

from __future__ import annotations

from proxy.store.base import BudgetStore
from proxy.store.memory import MemoryStore
from proxy.store.ownership import Ownership
from proxy.store.ownership_memory import MemoryOwnership


def ownership_of(store: BudgetStore) -> Ownership:
    if isinstance(store, MemoryStore):
        return MemoryOwnership()
    from proxy.store.redis import RedisStore

    assert isinstance(store, RedisStore)
    return store.ownership()
