"""What of a request each of its targets gets. The shell: where the time goes and who is told.

What is decided is decided in `fitting`, by the array that the client sent and nothing else: `limits` says how much may
stay, `atoms` what belongs together, `trim` where the cut is, `rewrite` the bytes. So the same conversation is cut at
the same place by every process and for every turn, until it reaches the limit again.

Nearly every request is far below any limit: then the size of its prompt in bytes proves that it fits, and nothing is
counted.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Final, TypeVar

from proxy.context import answers
from proxy.context.base import Complete, Sent, View, Whole
from proxy.context.digest import SummaryFailed, note
from proxy.context.fitting import Fit, Heads, fitted, shortened, total
from proxy.context.learned import Learned
from proxy.context.limits import corrected, limit_of
from proxy.context.settings import ContextSettings
from proxy.context.summary import Summaries
from proxy.context.trim import Cut
from proxy.observability.context_events import ContextTrimmed
from proxy.observability.events import Notice
from proxy.tokens.bound import most_of
from proxy.tokens.count import Counter
from proxy.tokens.encodings import encoding_of
from proxy.tokens.recall import Measured
from proxy.types import Ask, Record, Target, Tenant, TooLong

_INLINE_BYTES: Final = 1_048_576
_INLINE_MESSAGES: Final = 2048
"""Up to both of these a conversation is taken apart, and put together again, on the loop: some milliseconds."""

_T = TypeVar("_T")


class Context:
    """One for the process. `clock` is monotonic (seconds); `executor` takes apart what is too long for the loop."""

    def __init__(
        self,
        counter: Counter,
        settings: ContextSettings,
        *,
        tenants: Mapping[str, ContextSettings] | None = None,
        window: Callable[[Target], int | None],
        tokens_per_minute: Callable[[str, str], int | None],
        emit: Callable[[Notice], None],
        clock: Callable[[], float],
        executor: Executor | None = None,
        summaries: Mapping[str, Summaries] | None = None,
    ) -> None:
        """`tenants`: those with a section of their own, merged. `window`: of a target, by what is written or listed.
        `tokens_per_minute`: the smallest that is enforced on a tenant and its key. `summaries`: by model."""
        self.counter = counter
        self.emit = emit
        self.summaries = summaries or {}
        self._settings = settings
        self._tenants = tenants or {}
        self.window = window
        self.tokens_per_minute = tokens_per_minute
        self._executor = executor
        self.learned = Learned(clock)
        self.heads = Heads()

    def view(
        self,
        ask: Ask,
        targets: Sequence[Target],
        tenant: Tenant,
        output: int | None,
        record: Record,
        *,
        choices: int = 1,
        deadline: float = math.inf,
    ) -> View:
        """`output`: the request's own maximum for one of its `choices`; `deadline`: of the request, on the loop's
        clock."""
        settings = self._tenants.get(tenant.name, self._settings)
        if settings.mode == "off" or ask.dialect not in answers.MEMBERS or answers.compacts(ask):
            return Whole(ask)
        return RequestView(self, ask, targets, tenant, settings, output or 0, record, choices, deadline)

    async def run(self, ask: Ask, measured: Measured, work: Callable[[], _T]) -> _T:
        """`work` on a conversation. If the caller leaves, a thread may end it in vain."""
        if len(ask.call.body) <= _INLINE_BYTES and len(measured.raws) <= _INLINE_MESSAGES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


class RequestView:
    """See `View`. One task uses it."""

    __slots__ = ("_ask", "_choices", "_context", "_deadline", "_fits", "_minute", "_output", "_record", "_refitted",
                 "_said", "_settings", "_tenant", "complete", "most", "needed")  # fmt: skip

    def __init__(
        self,
        context: Context,
        ask: Ask,
        targets: Sequence[Target],
        tenant: Tenant,
        settings: ContextSettings,
        output: int,
        record: Record,
        choices: int,
        deadline: float,
    ) -> None:
        self.complete: Complete | None = None
        """Asks a model on behalf of this request; None: nobody does."""
        self._context = context
        self._ask = ask
        self._tenant = tenant
        self._settings = settings
        self._output = output
        self._record = record
        self._choices = choices
        self._minute = context.tokens_per_minute(tenant.name, tenant.key)
        self._deadline = deadline
        self._said: Fit | None = None
        """The last one that there was an event of."""
        self._refitted: set[Target] | None = None
        self._fits: dict[Target, Fit] = {}
        self.needed = False
        self.most: int | None = None
        least: int | None = None
        for target in targets:
            limit = self._limit(target)
            if limit is not None and (least is None or limit < least):
                least = limit
        if least is None:
            return
        elsewhere = answers.kept_elsewhere(ask)
        if elsewhere:
            record.context_trimmed = answers.untrimmed_header(elsewhere)
            return
        self.most = most = most_of(ask.dialect, ask.fields, least)
        if most is None:
            self.needed = True
        else:
            record.context_tokens = answers.tokens_header(most, least, "bound")

    def _limit(self, target: Target) -> int | None:
        context, settings = self._context, self._settings
        window = context.learned.window(self._tenant, target, context.window(target))
        if window is not None and answers.cut_by_provider(self._ask):
            window = None
        return limit_of(settings.max_tokens, window, self._minute, self._output, self._choices)

    # -- the port ----------------------------------------------------------------------------------------------------

    async def size(self, target: Target) -> Sent:
        fit = await self._fit(target)
        if fit.refused is not None:
            raise fit.refused
        return fit.sent

    async def fit(self, target: Target) -> Ask:
        fit = await self._fit(target)
        if fit.refused is not None:
            raise fit.refused
        return await self._told(target, fit)

    async def refit(self, target: Target, refusal: TooLong) -> Ask | None:
        if self._settings.mode != "enforce" or (self._refitted is not None and target in self._refitted):
            return None
        self._refitted = {*(self._refitted or ()), target}
        learned, known = self._context.learned, self._context.window(target)
        if answers.kept_elsewhere(self._ask):
            learned.refused(self._tenant, target, known, refusal)
            return None
        measured = await self._measure(target)
        before = self._fits.get(target)
        sent = before.cut.after if before is not None and before.cut is not None else total(measured)
        least = corrected(sent, refusal, self._output)
        texts = 0 if measured.media.tokens else sent
        learned.refused(self._tenant, target, known, refusal, sent=texts, room=least, output=self._output)
        if (refusal.output or 0) >= (refusal.window or math.inf):
            return None  # No shorter prompt helps where the reply alone may fill the window.
        limit = self._limit(target)
        fit = await self._make(target, least if limit is None else min(limit, least))
        if fit.cut is None or fit.refused is not None or fit.cut.after >= sent:
            return None
        self._fits[target] = fit
        self.needed = True  # from here on, what is sent is not what came
        return await self._told(target, fit)

    # -- one target --------------------------------------------------------------------------------------------------

    async def _fit(self, target: Target) -> Fit:
        fit = self._fits.get(target)
        if fit is None:
            fit = self._fits[target] = await self._make(target, self._limit(target))
        return fit

    async def _measure(self, target: Target) -> Measured:
        ask = self._ask
        return await self._context.counter.measure(ask.dialect, ask.fields, encoding_of(target.model), target.model)

    async def _make(self, target: Target, limit: int | None) -> Fit:
        ask = self._ask
        most = None if limit is None else most_of(ask.dialect, ask.fields, limit)
        if limit is None or most is not None:
            return Fit(Sent(ask, 0, most or 0), limit)
        measured, settings, heads = await self._measure(target), self._settings, self._context.heads
        return await self._context.run(ask, measured, lambda: fitted(ask, settings, limit, measured, heads))

    # -- what is said of it ------------------------------------------------------------------------------------------

    async def _told(self, target: Target, fit: Fit) -> Ask:
        """Tells the headers, the log and the metrics, and gives what is sent: with a summary, if there is one."""
        record, settings, cut = self._record, self._settings, fit.cut
        sent, failed = fit.sent, ""
        strategy: str = settings.trim_strategy
        acts = settings.mode == "enforce"
        record.counted = sent.tokens
        if cut is not None and cut.stages and acts and strategy == "summary":
            record.counted = 0  # Of a summary only the most is known; and its own call is in the usage, too.
            strategy, failed, sent = await self._summarised(fit, cut)
        record.context_tokens = record.context_trimmed = ""
        if fit.limit is not None:
            if fit.measured is None:
                tokens, method = sent.most, "bound"
            else:
                tokens, method = cut.after if cut is not None and acts else total(fit.measured), "counted"
            record.context_tokens = answers.tokens_header(tokens, fit.limit, method)
        if cut is None:
            if fit.measured is not None:
                record.context_trimmed = answers.untrimmed_header(fit.untouched)
            return sent.ask
        dropped, place = answers.removed(cut, fit.atoms)
        record.context_trimmed = answers.trimmed_header(strategy, cut, dropped, place, failed=failed, acts=acts)
        call, said, self._said = self._ask.call, self._said, fit
        if said is fit:  # sent once more as it was
            return sent.ask
        self._context.emit(
            ContextTrimmed(
                request_id=call.request_id, trace_id=call.traceparent[3:35], tenant=record.tenant, model=record.model,
                target=f"{target.provider}/{target.model}", mode=settings.mode, strategy=strategy, limit=fit.limit or 0,
                before=cut.before, after=cut.after, dropped=dropped, cut=place, masked=len(cut.masked), fallback=failed,
            )
        )  # fmt: skip
        return sent.ask

    async def _summarised(self, fit: Fit, cut: Cut) -> tuple[str, str, Sent]:
        """Strategy, reason why not, and what is sent."""
        model = self._settings.summary_model or ""
        summaries, measured, complete = self._context.summaries.get(model), fit.measured, self.complete
        if summaries is None or complete is None or measured is None:
            return "oldest", "unavailable", fit.sent
        ask, raws, each, atoms = self._ask, measured.raws, measured.each, fit.atoms
        now = asyncio.get_running_loop().time
        begun = now()
        seconds = (self._deadline - begun) / 2  # for the answer needs some, too
        try:
            found = await summaries.summary(
                self._tenant.name, ask.dialect, raws, atoms, each, cut, complete, seconds=seconds
            )
        except SummaryFailed as error:
            return "oldest", error.reason, fit.sent
        finally:
            if not self._record.attempts:  # else it is within the time since the last one
                self._record.elsewhere += now() - begun
        text = note(found.text, model, atoms, each, cut)
        return "summary", "", await self._context.run(ask, measured, lambda: shortened(ask, measured, atoms, cut, text))
