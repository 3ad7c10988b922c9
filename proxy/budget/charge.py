"""A tab that is reserved for: what one request holds in the store, and gives back. The shell around `plan`.

    enter ── reserves for the first target with room               429, 400, 503
      cover(target) ── covers what this attempt may take, beside what earlier ones have cost
      see(event) ── a stream that is about to outgrow what it holds: `grow`
    leave ── settles: exactly once, under a shield, waited for at most two seconds

The reservation's id is made before the store hears of it. So a reservation whose answer never came is settled too, and
a store that never got it has nothing to settle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final

from proxy.budget.counting import BYTES_PER_TOKEN
from proxy.budget.held import Attempt, Held
from proxy.budget.plan import Plan, Want
from proxy.budget.policy import Policy
from proxy.budget.records import Line, entries_of
from proxy.budget.tab import Later, Tab
from proxy.errors import ContextExceeded, ModelPriceUnknown, ProviderFull, ProxyError, RequestExceedsBudget
from proxy.types import Event, Record, Target

if TYPE_CHECKING:
    from proxy.budget.hold import Budget

NEAR: Final = 0.9
"""Of its reserved output, what a stream may have made before it asks for more."""


class Charge(Tab):
    """Made by `Budget.hold`. One task uses it."""

    __slots__ = ("_admission", "_full", "_grows", "_plan", "held")

    def __init__(
        self,
        budget: Budget,
        want: Want,
        policy: Policy,
        record: Record,
        targets: Sequence[Target],
        request_id: str,
        *,
        parent: Charge | None = None,
        key: str = "",
        afterwards: Later | None = None,
    ) -> None:
        self.held: Held = parent.held if parent is not None else Held()
        super().__init__(
            budget, want, policy, record, targets, request_id, self.held, parent=parent, key=key, afterwards=afterwards
        )
        self._plan: Plan | None = None
        """What is reserved for the next attempt."""
        self._full: dict[Target, ProviderFull] | None = None
        self._grows = True
        self._admission = budget.admission

    @property
    def has_alternatives(self) -> bool:
        return len(self._targets) > 1

    def _tell_state(self) -> None:
        self._record.rate_limits = self.headers()
        if self.degraded:
            self._record.degraded = True

    # -- enter and leave ---------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Charge:
        try:
            if self._parent is None:  # else it is covered when its first attempt is
                await self._open()
        except BaseException:
            self._tell_state()
            await self._close(complete=False)
            raise
        self._tell_state()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = kind is None
        if self._must_count():
            await self._leave(partial(self._close, complete=complete))  # there is something to count
        elif self._budget.prompt:
            try:
                self._end_known(complete=complete)
            finally:
                if self._parent is None:
                    await self._settle()  # The store never waits: no cancellation can come in between.
        elif self._afterwards is None:
            await self._close(complete=complete)
        else:
            # The client need not wait for the books. Its next request comes behind this settlement, in the same batch
            # at the earliest.
            try:
                self._end_known(complete=complete)
            finally:
                if self._parent is None:
                    self._budget.track(self._settle())

    async def _open(self) -> None:
        refused: ProxyError | None = None
        for target in self._targets:
            try:
                self._plan = await self._admission.take(self, target)
            except ProviderFull as full:
                if self._full is None:
                    self._full = {}
                self._full[target] = full
            except (ModelPriceUnknown, RequestExceedsBudget, ContextExceeded) as error:
                refused = refused or error  # Another target may have a price, or a lower one.
            else:
                return
        if self._full:
            raise min(self._full.values(), key=lambda full: full.retry_after_ms)
        assert refused is not None
        raise refused

    async def _finish(self, *, complete: bool) -> None:
        try:
            await super()._finish(complete=complete)
        finally:
            if self._parent is None:
                await self._settle()

    async def _settle(self) -> None:
        held = self.held
        if held.risks[0]:
            self._admission.at_risk(held, ())
        if held.state is not None or held.entries:
            await self._admission.settle(held, self.policy)

    # -- attempts ----------------------------------------------------------------------------------------------------

    async def cover(self, target: Target) -> None:
        """Before each attempt. Raises ProviderFull (try another target), BudgetExceeded, ModelPriceUnknown,
        RequestExceedsBudget, ContextExceeded, StoreUnavailable."""
        if self._attempt is not None and (ending := await self._follow()) is not None:
            await asyncio.shield(ending)  # What it came to is held beside the next one.
        if self._full is not None and (full := self._full.pop(target, None)) is not None:
            raise full
        plan, self._plan = self._plan, None
        if plan is None or plan.target != target:
            plan = await self._admission.take(self, target)
        held = self.held
        attempt = self._begin(plan)
        self.output_cap = plan.output_cap
        self._grows = self.want.ask.stream and held.state == "asked" and self.policy.at(target.provider).enforced
        if plan.account is not None:
            held.apart.setdefault(plan.account.name, [0, 0, 0])[0] += 1
        if self.degraded:
            self._record.degraded = True
        attempt.next_check = int(plan.estimate.expected * BYTES_PER_TOKEN * NEAR)

    def see(self, event: Event) -> bool:
        super().see(event)
        if not self._grows:
            return False
        attempt = self._attempt
        assert attempt is not None
        attempt.seen_bytes += len(event.data)
        self.head.see(event.data)
        return not event.terminator and attempt.seen_bytes > attempt.next_check

    async def grow(self) -> bool:
        """Measures the stream, and reserves more if it is about to outgrow what it has.

        False: there is no more, and the stream is to be cut (`cut.ending`). Raises nothing of the store's.
        """
        attempt = self._attempt
        assert attempt is not None
        plan, held = attempt.plan, self.held
        attempt.measured = await self._output_of(attempt)
        room = held.ask.tokens - held.tokens - plan.estimate.input
        if attempt.measured < room * NEAR:
            per_token = attempt.seen_bytes / max(attempt.measured, 1)
            attempt.next_check = max(int(room * NEAR * per_token), attempt.seen_bytes + 1024)
            return True
        if not await self._admission.grow(self, plan, 2 * max(attempt.measured, room, 64)):
            self._grows = False
            return not (self.policy.enforces and self.policy.settings.on_overrun == "cut")
        attempt.next_check = attempt.seen_bytes + 1024
        return True

    def child(self, want: Want) -> Charge:
        """As of a tab. It shares the reservation, which its `cover` raises, and is settled with it."""
        self._plan = None  # The reservation will be another one when the next attempt is covered.
        return Charge(
            self._budget, want, self.policy, self._record, self._targets, self.request_id, parent=self, key=self._key
        )

    def _expected(self, plan: Plan) -> int:
        return plan.estimate.expected

    def _promised(self, plan: Plan) -> int:
        """As much as was reserved for it."""
        if self.policy.settings.estimate != "max":
            return plan.estimate.expected
        most = plan.estimate.most
        return most if plan.output_cap is None else min(most, plan.output_cap * self.want.choices)

    def _book(self, attempt: Attempt, line: Line, learn: bool) -> None:
        held, account = self.held, attempt.plan.account
        if account is not None:
            apart = held.apart.setdefault(account.name, [0, 0, 0])
            apart[1] += line.usage.total
            apart[2] += line.nano_usd or 0
        held.entries.extend(entries_of((line,), recorded=self._budget.recorded))
        if learn:
            output = -(-line.usage.output // self.want.choices)
            self._budget.expectations.saw(self.policy.tenant, line.target.label, output)
