"""What of a request each of its targets gets. The shell: where the time goes and who is told.

Whatever is decided here is decided by the array that the client sent: `limits` how much may stay, `atoms` what belongs
together, `trim` where the cut is, `rewrite` the bytes. So the same conversation is cut at the same place by every
process and for every turn, until it reaches the limit again.

Nearly every request is far below any limit: then the size of its prompt in bytes proves that it fits, and nothing is
counted.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Final, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from proxy.context import answers
from proxy.context.atoms import Atom, Untrimmable, atoms_of
from proxy.context.base import Complete, Sent, View, Whole
from proxy.context.digest import NOTE_TOKENS, SummaryFailed, note
from proxy.context.limits import corrected, limit_of
from proxy.context.rewrite import MARKER_TOKENS, marker, mask_savings, rewritten
from proxy.context.settings import ContextSettings
from proxy.context.summary import Summaries
from proxy.context.trim import Cut, trim
from proxy.errors import ContextExceeded
from proxy.observability.context_events import ContextTrimmed
from proxy.observability.events import Notice
from proxy.tokens.bound import most_of, most_with
from proxy.tokens.count import Counter
from proxy.tokens.encodings import encoding_of
from proxy.tokens.recall import Measured
from proxy.types import Ask, Record, Target, Tenant, TooLong

_INLINE_BYTES: Final = 1_048_576
"""Of a conversation that is taken apart on the loop: some milliseconds."""
_Learned = dict[tuple[str, ...], tuple[int, float]]
"""Tokens, and until when they are believed."""
_CREDIBLE: Final = 1.5
"""A limit below so small a part of what was sent tells of an odd prompt, not of the next one."""
_LEARNED: Final = 1024
_LEARNED_SECONDS: Final = 3600.0

_T = TypeVar("_T")


class _Fit(NamedTuple):
    """What came of one target."""

    sent: Sent
    limit: int | None
    measured: Measured | None = None
    atoms: Sequence[Atom] = ()
    cut: Cut | None = None
    refused: ContextExceeded | None = None
    untouched: str = ""
    """Why nothing is removed although it is too long, or nobody knows how long it is."""


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
        self._window = window
        self._tokens_per_minute = tokens_per_minute
        self._clock = clock
        self._executor = executor
        self._named: _Learned = {}
        """Windows that providers have named when they refused, by provider and model."""
        self._felt: _Learned = {}
        """Limits of prompts where a provider has refused without a figure, by tenant, provider and model: what made it
        refuse is one tenant's own, and so is what follows from it."""

    def view(self, ask: Ask, targets: Sequence[Target], tenant: Tenant, output: int | None, record: Record) -> View:
        """`output`: the request's own maximum for one choice."""
        settings = self._tenants.get(tenant.name, self._settings)
        if settings.mode == "off" or ask.dialect not in answers.MEMBERS:
            return Whole(ask)
        return RequestView(self, ask, targets, tenant, settings, output or 0, record)

    def window(self, target: Target) -> int | None:
        """Tokens of input and output together."""
        known = self._window(target)
        named = self._of(self._named, (target.provider, target.model)) if self._named else None
        return known if named is None else named if known is None else min(named, known)

    def felt(self, tenant: Tenant, target: Target) -> int | None:
        """Tokens of a prompt that a provider may not refuse, as far as it has let on."""
        return self._of(self._felt, (tenant.name, target.provider, target.model)) if self._felt else None

    def tokens_per_minute(self, tenant: Tenant) -> int | None:
        return self._tokens_per_minute(tenant.name, tenant.key)

    def learn(self, tenant: Tenant, target: Target, refusal: TooLong, *, sent: int, limit: int) -> None:
        """A provider has refused `sent` tokens. If it names a window that is news, that is believed; else that it wants
        at most `limit` (0: that says nothing of other prompts). For an hour: behind some names stand several servers.
        """
        window, known = refusal.window, self.window(target)
        if window is not None and (known is None or window < known):
            self._keep(self._named, (target.provider, target.model), window)
        elif limit * _CREDIBLE >= sent:
            self._keep(self._felt, (tenant.name, target.provider, target.model), limit)

    def _keep(self, where: _Learned, place: tuple[str, ...], tokens: int) -> None:
        where.pop(place, None)
        if len(where) >= _LEARNED:
            del where[next(iter(where))]
        where[place] = (tokens, self._clock() + _LEARNED_SECONDS)

    def _of(self, where: _Learned, place: tuple[str, ...]) -> int | None:
        found = where.get(place)
        if found is None:
            return None
        if found[1] <= self._clock():
            del where[place]
            return None
        return found[0]

    async def run(self, size: int, work: Callable[[], _T]) -> _T:
        """`work` on a conversation of so many bytes. If the caller leaves, a thread may end it in vain."""
        if size <= _INLINE_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


