"""Budgets, as the pipeline meets them: `async with budget.hold(…) as tab`, and their beginning and end.

A request that some limit can refuse gets a `charge`, which reserves through `admission`; any other gets a `tab`, which
only books, through `daybook`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from proxy.budget import answers
from proxy.budget.access import Access
from proxy.budget.admission import Admission
from proxy.budget.charge import Charge
from proxy.budget.daybook import Daybook
from proxy.budget.held import Spent
from proxy.budget.local import Slices
from proxy.budget.plan import Plan, Planner, Want
from proxy.budget.policy import Policies
from proxy.budget.refusals import Refusals
from proxy.budget.report import ScopeReport, report
from proxy.budget.tab import Job, Later, Tab
from proxy.budget.waiting import Waiting
from proxy.observability.events import Notice
from proxy.store.base import (
    BudgetStore,
    Scope,
    StoreUnavailable,
)
from proxy.tokens.count import Counter
from proxy.types import Record, Target


class Budget:
    """`clock`: the event loop's, in seconds. `wall_ms`: milliseconds since 1970. `local` makes an empty store."""

    def __init__(
        self,
        access: Access,
        planner: Planner,
        policies: Policies,
        counter: Counter,
        *,
        local: Callable[[], BudgetStore],
        clock: Callable[[], float],
        emit: Callable[[Notice], None],
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        observe: Callable[[int, int], None] = lambda taken, reserved: None,
        waiting: Waiting | None = None,
        prompt: bool = False,
        recorded: bool = True,
    ) -> None:
        """`prompt`: the store never waits, so a settlement needs no task of its own to be safe. `recorded`: somebody
        may read the store's outbox."""
        self.access = access
        self.policies = policies
        self.counter = counter
        self.wall_ms = wall_ms
        self.waiting = waiting or Waiting()
        self.prices = planner.book
        self._planner = planner
        self.expectations = planner.expectations
        self.refusals = Refusals(emit, clock)
        slices = Slices(local, access.watch, wall_ms)
        self.admission = Admission(access, planner, counter, self.refusals, slices, self.waiting, clock, observe)
        self.prompt = prompt
        self.recorded = recorded
        self.daybook = Daybook(access.settle, self.track, self.refusals, planner.expectations.saw, recorded=recorded)
        self._later: set[Job] = set()
        """Settlements that whoever answers has promised to run."""
        self._finishing: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self.access.start()

    async def aclose(self, grace_seconds: float = 2.0) -> None:
        """Waits for settlements that are under way, then gives the store one last chance for those that wait for it."""
        for job in list(self._later):
            await job()  # Its task was cancelled by the end of the process, between the answer and the books.
        if self._finishing:
            await asyncio.wait(self._finishing, timeout=grace_seconds)
        await self.daybook.flush()
        await self.access.aclose()

    # -- for the pipeline --------------------------------------------------------------------------------------------

    def hold(
        self,
        tenant: str,
        key: str,
        want: Want,
        targets: Sequence[Target],
        record: Record,
        request_id: str = "",
        *,
        afterwards: Later | None = None,
    ) -> Tab:
        """An async context manager. Entering it raises BudgetExceeded, RequestExceedsBudget, ModelPriceUnknown,
        ContextExceeded and StoreUnavailable; `targets` are in the order in which they are tried, at least one.

        `afterwards`: takes the settlement, to be run once the client has its last byte; without it, leaving waits."""
        policy = self.policies.of(tenant, key)
        for target in targets:
            if not policy.at(target.provider).refuses_nothing:
                break
        else:
            return Tab(self, want, policy, record, targets, request_id, Spent(), key=key, afterwards=afterwards)
        return Charge(self, want, policy, record, targets, request_id, key=key, afterwards=afterwards)

    async def report(self, scopes: tuple[Scope, ...] | None = None) -> list[ScopeReport]:
        """Every scope that the configuration names, or just `scopes`. Raises StoreUnavailable of `errors`."""
        await self.daybook.flush()
        try:
            balances = await self.access.balance(self.policies.scopes if scopes is None else scopes)
        except StoreUnavailable as error:
            raise answers.store_unavailable() from error
        now, processes = self.wall_ms(), self.access.processes
        return [
            report(
                one,
                self.admission.exposures.get(one.scope.place),
                now,
                processes=processes,
                strict=self.policies.strict(one.scope),
                refunds=self.policies.refunds(one.scope),
            )
            for one in balances
        ]

    # -- for tabs and charges ------------------------------------------------------------------------------------------

    def unreserved(self, tab: Tab, target: Target) -> Plan:
        """What is known of an attempt that nothing is reserved for."""
        return self._planner.unreserved(tab.want, target)

    def expected(self, tab: Tab, target: Target) -> int:
        """Output tokens to expect of such an attempt."""
        return self._planner.expected(tab.want, tab.policy, target)

    def later(self, job: Job) -> Job:
        """`job`, remembered until it has begun."""

        async def once() -> None:
            if once in self._later:
                self._later.discard(once)
                await job()

        self._later.add(once)
        return once

    def track(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs to its end whatever becomes of its caller: the loop itself keeps no strong reference."""
        task = asyncio.get_running_loop().create_task(work)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        return task
