"""What is asked of the store for a charge, and what its verdicts mean. The shell: what decides stands elsewhere.

`plan` says how much to ask for, `answers` what to say, `watch` and `local` what to go by while the store is away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Coroutine
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final

from proxy.budget import answers
from proxy.budget.access import Access
from proxy.budget.amounts import MAX_AMOUNT, Amounts
from proxy.budget.counting import BYTES_PER_TOKEN, bounded, count
from proxy.budget.estimate import Exposure
from proxy.budget.held import NO_RISK, Held
from proxy.budget.local import Slices
from proxy.budget.plan import Plan, Planner, Want, exceeds
from proxy.budget.policy import Bound, Policy, reach_of
from proxy.budget.pricing import cost, unknown_refused
from proxy.budget.refusals import Refusals
from proxy.budget.spare import is_far_below
from proxy.budget.tender import LEASE_MS
from proxy.budget.waiting import Waiting
from proxy.errors import ProxyError
from proxy.store.base import NOTHING, Ended, Granted, Refused, Reservation, Settlement, StoreUnavailable
from proxy.tokens.count import Counter
from proxy.types import Headers, Target, Usage

if TYPE_CHECKING:
    from proxy.budget.charge import Charge


_PRICED_LATER: Final = ("passthrough", "models")
"""What a reply that is passed through costs is seen by its own usage, or never known."""


class Admission:
    """`clock` is the event loop's, in seconds.

    `observe` is told, for each request that was settled, the tokens it took and the tokens that were reserved.
    """

    def __init__(
        self,
        access: Access,
        planner: Planner,
        counter: Counter,
        refusals: Refusals,
        slices: Slices,
        waiting: Waiting,
        clock: Callable[[], float],
        observe: Callable[[int, int], None],
    ) -> None:
        self.observe = observe
        self.exposures: defaultdict[str, Exposure] = defaultdict(Exposure)
        """By place of a scope: what is at risk in this process."""
        self.access = access
        self._planner = planner
        self._counter = counter
        self._refusals = refusals
        self._slices = slices
        self._waiting = waiting
        self._clock = clock

    def rate_limits(self, policy: Policy, refused: Refused | None = None) -> Headers:
        """The `x-ratelimit-*` headers of a caller, as of the last answer that this process had of the store."""
        if not policy.enforces:
            return []
        seen = self.access.watch.row
        rows = [(scope, row) for scope in policy.own if scope.enforced and (row := seen(scope)) is not None]
        return answers.rate_limit_headers(rows, refused)

    def take(self, charge: Charge, target: Target) -> Coroutine[Any, Any, Plan]:
        """Covers an attempt at `target`, beside all that went before. Raises what `Charge.cover` raises."""
        held, bound = charge.held, charge.policy.at(target.provider)
        if held.state is None or (held.state == "open" and bound.reserves and not charge.degraded):
            return self._reserve(charge, target)
        return self._take_more(charge, target, bound)

    async def _take_more(self, charge: Charge, target: Target, bound: Bound) -> Plan:
        held, want = charge.held, charge.want
        if bound.enforced:
            await count(self._counter, want, target)
        else:
            self._guess(want)
        plan = self._plan(charge, target)
        if held.local is not None:
            refused = await self._take_slice(charge, plan, self._total(held, plan.ask), StoreUnavailable("open"))
            if refused is not None:
                raise self._refusal(charge, refused)
        elif held.state == "asked":
            return await self._raise(charge, plan)
        return plan

    # -- how much ----------------------------------------------------------------------------------------------------

    async def _sized(self, charge: Charge, target: Target, *, exactly: bool) -> Plan:
        """What an attempt at `target` is to reserve. Counts its input where a limit is near, or `exactly`."""
        want, policy = charge.want, charge.policy
        bound = policy.at(target.provider)
        if not bound.enforced:
            self._guess(want)
        elif not exactly and policy.settings.estimate == "adaptive" and bounded(want, bound.far):
            plan = self._planner.plan(want, policy, target, self.exposures, self.access.processes)
            row = self.access.watch.row
            if is_far_below(plan.ask, ((scope, row(scope)) for scope in bound.limiting)):
                return self._checked(charge, plan)
            await count(self._counter, want, target)
        else:
            await count(self._counter, want, target)
        return self._plan(charge, target)

    @staticmethod
    def _guess(want: Want) -> None:
        """Good enough to watch by."""
        if want.ask.fields and not want.counted:
            want.input_tokens = len(want.ask.call.body) // BYTES_PER_TOKEN

    def _plan(self, charge: Charge, target: Target) -> Plan:
        """Raises ModelPriceUnknown, RequestExceedsBudget."""
        plan = self._planner.plan(charge.want, charge.policy, target, self.exposures, self.access.processes)
        return self._checked(charge, plan)

    def _checked(self, charge: Charge, plan: Plan) -> Plan:
        policy, target = charge.policy, plan.target
        bound = policy.at(target.provider)
        if plan.rates is None and charge.want.ask.dialect not in _PRICED_LATER:
            limited = bound.reach.nano_usd is not None
            if policy.enforces and unknown_refused(policy.settings.on_unknown_price, usd_limited=limited):
                raise answers.price_unknown(target)
        if exceeds(plan, bound.reach):
            raise answers.request_exceeds(plan, [(one, reach_of(one.limits)) for one in bound.scopes if one.enforced])
        return plan

    # -- while it runs, and at its end -------------------------------------------------------------------------------

    async def grow(self, charge: Charge, plan: Plan, output_tokens: int) -> bool:
        """Covers a longer reply of the attempt that runs. False: there is no room, or nobody to ask."""
        held = charge.held
        if held.state != "asked":
            return True
        input_tokens = plan.estimate.input
        nano = 0 if plan.rates is None else cost(Usage(input_tokens, output_tokens), plan.rates)
        ask = self._total(held, Amounts(1, input_tokens + output_tokens, nano))
        try:
            verdict = await self.access.top_up(held.id, ask, charge.policy.at(plan.target.provider).scopes, ())
            if isinstance(verdict, Ended):
                verdict = await self._anew(charge, plan, ask)
        except StoreUnavailable:
            return charge.policy.settings.on_store_error == "allow" or not charge.policy.enforces
        if not isinstance(verdict, Granted):
            return False
        places, risk_tokens, risk_nano = held.risks
        risk_tokens -= ask.tokens - held.ask.tokens
        risk_nano -= ask.nano_usd - held.ask.nano_usd
        self.at_risk(held, places, max(risk_tokens, 0), max(risk_nano, 0))
        held.ask = ask
        return True

    async def _anew(self, charge: Charge, plan: Plan, ask: Amounts) -> Granted | Refused | Ended:
        """A reservation in place of one whose lease ran out while its attempt goes on. Raises StoreUnavailable."""
        policy, held = charge.policy, charge.held
        bound = policy.at(plan.target.provider)
        apart = () if held.provider is None else ((held.provider, NOTHING),)
        before = Settlement(held.id, bound.scopes, NOTHING, apart)
        held.id = token_hex(16)  # From here on this one is settled, with all that was spent, whatever happens below.
        try:
            return await self.access.reserve(Reservation(held.id, bound.scopes, ask, LEASE_MS, policy.settings.on_lost))
        finally:
            # What the lost one was charged is given back only now: nobody else can take that room in between.
            self.access.later(before)

    async def settle(self, held: Held, policy: Policy) -> None:
        """Books what was spent, gives back what was not, and calls whoever waits for room."""
        settlement = held.settlement(policy)
        if held.local is not None:
            try:
                await held.local.settle(settlement)
            except StoreUnavailable:
                pass  # That slice is gone, with the outage that it was for.
        await self.access.settle(settlement)
        if held.ask.tokens:
            self.observe(settlement.actual.tokens, held.ask.tokens)
        self._waiting.wake()

    def at_risk(self, held: Held, places: tuple[str, ...], tokens: int = 0, nano_usd: int = 0) -> None:
        """Enters what is at risk now, in place of what was."""
        before, before_tokens, before_nano = held.risks
        for place in before:
            self.exposures[place].drop(before_tokens, before_nano)
        if not (tokens or nano_usd):
            held.risks = NO_RISK
            return
        held.risks = (places, tokens, nano_usd)
        for place in places:
            self.exposures[place].add(tokens, nano_usd)

    # -- the store's verdicts ----------------------------------------------------------------------------------------

    async def _reserve(self, charge: Charge, target: Target) -> Plan:
        """A new reservation, at once or when its turn comes."""
        policy, waiting = charge.policy, self._waiting
        until = min(self._clock() + policy.settings.wait_ms / 1000, charge.want.deadline)
        again = bool(policy.settings.wait_ms) and waiting.queued(policy.tenant) and waiting.has_room()
        if again:  # Behind those who came before.
            await waiting.turn(policy.tenant, until - self._clock())
        exactly = False
        while True:
            plan = await self._sized(charge, target, exactly=exactly)
            refused = await self._ask(charge, plan)
            if refused is not None and not exactly and not charge.want.counted and bounded(charge.want, None):
                exactly = True  # Less than the bound may well fit.
                continue
            if refused is None:
                if again:
                    waiting.wake()  # There may be room for one more.
                return plan
            wait = min((refused.retry_after_ms or 0) / 1000, until - self._clock())
            elsewhere = refused.scope.kind == "provider" and charge.has_alternatives
            if wait <= 0 or elsewhere or not waiting.has_room():
                raise self._refusal(charge, refused)
            await waiting.turn(policy.tenant, wait, again=again)
            again = True

    async def _ask(self, charge: Charge, plan: Plan) -> Refused | None:
        """One reservation. None: it is held, or need not be. Raises StoreUnavailable of `errors`."""
        policy, held = charge.policy, charge.held
        bound = policy.at(plan.target.provider)
        if not bound.reserves:
            held.state = "open"
            return None
        self.at_risk(held, bound.places, plan.risk_tokens, plan.risk_nano_usd)
        for _ in range(2):
            held.ask = NOTHING
            ask = held.ask = self._total(held, plan.ask)
            held.state = "asked"
            wanted = Reservation(held.id, bound.scopes, ask, LEASE_MS, policy.settings.on_lost)
            try:
                verdict = await self.access.reserve(wanted)
            except StoreUnavailable as error:
                return await self._take_slice(charge, plan, ask, error)
            if isinstance(verdict, Granted):
                held.provider = plan.account
                self._watched(charge, verdict)
                return None
            if isinstance(verdict, Refused):
                held.state = None
                self.at_risk(held, ())
                return verdict
            held.renew()  # The id was used up: its lease ran out while the answer was on its way.
        raise answers.store_unavailable()

    async def _raise(self, charge: Charge, plan: Plan) -> Plan:
        """A further attempt under the same reservation."""
        policy, held = charge.policy, charge.held
        bound = policy.at(plan.target.provider)
        ask = self._total(held, plan.ask)
        same = plan.account is held.provider
        if same and ask == held.ask:
            return plan
        self.at_risk(held, bound.places, plan.risk_tokens, plan.risk_nano_usd)
        leave = () if same or held.provider is None else ((held.provider, held.account()),)
        try:
            verdict = await self.access.top_up(held.id, ask, bound.scopes, leave)
        except StoreUnavailable as error:
            refused = await self._take_slice(charge, plan, ask, error)
            if refused is not None:
                raise self._refusal(charge, refused) from error
            return plan
        if isinstance(verdict, Refused):
            raise self._refusal(charge, verdict)
        if isinstance(verdict, Ended):
            await self.access.settle(held.settlement(policy))
            held.renew()
            return await self._reserve(charge, plan.target)
        held.ask = ask
        if leave:
            held.apart.pop(leave[0][0].name, None)
        held.provider = plan.account
        self._watched(charge, verdict)
        return plan

    @staticmethod
    def _total(held: Held, ask: Amounts) -> Amounts:
        """What attempts that are over have cost, and this one's ask; never less than what is held."""
        if held.ask is NOTHING and not held.tokens and not held.nano_usd:
            return ask
        tokens = max(held.tokens + ask.tokens, held.ask.tokens)
        nano_usd = max(held.nano_usd + ask.nano_usd, held.ask.nano_usd)
        return Amounts(1, min(tokens, MAX_AMOUNT), min(nano_usd, MAX_AMOUNT))

    async def _take_slice(self, charge: Charge, plan: Plan, ask: Amounts, error: StoreUnavailable) -> Refused | None:
        """The store is away, and the tenant's policy says how to go on. Raises StoreUnavailable of `errors`."""
        policy, held, access = charge.policy, charge.held, self.access
        bound = policy.at(plan.target.provider)
        charge.degraded = True
        how = policy.settings.on_store_error
        if how == "allow" or not bound.enforced:
            held.state = "open"
            return None
        if not error.uncertain and held.attempts == 0:
            held.state = None  # Nothing reached the store, so nothing has to be taken back.
        if how == "deny" or not access.has_share or not access.has_room:
            raise answers.store_unavailable() from error
        self._slices.begin(access.outages, access.processes)
        try:
            verdict = await self._slices.reserve(Reservation(held.id, bound.scopes, ask, LEASE_MS * 100))
        except StoreUnavailable as ended:  # the process ends
            raise answers.store_unavailable() from ended
        if isinstance(verdict, Granted):
            held.state, held.local, held.provider, held.ask = "asked", self._slices.store, plan.account, ask
            access.took(Reservation(held.id, bound.scopes, ask, LEASE_MS, policy.settings.on_lost))
            return None
        if isinstance(verdict, Refused) and verdict.retry_after_ms is not None and verdict.window.endswith("minute"):
            return verdict
        raise answers.store_unavailable() from error

    def _refusal(self, charge: Charge, refused: Refused) -> ProxyError:
        self._refusals.enforced(charge.request_id, charge.policy.tenant, refused)
        headers = self.rate_limits(charge.policy, refused)
        if refused.scope.kind == "provider":
            return answers.provider_full(refused, headers)
        return answers.budget_exceeded(refused, headers)

    def _watched(self, charge: Charge, granted: Granted) -> None:
        if granted.over is not None:
            self._refusals.observed(charge.request_id, charge.policy.tenant, granted.over)
