"""From a request and a target to what is reserved for it. Pure.

    judged     what it will take at least, by all that is known: larger than a window, it can never be served (400)
    expected   input, and the output that 95 of 100 replies stay within
    most       input, and the output that it can have at most, each token at its dearest price

`adaptive` reserves the expected as long as the sum of what is at risk stays within the limit, and the most beyond that.
A reservation never asks for more than a whole window holds: it would wait for ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec

from proxy.budget.amounts import MAX_AMOUNT, Amounts
from proxy.budget.estimate import Estimate, Expectations, Exposure, estimate
from proxy.budget.policy import Bound, Policy, Reach
from proxy.budget.pricing import PriceBook, Rates, ceiling, cost, dearest_output, usable
from proxy.context.base import View
from proxy.money import PER_MILLION
from proxy.store.base import NOTHING, Scope
from proxy.types import Ask, Target, Usage

_LIMITS: Final[Mapping[str, tuple[str, ...]]] = {
    "chat": ("max_completion_tokens", "max_tokens"),
    "completions": ("max_tokens",),
    "responses": ("max_output_tokens",),
}
"""What bounds the output. A name of another API bounds nothing: providers pass over it."""
_CROWD: Final = 32_768
_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Want(msgspec.Struct):
    """What a request asks for, as far as its price goes. Token counts are those of the input, media included."""

    ask: Ask
    input_tokens: int = 0
    """Counted; an estimate of what the provider will count."""
    input_bound: int = 0
    """The most that the input can be."""
    counted: bool = False
    """`input_tokens` is a count; else it may be that bound, or a guess to watch by."""
    asked: int | None = None
    """The client's own maximum of output tokens, for one choice."""
    choices: int = 1
    """Replies that are made, and billed."""
    returned: int = 1
    """Of these, how many the client gets."""
    service_tier: str = ""
    tags: str = ""
    background: bool = False
    """The reply is made whether or not anybody waits for it, and its usage is told to whoever asks later, or nobody."""
    deadline: float = math.inf
    """On the loop's clock: nobody waits for room beyond it."""
    view: View | None = None
    """What of it each target is sent; None: all."""

    @property
    def generates(self) -> bool:
        return self.ask.dialect not in ("embeddings", "passthrough", "models")

    @property
    def free(self) -> bool:
        return self.ask.objects is not None and self.ask.objects.free


def want_of(ask: Ask, tags: str = "") -> Want:
    """What the body says. The input is not counted yet. (`validation.requests` has checked the members.)"""
    fields = ask.fields
    asked: int | None = None
    for name in _LIMITS.get(ask.dialect, ()):
        if name in fields and isinstance(value := _decoded(fields[name]), int):
            asked = value if asked is None else max(asked, value)  # Of two, each server goes by one of its own choice.
    choices = returned = _count(fields, "n") if "n" in fields else 1
    if "best_of" in fields:
        choices = max(choices, _count(fields, "best_of"))
    if ask.dialect == "completions" and "prompt" in fields:
        prompts = _prompts(fields["prompt"])
        choices, returned = choices * prompts, returned * prompts
    tier = _decoded(fields["service_tier"]) if "service_tier" in fields else ""
    return Want(
        ask,
        asked=asked,
        choices=choices,
        returned=returned,
        service_tier=tier if isinstance(tier, str) and tier not in ("auto", "default") and len(tier) <= 32 else "",
        tags=tags,
        background="background" in fields and _decoded(fields["background"]) is True,
    )


def _count(fields: Mapping[str, msgspec.Raw], name: str) -> int:
    found = _decoded(fields[name])
    return found if isinstance(found, int) and found > 0 else 1


def _prompts(raw: msgspec.Raw) -> int:
    """How many prompts a completion has: each is answered by itself. A list of numbers is one prompt, in tokens."""
    data = bytes(raw)
    head = data[1:].lstrip()[:1] if data.startswith(b"[") else b""
    if head not in (b'"', b"["):
        return 1
    most = data.count(b'"') // 2 if head == b'"' else data.count(b"[") - 1
    if most > _CROWD:
        return most  # To count them exactly would hold the loop up for as long as the client likes.
    try:
        return len(_list(data))
    except _NOT_JSON:
        return 1


def _decoded(raw: msgspec.Raw) -> object:
    try:
        return msgspec.json.decode(raw)
    except _NOT_JSON:
        return None


class Plan(msgspec.Struct, frozen=True, gc=False):
    """What is to be reserved for one attempt at one target."""

    target: Target
    rates: Rates | None
    account: Scope | None
    """The provider's account, where it has limits."""
    estimate: Estimate
    ask: Amounts
    judged: Amounts
    risk_tokens: int
    risk_nano_usd: int
    """By how much the attempt can outgrow `ask`."""
    output_cap: int | None = None
    """Output tokens for one choice that the upstream is to be told, where the client sets no maximum; None: none."""


UNESTIMATED: Final = Estimate(0, 0, 0)


