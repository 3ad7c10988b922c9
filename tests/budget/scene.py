"""A budget over real parts: a memory store, the real planner, asks as the pipeline parses them. Time stands still."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from proxy.budget.access import Access
from proxy.budget.amounts import Row
from proxy.budget.estimate import Expectations
from proxy.budget.hold import Budget
from proxy.budget.plan import Planner, Want, want_of
from proxy.budget.policy import Policies, TenantBudget
from proxy.budget.pricing import Account, ModelFacts, NoLibrary, PriceBook, Rates
from proxy.budget.settings import BudgetSettings, LimitSettings
from proxy.budget.watch import Watch
from proxy.observability.events import Notice
from proxy.store.base import BudgetStore, UsageRow
from proxy.store.memory import MemoryStore
from proxy.tokens.count import Counter
from proxy.types import Call, Event, Record, Target, Tenant, Usage
from proxy.validation import requests

RATES = Rates(1_000_000_000, 500_000_000, 1_000_000_000, 2_000_000_000, 2_000_000_000)
"""1 and 2 USD per million tokens: 1000 nano-dollars an input token, 2000 an output token."""

TARGET = Target("alpha", "m", "m")
OTHER_TARGET = Target("beta", "m", "m")
TENANT = "acme"
WALL_MS = 1_768_435_200_000


class Clock:
    """Wall milliseconds for stores, set by hand."""

    def __init__(self) -> None:
        self.ms = WALL_MS

    def __call__(self) -> int:
        return self.ms

    def pass_seconds(self, seconds: float) -> None:
        self.ms += int(seconds * 1000)


def call(body: Mapping[str, Any]) -> Call:
    return Call(
        "POST", "/v1/chat/completions", "/v1/chat/completions", b"", [], json.dumps(body).encode(), "r", "t", "c"
    )  # type: ignore[arg-type]


def want(text: str = "Hello there", **members: Any) -> Want:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **members}
    return want_of(requests.parse(call(body), Tenant("acme"), tenants_configured=True))


def usage_event(usage: Usage | None, data: bytes = b"{}") -> Event:
    return Event(data, usage)


def chunk(text: str) -> Event:
    choice = {"index": 0, "delta": {"content": text}}
    body = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return Event(b"data: " + json.dumps(body).encode() + b"\n\n")


class Scene:
    def __init__(
        self,
        section: BudgetSettings | None = None,
        *,
        store: BudgetStore | None = None,
        clock: Clock | None = None,
        collect_ms: int = 0,
        processes: int = 1,
        queued: int = 20_000,
        extend_seconds: float = 10.0,
        rates: Mapping[str, Rates | None] | None = None,
        accounts: Mapping[str, LimitSettings] | None = None,
        everyone: LimitSettings | None = None,
        tenants: Mapping[str, TenantBudget] | None = None,
        facts: ModelFacts | None = None,
        loop_clock: Callable[[], float] | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self.store = store or MemoryStore(clock=self.clock)
        self.events: list[Notice] = []
        self.watch = Watch()
        loop_clock = loop_clock or asyncio.get_running_loop().time
        known = {"alpha": RATES, "beta": RATES} if rates is None else rates
        extra = facts or ModelFacts()
        book = PriceBook(
            {name: Account(None, {"*": ModelFacts(one).over(extra)}) for name, one in known.items()},
            {},
            NoLibrary(),
            lambda: 0.0,
        )
        self.expectations = Expectations()
        self.policies = Policies(section or BudgetSettings(), everyone=everyone, accounts=accounts, tenants=tenants)
        self.access = Access(
            self.store,
            self.watch,
            clock=loop_clock,
            emit=self.events.append,
            processes=lambda: processes,
            collect_ms=collect_ms,
            queued=queued,
            extend_seconds=extend_seconds,
        )
        self.counter = Counter()
        self.budget = Budget(
            self.access,
            Planner(book, self.expectations),
            self.policies,
            self.counter,
            local=lambda: MemoryStore(clock=self.clock),
            clock=loop_clock,
            emit=self.events.append,
            wall_ms=self.clock,
        )

    async def row(self, kind: str = "tenant", name: str | None = None) -> Row:
        self.policies.of(TENANT)
        scopes = [one for one in self.policies.scopes if one.kind == kind and name in (None, one.name)]
        await self.budget.daybook.flush()
        balances = await self.access.balance(tuple(scopes[:1]))
        return balances[0].row

    async def used(self, *by: str) -> list[UsageRow]:
        await self.budget.daybook.flush()
        return await self.store.usage(0, 2**52, by or ("tenant",))  # type: ignore[arg-type]

    async def serve(self, ask: Want | None = None, usage: Usage | None = None, tenant: str = TENANT) -> Record:
        """One plain request that the provider answers with this usage."""
        record = Record()
        async with self.budget.hold(tenant, "", ask or want(), [TARGET], record) as charge:
            await charge.cover(TARGET)
            charge.answered(200)
            charge.see(usage_event(usage or Usage(10, 5)))
        return record


def usd(amount: str) -> Decimal:
    return Decimal(amount)
