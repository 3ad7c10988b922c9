"""Circuits, as the configuration wants them, and what administration sees of them."""

from __future__ import annotations

import os
import random
import secrets
import socket
import time
from typing import Any, Literal

from proxy.config.settings import Settings
from proxy.errors import InvalidRequest
from proxy.fault_tolerance.base import BreakerStore
from proxy.fault_tolerance.breaker import Rules
from proxy.fault_tolerance.guard import Circuits, NoCircuits
from proxy.observability.events import Bus
from proxy.store.base import BudgetStore
from proxy.store.memory import MemoryStore
from proxy.store.memory_circuits import MemoryCircuits
from proxy.types import OTHER


def circuits_of(settings: Settings, bus: Bus, store: BudgetStore) -> Circuits | NoCircuits:
    """`store`: that of budgets, whose connection circuits share, and which closes after them."""
    section = settings.fault_tolerance
    if section.breaker == "off":
        return NoCircuits()
    breaker = section.circuit_breaker
    return Circuits(
        _store_of(store),
        Rules(
            time.monotonic,
            random.random,
            threshold=breaker.failure_threshold,
            recovery=breaker.recovery_timeout_ms / 1000,
        ),
        process=f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(2)}",
        emit=bus.emit,
        refuses=section.breaker == "enforce",
    )


def _store_of(store: BudgetStore) -> BreakerStore:
    if isinstance(store, MemoryStore):
        return MemoryCircuits()
    from proxy.store.redis import RedisStore

    assert isinstance(store, RedisStore)
    return store.circuits


class CircuitDesk:
    """For administration: circuits by the names of the configuration."""

    def __init__(self, settings: Settings, circuits: Circuits | NoCircuits) -> None:
        self._settings = settings
        self._circuits = circuits

    def known(self, provider: str, model: str) -> bool:
        """Whether requests can be counted under these names: a circuit's model is an entry of `models`."""
        names = (OTHER, *(entry.name for entry in self._settings.models))
        return provider in self._settings.providers and model in names

    def shown(self) -> list[dict[str, Any]]:
        return [] if isinstance(self._circuits, NoCircuits) else self._circuits.shown()

    async def command(self, provider: str, model: str, action: Literal["open", "reset"]) -> dict[str, Any]:
        if isinstance(self._circuits, NoCircuits):
            raise InvalidRequest("Circuits are switched off in the configuration.")
        return await self._circuits.command(provider, model, action)
