"""What one client request comes to, where nothing is reserved for it: nobody can refuse it, so nobody is asked first.

Life of a tab, inside its `async with`; a `charge`, which reserves as well, has the same::

    enter
      cover(target) ── before each attempt
        answered(status), see(event) …, or failed(error)
      cover(target) …
    leave ── books what it came to, whatever happened: exactly once

What an attempt costs: the provider's own figures, where it gives them. Else what was seen of it: the input, and the
output that was forwarded; after a timeout, what was expected, for the provider may well have made all of it. What the
provider refused, and what was never sent, costs nothing. Estimated figures say so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final

from proxy.budget.counting import count
from proxy.budget.cut import Head
from proxy.budget.held import Attempt, Spent, added
from proxy.budget.plan import Plan, Want
from proxy.budget.policy import Policy
from proxy.budget.pricing import cost
from proxy.budget.records import Line
from proxy.errors import ProxyError, UpstreamError
from proxy.tokens.encodings import encoding_of
from proxy.tokens.meter import Meter
from proxy.types import Event, Headers, Record, Target, Usage

if TYPE_CHECKING:
    from proxy.budget.hold import Budget

Job = Callable[[], Awaitable[None]]
Later = Callable[[Job], None]

SETTLE_SECONDS: Final = 2.0


class Tab:
    """Made by `Budget.hold`. One task uses it."""

    __slots__ = ("_afterwards", "_attempt", "_budget", "_ending", "_head", "_key", "_parent", "_record", "_spent",
                 "_targets", "degraded", "output_cap", "policy", "request_id", "want")  # fmt: skip

    def __init__(
        self,
        budget: Budget,
        want: Want,
        policy: Policy,
        record: Record,
        targets: Sequence[Target],
        request_id: str,
        spent: Spent,
        *,
        parent: Tab | None = None,
        key: str = "",
        afterwards: Later | None = None,
    ) -> None:
        """`key` names the caller's key in the ledger. `afterwards` runs a job once the client has its last byte."""
        self.want = want
        self.policy = policy
        self.request_id = request_id
        self.degraded = False
        """The store was away when it was asked: the answer carries `x-breakwater-degraded`."""
        self.output_cap: int | None = None
        """After `cover`: output tokens for one choice that the upstream must be told (`max_completion_tokens`), where
        the client set no maximum; None: nothing."""
        self._budget = budget
        self._record = record
        self._targets = targets
        self._spent = spent
        self._parent = parent
        self._key = key
        self._afterwards = afterwards
        self._attempt: Attempt | None = None
        self._ending: list[asyncio.Task[None]] = []
        """Attempts that others have followed, and that are still being counted."""
        self._head: Head | None = None

    @property
    def head(self) -> Head:
        """Of the stream, for `cut.ending`."""
        if self._head is None:
            self._head = Head()
        return self._head

    def headers(self) -> Headers:
        """The `x-ratelimit-*` headers, as of the last answer of the store."""
        return self._budget.admission.rate_limits(self.policy)

    # -- enter and leave ---------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Tab:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._must_count():
            await self._leave(partial(self._close, complete=kind is None))
        else:
            self._end_known(complete=kind is None)

    def _must_count(self) -> bool:
        """Whether the books cannot be closed without waiting."""
        attempt = self._attempt
        return bool(self._ending) or (attempt is not None and attempt.usage is None and attempt.status < 300)

    def _end_known(self, *, complete: bool) -> None:
        """Ends an attempt that need not be counted."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None and attempt.usage is not None:
            self._bill(attempt, attempt.usage, complete=complete)

    async def _leave(self, closing: Job) -> None:
        if self._afterwards is None:
            await closing()
        else:
            self._afterwards(self._budget.later(closing))

    async def _close(self, *, complete: bool) -> None:
        """Finishes under a shield, waited for at most two seconds."""
        finishing = self._budget.track(self._finish(complete=complete))
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                await asyncio.shield(finishing)
        except TimeoutError:
            pass  # It goes on by itself, and its owner waits for it at the end of the process.

    async def _finish(self, *, complete: bool) -> None:
        try:
            if self._ending:
                for found in await asyncio.gather(*self._ending, return_exceptions=True):
                    if found is not None:
                        raise found
        finally:
            await self._end_attempt(complete=complete)

    # -- attempts ----------------------------------------------------------------------------------------------------

    async def cover(self, target: Target) -> None:
        """Before each attempt. Raises nothing, where nobody can refuse."""
        if self._attempt is not None:
            await self._follow()
        self._begin(self._budget.unreserved(self, target))

    def _begin(self, plan: Plan) -> Attempt:
        self._spent.attempts += 1
        self._attempt = attempt = Attempt(plan, self._spent.attempts)
        return attempt

    async def _follow(self) -> asyncio.Task[None] | None:
        """Closes the books of an attempt, so that another one can follow. Does not wait for what must be counted: that
        is a task, which goes on whatever becomes of the caller, and which leaving waits for."""
        attempt = self._attempt
        if attempt is None or attempt.usage is not None or not self._was_used(attempt):
            await self._end_attempt(complete=False)
            return None
        self._attempt = None
        task = self._budget.track(self._end_meanwhile(attempt))
        self._ending.append(task)
        return task

    async def _end_meanwhile(self, attempt: Attempt) -> None:
        await self._end(attempt, complete=False)
        going_on = self._attempt
        if going_on is not None and going_on.usage is not None:
            self._tell(going_on, going_on.usage)  # beside what is known now

    def answered(self, status: int) -> None:
        """The provider's answer has begun."""
        attempt = self._attempt
        assert attempt is not None
        attempt.status = status
        if status < 300 and self.want.free:
            attempt.usage = Usage()
            self._tell(attempt, attempt.usage)

    def failed(self, error: ProxyError) -> None:
        """The attempt is over, and this is why."""
        if self._attempt is not None:
            self._attempt.failed = error

    def see(self, event: Event) -> bool:
        """Takes note of what is forwarded. True: `grow` is to be asked before more is."""
        attempt = self._attempt
        assert attempt is not None
        usage = event.usage
        if usage is not None:
            attempt.usage = usage
            self._tell(attempt, usage)
            return False
        if attempt.meter is not None:
            attempt.meter.see(event.data)
        elif self.want.ask.dialect != "passthrough":
            attempt.meter = Meter()
            attempt.meter.see(event.data)
        if not self.want.ask.stream:
            self._record.costs = attempt.status < 300
        return False

    async def grow(self) -> bool:
        """False: the stream has outgrown what it may have, and is to be cut (`cut.ending`)."""
        return True

    def child(self, want: Want) -> Tab:
        """For a further upstream call of the same client request: a repair, a summary. Use it as `async with` too.

        What it comes to is told together with its parent's.
        """
        return Tab(
            self._budget, want, self.policy, self._record, self._targets, self.request_id, self._spent,
            parent=self, key=self._key,
        )  # fmt: skip

    def _tell(self, attempt: Attempt, usage: Usage) -> None:
        """What is known before the books are closed: for headers and the trailer."""
        spent, record = self._spent, self._record
        attempt.nano_usd = nano = self._cost(attempt.plan, usage)
        for task in self._ending:
            if not task.done() and task is not asyncio.current_task():
                return  # the rest of it is not known yet
        if spent.usage is None:
            record.usage = usage
        else:
            record.usage = added(spent.usage, usage)
        record.nano_usd = None if nano is None or spent.unpriced else spent.before_nano_usd + spent.nano_usd + nano
        record.costs = True

    def _cost(self, plan: Plan, usage: Usage) -> int | None:
        if self.want.free:
            return 0
        if self.want.ask.dialect == "passthrough" and (usage.estimated or not plan.target.model):
            return None
        return None if plan.rates is None else cost(usage, plan.rates)

    # -- what an attempt comes to ------------------------------------------------------------------------------------

    async def _end_attempt(self, *, complete: bool) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            await self._end(attempt, complete=complete)

    async def _end(self, attempt: Attempt, *, complete: bool) -> None:
        usage = attempt.usage
        try:
            if usage is None and self._was_used(attempt):
                usage = await self._estimated(attempt)
                attempt.nano_usd = self._cost(attempt.plan, usage)
        finally:
            if usage is not None:
                self._bill(attempt, usage, complete=complete)

    def _was_used(self, attempt: Attempt) -> bool:
        """Whether it may have cost something, although the provider said nothing of it."""
        failed = attempt.failed
        late = isinstance(failed, UpstreamError) and failed.timed_out
        refused = attempt.status == 0 and failed is not None and not late
        return not (attempt.status >= 300 or refused or self.want.free)

    async def _estimated(self, attempt: Attempt) -> Usage:
        """What an attempt came to of which the provider said nothing."""
        await count(self._budget.counter, self.want, attempt.plan.target)
        given = self.want.input_tokens
        if attempt.status == 0:
            # Without a failure the client left while the provider was at work.
            return Usage(given, 0 if attempt.failed is None else self._expected(attempt.plan), estimated=True)
        if self.want.ask.dialect == "passthrough":
            return Usage(estimated=True)  # It was used, and nobody knows how much.
        output = await self._output_of(attempt)
        if self.want.background:
            output = max(output, self._promised(attempt.plan))
        return Usage(given, output, estimated=True)

    def _expected(self, plan: Plan) -> int:
        return self._budget.expected(self, plan.target)

    def _promised(self, plan: Plan) -> int:
        """Output that the provider goes on to make when we have gone."""
        return self._expected(plan)

    async def _output_of(self, attempt: Attempt) -> int:
        if attempt.usage is not None:
            return attempt.usage.output
        if attempt.meter is None:
            return 0
        return await attempt.meter.output_tokens(self._budget.counter, encoding_of(attempt.plan.target.model))

    def _bill(self, attempt: Attempt, usage: Usage, *, complete: bool) -> None:
        spent, record, nano, want = self._spent, self._record, attempt.nano_usd, self.want
        spent.tokens += usage.input + usage.output
        if nano is None:
            spent.unpriced = True
        else:
            spent.nano_usd += nano
        if not usage.estimated or want.ask.dialect != "passthrough":
            spent.usage = record.usage = usage if spent.usage is None else added(spent.usage, usage)
        record.nano_usd = None if spent.unpriced else spent.before_nano_usd + spent.nano_usd
        record.unpriced = spent.unpriced
        line = Line(
            spent.id, self._budget.wall_ms(), self.request_id, self.policy.tenant, self._key,
            attempt.plan.target, want.tags, usage, nano, attempt.status, attempt.number,
        )  # fmt: skip
        self._book(attempt, line, complete and not usage.estimated and want.generates)

    def _book(self, attempt: Attempt, line: Line, learn: bool) -> None:
        self._budget.daybook.add(self.policy, line, self.want.choices if learn else 0)
