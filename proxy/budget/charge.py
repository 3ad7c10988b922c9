"""What one request has reserved, and what it comes to. The shell around `plan`: it waits, and decides nothing.

Life of a charge, inside its `async with`::

    enter ── reserves for the first target with room               429, 400, 503
      cover(target) ── before each attempt: covers what this one may take, beside what earlier ones have cost
        answered(status), see(event) …, or failed(error)
      cover(target) …
    leave ── settles, whatever happened: exactly once, under a shield, waited for at most two seconds

The reservation's id is made before the store hears of it. So a reservation whose answer never came is settled too, and
a store that never got it has nothing to settle.

What an attempt costs: the provider's own figures, where it gives them. Else what was seen of it: the input, and the
output that was forwarded; after a timeout, what was expected, for the provider may well have made all of it. What the
provider refused, and what was never sent, costs nothing. Estimated figures say so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final

from proxy.budget.cut import Head
from proxy.budget.held import Attempt, Held, added
from proxy.budget.plan import Plan, Want
from proxy.budget.policy import Policy
from proxy.budget.pricing import cost
from proxy.budget.records import Line, entry_of
from proxy.errors import (
    ConnectFailed,
    ModelPriceUnknown,
    ProviderFull,
    ProxyError,
    RequestExceedsBudget,
    UpstreamTimeout,
)
from proxy.tokens.encodings import encoding_of
from proxy.tokens.meter import Meter
from proxy.types import Event, Headers, Record, Target, Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.budget.hold import Budget

Job = Callable[[], Awaitable[None]]
Later = Callable[[Job], None]

SETTLE_SECONDS: Final = 2.0
NEAR: Final = 0.9
"""Of its reserved output, what a stream may have made before it asks for more."""
BYTES_PER_TOKEN: Final = 4
"""Before a stream was first measured: fewer bytes than this make no token, and that is enough to know."""


class Charge:
    """Made by `Budget.hold`. One task uses it."""

    def __init__(
        self,
        budget: Budget,
        want: Want,
        policy: Policy,
        record: Record,
        targets: Sequence[Target],
        request_id: str,
        parent: Charge | None = None,
        key: str = "",
        afterwards: Later | None = None,
    ) -> None:
        """`key` names the caller's key in the ledger. `afterwards` runs a job once the client has its last byte."""
        self.want = want
        self.policy = policy
        self.degraded = False
        """The store was away when it was asked: the answer carries `x-breakwater-degraded`."""
        self.head = Head()
        """Of the stream, for `cut.ending`."""
        self._budget = budget
        self._record = record
        self._targets = targets
        self.request_id = request_id
        self._key = key
        self._afterwards = afterwards
        self._parent = parent
        self.held: Held = parent.held if parent is not None else Held()
        self._plan: Plan | None = None
        """What is reserved for the next attempt."""
        self._attempt: Attempt | None = None
        self._full: dict[Target, ProviderFull] = {}
        self._grows = True
        self.output_cap: int | None = None
        """After `cover`: output tokens for one choice that the upstream must be told (`max_completion_tokens`), where
        the client set no maximum; None: nothing."""

    @property
    def has_alternatives(self) -> bool:
        return len(self._targets) > 1

    def headers(self) -> Headers:
        """The `x-ratelimit-*` headers, as of the last answer of the store."""
        return self._budget.rate_limits(self.policy)

    def _tell_state(self) -> None:
        self._record.rate_limits = self.headers()
        if self.degraded:
            self._record.degraded = True

    # -- enter and leave ---------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Charge:
        try:
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
        closing = partial(self._close, complete=kind is None)
        if self._afterwards is None:
            await closing()
        else:
            self._afterwards(self._budget.later(closing))

    async def _open(self) -> None:
        if self._parent is not None:
            return  # It is covered when its first attempt is.
        refused: ProxyError | None = None
        for target in self._targets:
            try:
                self._plan = await self._budget.take(self, target)
            except ProviderFull as full:
                self._full[target] = full
            except (ModelPriceUnknown, RequestExceedsBudget) as error:
                refused = refused or error  # Another target may have a price, or a lower one.
            else:
                return
        if self._full:
            raise min(self._full.values(), key=lambda full: full.retry_after_ms)
        assert refused is not None
        raise refused

    async def _close(self, *, complete: bool) -> None:
        attempt = self._attempt
        if self._budget.prompt and (attempt is None or attempt.usage is not None):
            # Nothing to count, and a store that never waits: no cancellation can come in between.
            await self._finish(complete=complete)
            return
        finishing = self._budget.track(self._finish(complete=complete))
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                await asyncio.shield(finishing)
        except TimeoutError:
            pass  # It goes on by itself, and its owner waits for it at the end of the process.

    async def _finish(self, *, complete: bool) -> None:
        try:
            await self._end_attempt(complete=complete)
        finally:
            if self._parent is None:
                await self._settle()

    async def _settle(self) -> None:
        held, budget = self.held, self._budget
        budget.at_risk(held, ())
        self._record.nano_usd = None if held.unpriced else held.before_nano_usd + held.nano_usd
        if held.state is not None or held.entries:
            await budget.settle(held, self.policy)

    # -- attempts ----------------------------------------------------------------------------------------------------

    async def cover(self, target: Target) -> None:
        """Before each attempt. Raises ProviderFull (try another target), BudgetExceeded, ModelPriceUnknown,
        RequestExceedsBudget, StoreUnavailable."""
        await self._end_attempt(complete=False)
        if (full := self._full.pop(target, None)) is not None:
            raise full
        plan, self._plan = self._plan, None
        if plan is None or plan.target != target:
            plan = await self._budget.take(self, target)
        held = self.held
        self.output_cap = plan.output_cap
        self._grows = held.state == "asked" and self.policy.at(target.provider).enforced
        held.attempts += 1
        if plan.account is not None:
            held.apart.setdefault(plan.account.name, [0, 0, 0])[0] += 1
        self._attempt = Attempt(plan, Meter() if self.want.ask.dialect != "passthrough" else None)
        if self.degraded:
            self._record.degraded = True
        self._attempt.next_check = int(plan.estimate.expected * BYTES_PER_TOKEN * NEAR)

    def answered(self, status: int) -> None:
        """The provider's answer has begun."""
        assert self._attempt is not None
        self._attempt.status = status

    def failed(self, error: ProxyError) -> None:
        """The attempt is over, and this is why."""
        if self._attempt is not None:
            self._attempt.failed = error

    def see(self, event: Event) -> bool:
        """Takes note of what is forwarded. True: `grow` is to be asked before more is."""
        attempt = self._attempt
        assert attempt is not None
        attempt.seen_bytes += len(event.data)
        if event.usage is not None:
            attempt.usage = event.usage
            self._tell(attempt.plan, event.usage)
        elif attempt.meter is not None:
            attempt.meter.see(event.data)
        if not self.want.ask.stream:
            self._record.costs = attempt.status < 300
            return False
        self.head.see(event.data)
        return self._grows and not event.terminator and attempt.seen_bytes > attempt.next_check

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
        if not await self._budget.grow(self, plan, 2 * max(attempt.measured, room, 64)):
            self._grows = False
            return not (self.policy.enforces and self.policy.settings.on_overrun == "cut")
        attempt.next_check = attempt.seen_bytes + 1024
        return True

    def child(self, want: Want) -> Charge:
        """For a further upstream call of the same client request: a repair, a summary. Use it as `async with` too.

        It shares the reservation, which its `cover` raises, and is settled with it.
        """
        return Charge(
            self._budget, want, self.policy, self._record, self._targets, self.request_id, parent=self, key=self._key
        )

    def _tell(self, plan: Plan, usage: Usage) -> None:
        """What is known before the books are closed: for headers and the trailer."""
        held, record = self.held, self._record
        record.usage = usage if held.usage is None else added(held.usage, usage)
        nano = None if held.unpriced else self._cost(plan, usage)
        record.nano_usd = None if nano is None else held.before_nano_usd + held.nano_usd + nano
        record.costs = True

    def _cost(self, plan: Plan, usage: Usage) -> int | None:
        return None if plan.rates is None or self.want.ask.dialect == "passthrough" else cost(usage, plan.rates)

    # -- what an attempt comes to ------------------------------------------------------------------------------------

    async def _end_attempt(self, *, complete: bool) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        usage = attempt.usage
        try:
            if usage is None:
                usage = await self._estimated(attempt)
        finally:
            self._bill(attempt, usage, complete=complete)

    async def _estimated(self, attempt: Attempt) -> Usage | None:
        """What an attempt came to of which the provider said nothing; None: nothing."""
        if attempt.status >= 300 or isinstance(attempt.failed, ConnectFailed):
            return None
        await self._budget.count(self.want, attempt.plan.target)
        given = self.want.input_tokens
        if attempt.status == 0:
            if attempt.failed is None:
                return Usage(given, 0, estimated=True)  # The client left while the provider was at work.
            if isinstance(attempt.failed, UpstreamTimeout):
                return Usage(given, attempt.plan.estimate.expected, estimated=True)
            return None
        if attempt.meter is None:
            return Usage(estimated=True)  # A pass-through: it was used, and nobody knows how much.
        return Usage(given, await self._output_of(attempt), estimated=True)

    async def _output_of(self, attempt: Attempt) -> int:
        if attempt.usage is not None:
            return attempt.usage.output
        if attempt.meter is None or not attempt.seen_bytes:
            return 0
        return await attempt.meter.output_tokens(self._budget.counter, encoding_of(attempt.plan.target.model))

    def _bill(self, attempt: Attempt, usage: Usage | None, *, complete: bool) -> None:
        if usage is None:
            return
        held, plan = self.held, attempt.plan
        nano = self._cost(plan, usage)
        held.tokens += usage.total
        held.nano_usd += nano or 0
        held.unpriced = held.unpriced or nano is None
        if plan.account is not None:
            apart = held.apart.setdefault(plan.account.name, [0, 0, 0])
            apart[1] += usage.total
            apart[2] += nano or 0
        held.entries.append(
            entry_of(
                Line(
                    held.id,
                    self._budget.wall_ms(),
                    self.request_id,
                    self.policy.tenant,
                    self._key,
                    plan.target,
                    self.want.tags,
                    usage,
                    nano,
                    attempt.status,
                    held.attempts,
                )
            )
        )
        if attempt.meter is not None or not usage.estimated:
            held.usage = self._record.usage = usage if held.usage is None else added(held.usage, usage)
        if complete and not usage.estimated and self.want.generates:
            self._budget.learn(self.policy.tenant, plan, usage, self.want.choices)