class Planner:
    """`processes`: how many share the limits, as last seen."""

    def __init__(self, book: PriceBook, expectations: Expectations) -> None:
        self.book = book
        self.expectations = expectations

    def plan(
        self, want: Want, policy: Policy, target: Target, exposures: Mapping[str, Exposure], processes: int = 1
    ) -> Plan:
        """What to reserve. Prices that nobody knows count as nothing here: whether they may is decided elsewhere."""
        settings = policy.settings
        facts = self.book.facts(target, want.service_tier)
        rates = usable(facts.rates, want.ask.dialect)
        found = estimate(
            input_tokens=want.input_tokens,
            asked=want.asked,
            choices=want.choices,
            expected=self.expectations.output(policy.tenant, target.label, want.asked),
            max_output_tokens=facts.max_output_tokens,
            context_window=facts.context_window,
            generates=want.generates,
        )
        bound = policy.at(target.provider)
        expected = _amounts(want.input_tokens, _expected(found, want, bound.reach), rates)
        most = _most(want.input_bound if policy.strict else want.input_tokens, found.most, rates)
        judged, ask, cap = expected, expected, None
        if settings.estimate == "max":
            judged, ask, most, cap = self._strictest(want, policy, most, found.most, rates, bound.reach)
        elif not self._fits(want, policy, most, expected, exposures, processes, bound):
            ask = _larger(expected, _within(most, bound.reach))
        cuts = want.ask.stream and settings.on_overrun == "cut" and policy.enforces
        return Plan(
            target,
            rates,
            policy.account(target.provider),
            found,
            ask,
            judged,
            0 if cuts else max(most.tokens - ask.tokens, 0),
            0 if cuts else max(most.nano_usd - ask.nano_usd, 0),
            cap,
        )

    def _strictest(
        self, want: Want, policy: Policy, most: Amounts, most_output: int, rates: Rates | None, reach: Reach
    ) -> tuple[Amounts, Amounts, Amounts, int | None]:
        """For `estimate: max`: what is judged, what is asked for, the most, and the cap that makes it the most."""
        input_tokens = want.input_bound if policy.strict else want.input_tokens
        if want.asked is not None:
            return most, _within(most, reach), most, None
        # Without a maximum of its own, a request is as large as what is left for it.
        judged = _most(input_tokens, min(want.choices, most_output), rates)
        cap = None
        if policy.strict and want.generates:
            cap = max(_affordable(input_tokens, most_output, rates, reach) // want.choices, 1)
            most = _most(input_tokens, cap * want.choices, rates)
        return judged, _within(most, reach), most, cap

    def unreserved(self, want: Want, target: Target) -> Plan:
        """For an attempt that nothing is reserved for: its price alone."""
        rates = self.book.facts(target, want.service_tier).rates
        return Plan(target, usable(rates, want.ask.dialect), None, UNESTIMATED, NOTHING, NOTHING, 0, 0)

    def expected(self, want: Want, policy: Policy, target: Target) -> int:
        """Output tokens to expect of such an attempt."""
        if not want.generates:
            return 0
        return self.expectations.output(policy.tenant, target.label, want.asked) * want.choices

    def _fits(
        self,
        want: Want,
        policy: Policy,
        most: Amounts,
        expected: Amounts,
        exposures: Mapping[str, Exposure],
        processes: int,
        bound: Bound,
    ) -> bool:
        if want.ask.stream and policy.settings.on_overrun == "cut":
            return True
        tokens, nano = most.tokens - expected.tokens, most.nano_usd - expected.nano_usd
        for place, reach in bound.risky:
            exposure = exposures.get(place)
            if exposure is not None and not exposure.fits(
                tokens, nano, _share(reach.tokens, processes), _share(reach.nano_usd, processes)
            ):
                return False
        return True


def _expected(found: Estimate, want: Want, reach: Reach) -> int:
    """Output to expect. A request without a maximum of its own is as large as what a window leaves for it: what fits
    with its input is never too large for what its reply may become."""
    if want.asked is not None or reach.tokens is None or found.expected <= want.choices:
        return found.expected
    return min(found.expected, max(reach.tokens - want.input_tokens, want.choices))


def exceeds(plan: Plan, reach: Reach) -> bool:
    """No waiting can help: the request is larger than a whole window."""
    return (reach.tokens is not None and plan.judged.tokens > reach.tokens) or (
        reach.nano_usd is not None and plan.judged.nano_usd > reach.nano_usd
    )


def _share(limit: int | None, processes: int) -> int | None:
    return None if limit is None else limit // max(processes, 1)


def _amounts(input_tokens: int, output: int, rates: Rates | None) -> Amounts:
    nano = 0 if rates is None else cost(Usage(input_tokens, output), rates)
    return Amounts(1, min(input_tokens + output, MAX_AMOUNT), min(nano, MAX_AMOUNT))


def _most(input_tokens: int, output: int, rates: Rates | None) -> Amounts:
    nano = 0 if rates is None else ceiling(input_tokens, output, rates)
    return Amounts(1, min(input_tokens + output, MAX_AMOUNT), min(nano, MAX_AMOUNT))


def _within(most: Amounts, reach: Reach) -> Amounts:
    tokens = most.tokens if reach.tokens is None else min(most.tokens, reach.tokens)
    nano = most.nano_usd if reach.nano_usd is None else min(most.nano_usd, reach.nano_usd)
    return Amounts(1, tokens, nano)


def _larger(one: Amounts, other: Amounts) -> Amounts:
    return Amounts(1, max(one.tokens, other.tokens), max(one.nano_usd, other.nano_usd))


def _affordable(input_tokens: int, most: int, rates: Rates | None, reach: Reach) -> int:
    """Output tokens that fit beside the input into a whole window."""
    output = most if reach.tokens is None else min(most, max(reach.tokens - input_tokens, 0))
    if rates is None or reach.nano_usd is None:
        return output
    spare = reach.nano_usd - ceiling(input_tokens, 0, rates)
    dearest = max(dearest_output(one) for one in (rates, *(tier.rates for tier in rates.tiers)))
    return min(output, max((spare - 1) * PER_MILLION // dearest, 0)) if dearest else output