class RequestView:
    """See `View`. One task uses it."""

    __slots__ = ("_ask", "_context", "_fits", "_limits", "_output", "_record", "_refitted", "_settings", "_tenant",
                 "complete", "most", "needed")  # fmt: skip

    def __init__(
        self,
        context: Context,
        ask: Ask,
        targets: Sequence[Target],
        tenant: Tenant,
        settings: ContextSettings,
        output: int,
        record: Record,
    ) -> None:
        self.complete: Complete | None = None
        """Asks a model on behalf of this request; None: nobody does."""
        self._context = context
        self._ask = ask
        self._tenant = tenant
        self._settings = settings
        self._output = output
        self._record = record
        self._refitted: set[Target] | None = None
        self._fits: dict[Target, _Fit] = {}
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
        window = context.window(target)
        if window is not None and answers.cut_by_provider(self._ask):
            window = None
        limit = limit_of(settings.max_tokens, window, context.tokens_per_minute(self._tenant), self._output)
        felt = context.felt(self._tenant, target)
        return limit if felt is None else felt if limit is None else min(felt, limit)

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
        if answers.kept_elsewhere(self._ask) or (refusal.output or 0) >= (refusal.window or math.inf):
            return None  # No shorter prompt helps where the reply alone may fill the window.
        before = self._fits.get(target)
        measured = await self._measure(target)
        sent = before.cut.after if before is not None and before.cut is not None else _total(measured)
        limit = corrected(sent, refusal, self._output)
        self._context.learn(self._tenant, target, refusal, sent=sent, limit=0 if measured.media.tokens else limit)
        fit = await self._make(target, limit)
        if fit.cut is None or fit.refused is not None or fit.cut.after >= sent:
            return None
        self._fits[target] = fit
        return await self._told(target, fit)

    # -- one target --------------------------------------------------------------------------------------------------

    async def _fit(self, target: Target) -> _Fit:
        fit = self._fits.get(target)
        if fit is None:
            fit = self._fits[target] = await self._make(target, self._limit(target))
        return fit

    async def _measure(self, target: Target) -> Measured:
        ask = self._ask
        return await self._context.counter.measure(ask.dialect, ask.fields, encoding_of(target.model), target.model)

    async def _make(self, target: Target, limit: int | None) -> _Fit:
        ask = self._ask
        most = None if limit is None else most_of(ask.dialect, ask.fields, limit)
        if limit is None or most is not None:
            return _Fit(Sent(ask, 0, most or 0), limit)
        measured = await self._measure(target)
        total = _total(measured)
        whole = Sent(ask, measured.total, max(most_with(ask.dialect, ask.fields, measured.media), measured.total))
        if total <= limit:
            return _Fit(whole, limit, measured)
        try:
            atoms, cut = await self._context.run(len(ask.call.body), lambda: self._cut(measured, limit))
        except Untrimmable as error:
            refused = self._refusal(answers.cannot_shorten(ask, limit, total, error))
            return _Fit(whole, limit, measured, refused=refused, untouched=error.reason)
        acts = self._settings.mode == "enforce"
        if not cut.fits and (self._settings.preflight_check or not acts):
            refused = self._refusal(answers.cannot_fit(ask, limit, cut))
            return _Fit(whole, limit, measured, refused=refused, untouched="cannot_fit")
        if not (cut.stages or cut.masked):
            return _Fit(whole, limit, measured)
        sent = whole
        if acts:
            note = marker(cut, measured.each, atoms) if cut.stages else None
            sent = self._sent(measured, atoms, cut, note)
        return _Fit(sent, limit, measured, atoms, cut)

    def _cut(self, measured: Measured, limit: int) -> tuple[Sequence[Atom], Cut]:
        """Raises Untrimmable."""
        dialect, settings, raws, each = self._ask.dialect, self._settings, measured.raws, measured.each
        if (dialect != "chat" and dialect != "responses") or not raws:
            raise Untrimmable("one_text" if measured.exact else "too_many_messages")
        atoms = atoms_of(dialect, raws)
        savings = mask_savings(dialect, raws, atoms, each) if settings.mask_tool_outputs else None
        low = int(limit * settings.trim_to)
        reserve = NOTE_TOKENS if settings.trim_strategy == "summary" else MARKER_TOKENS
        cut = trim(atoms, each, fixed=measured.fixed, high=limit, low=low, reserve=reserve, masks=savings)
        return atoms, cut

    def _refusal(self, error: ContextExceeded) -> ContextExceeded | None:
        settings = self._settings
        return error if settings.mode == "enforce" and settings.preflight_check else None

    def _sent(self, measured: Measured, atoms: Sequence[Atom], cut: Cut, note: str | None) -> Sent:
        ask, dialect = self._ask, self._ask.dialect
        assert dialect == "chat" or dialect == "responses"
        array = rewritten(dialect, measured.raws, atoms, cut, note, measured.each)
        fields = {**ask.fields, answers.ARRAYS[dialect]: msgspec.Raw(array)}
        edited = replace(ask, fields=fields, edited=True)
        return Sent(edited, cut.after, max(most_with(dialect, fields, measured.media), cut.after))

    # -- what is said of it ------------------------------------------------------------------------------------------

    async def _told(self, target: Target, fit: _Fit) -> Ask:
        """Tells the headers, the log and the metrics, and gives what is sent: with a summary, if there is one."""
        record, settings, cut = self._record, self._settings, fit.cut
        sent, failed = fit.sent, ""
        strategy: str = settings.trim_strategy
        acts = settings.mode == "enforce"
        if cut is not None and cut.stages and acts and strategy == "summary":
            strategy, failed, sent = await self._summarised(fit, cut)
        record.counted = sent.tokens
        record.context_tokens = record.context_trimmed = ""
        if fit.limit is not None:
            method = "bound" if fit.measured is None else "counted"
            record.context_tokens = answers.tokens_header(sent.tokens or sent.most, fit.limit, method)
        if cut is None:
            if fit.measured is not None:
                record.context_trimmed = answers.untrimmed_header(fit.untouched)
            return sent.ask
        dropped, place = answers.removed(cut, fit.atoms)
        record.context_trimmed = answers.trimmed_header(strategy, cut, dropped, place, failed=failed, acts=acts)
        call = self._ask.call
        self._context.emit(
            ContextTrimmed(
                request_id=call.request_id, trace_id=call.traceparent[3:35], tenant=record.tenant, model=record.model,
                target=f"{target.provider}/{target.model}", mode=settings.mode, strategy=strategy, limit=fit.limit or 0,
                before=cut.before, after=cut.after, dropped=dropped, cut=place, masked=len(cut.masked), fallback=failed,
            )
        )  # fmt: skip
        return sent.ask

    async def _summarised(self, fit: _Fit, cut: Cut) -> tuple[str, str, Sent]:
        """Strategy, reason why not, and what is sent."""
        model = self._settings.summary_model or ""
        summaries, measured, complete = self._context.summaries.get(model), fit.measured, self.complete
        if summaries is None or complete is None or measured is None:
            return "oldest", "unavailable", fit.sent
        raws, each, atoms = measured.raws, measured.each, fit.atoms
        try:
            found = await summaries.summary(self._tenant.name, self._ask.dialect, raws, atoms, each, cut, complete)
        except SummaryFailed as error:
            return "oldest", error.reason, fit.sent
        return "summary", "", self._sent(measured, atoms, cut, note(found.text, model, atoms, each, cut))


def _total(measured: Measured) -> int:
    return measured.fixed + sum(measured.each)
