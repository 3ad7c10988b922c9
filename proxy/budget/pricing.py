"""What a reply costs. Pure: rates are looked up once per (provider, model) and kept as integers.

Where a price comes from, the first that says something wins, member by member:

    providers.NAME.models.GLOB      what the operator wrote for this account
    models[]                        what the operator wrote for the configured name
    the price library               public list prices, by the provider's vendor; a price of 0 there counts as unknown

A rate is nano-dollars per million tokens. A cost sums tokens times rate in nano-dollars per million and divides once,
rounding up: so one attempt is never charged less than its true price, and at most one nano-dollar more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Final, Literal, Protocol

from proxy.budget.settings import PriceSettings, TierSettings
from proxy.money import LARGEST, PER_MILLION, nano_usd
from proxy.types import Dialect, Target, Usage

KEPT: Final = 4096
"""Looked-up models that are remembered; clients choose the names behind a glob."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Nano-dollars per million tokens, each kind of token by itself; `request` is nano-dollars per request."""

    input: int
    cached_input: int
    cache_write: int
    output: int
    reasoning: int
    request: int = 0
    tiers: tuple[Tier, ...] = ()
    """Ascending. The last one whose threshold the input exceeds prices all tokens, not only those above it."""
    generates: bool = True
    """False: no price for output is known, so these rates serve embeddings only."""
    audio: tuple[int, int] | None = None
    """Of input and output tokens of audio; None: as text. Cached audio is charged as cached input."""


@dataclass(frozen=True, slots=True)
class Tier:
    above: int
    """Input tokens of one request, cached ones included."""
    rates: Rates


FREE: Final = Rates(0, 0, 0, 0, 0)
"""`price: none`: known, and nothing."""


def cost(usage: Usage, rates: Rates) -> int:
    """Nano-dollars of one attempt, rounded up, at most LARGEST."""
    for tier in rates.tiers:
        if usage.input <= tier.above:
            break
        rates = tier.rates
    plain = usage.input - usage.cache_read - usage.cache_write
    micro = (
        plain * rates.input
        + usage.cache_read * rates.cached_input
        + usage.cache_write * rates.cache_write
        + (usage.output - usage.reasoning) * rates.output
        + usage.reasoning * rates.reasoning
    )
    if rates.audio is not None:
        heard, spoken = rates.audio
        micro += min(usage.input_audio, plain) * (heard - rates.input)
        micro += min(usage.output_audio, usage.output - usage.reasoning) * (spoken - rates.output)
    return min(-(-micro // PER_MILLION) + rates.request, LARGEST)


def ceiling(input_tokens: int, output_tokens: int, rates: Rates) -> int:
    """The most that so many tokens can cost, whichever of them are cached, written, reasoning or audio, in whichever
    tier."""
    if not rates.tiers and rates.audio is None:
        micro = input_tokens * max(rates.input, rates.cached_input, rates.cache_write)
        micro += output_tokens * (rates.output if rates.output > rates.reasoning else rates.reasoning)
        return min(-(-micro // PER_MILLION) + rates.request, LARGEST)
    worst = 0
    for one in (rates, *(tier.rates for tier in rates.tiers if input_tokens > tier.above)):
        heard = 0 if one.audio is None else one.audio[0]
        micro = input_tokens * max(one.input, one.cached_input, one.cache_write, heard)
        micro += output_tokens * dearest_output(one)
        worst = max(worst, -(-micro // PER_MILLION) + one.request)
    return min(worst, LARGEST)


def dearest_output(rates: Rates) -> int:
    """The most that a million tokens of output can cost, whatever they are. Without regard to tiers."""
    return max(rates.output, rates.reasoning, 0 if rates.audio is None else rates.audio[1])


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model; None is `not said`."""

    rates: Rates | None = None
    context_window: int | None = None
    """Tokens of input and output together."""
    max_output_tokens: int | None = None

    def over(self, other: ModelFacts) -> ModelFacts:
        """These, and where they say nothing, the other's."""
        return ModelFacts(
            self.rates if self.rates is not None else other.rates,
            self.context_window or other.context_window,
            self.max_output_tokens or other.max_output_tokens,
        )


UNKNOWN: Final = ModelFacts()


class WrittenFacts(Protocol):
    """What a configuration can say of a model."""

    @property
    def price(self) -> PriceSettings | Literal["none"] | None: ...
    @property
    def context_window(self) -> int | None: ...
    @property
    def max_output_tokens(self) -> int | None: ...


def facts_of(written: WrittenFacts) -> ModelFacts:
    """The same as integers; what costs nothing is known to."""
    price = written.price
    rates = None if price is None else FREE if price == "none" else rates_of(price)
    return ModelFacts(rates, written.context_window, written.max_output_tokens)


def rates_of(price: PriceSettings) -> Rates:
    request = nano_usd(price.request)
    return replace(_rates(price, request), tiers=tuple(Tier(one.above, _rates(one, request)) for one in price.tiers))


def _rates(price: PriceSettings | TierSettings, request: int) -> Rates:
    plain, output = nano_usd(price.input), nano_usd(price.output)

    def rate(written: Decimal | None, instead: int) -> int:
        return instead if written is None else nano_usd(written)

    return Rates(
        plain,
        rate(price.cached_input, plain),
        rate(price.cache_write, plain),
        output,
        rate(price.reasoning, output),
        request,
        audio=_audio(price, plain, output),
    )


def _audio(price: PriceSettings | TierSettings, plain: int, output: int) -> tuple[int, int] | None:
    heard, spoken = price.audio_input, price.audio_output
    if heard is None and spoken is None:
        return None
    return plain if heard is None else nano_usd(heard), output if spoken is None else nano_usd(spoken)


class Library(Protocol):
    def find(self, vendor: str, model: str, service_tier: str, now: float) -> tuple[ModelFacts, float]:
        """What the library knows, and until when (seconds since the epoch) it stays so. Never raises."""


class NoLibrary:
    """For a configuration that brings all its prices, and for tests that must not depend on the market."""

    def find(self, vendor: str, model: str, service_tier: str, now: float) -> tuple[ModelFacts, float]:
        return UNKNOWN, float("inf")


@dataclass(frozen=True, slots=True)
class Account:
    """One provider: whose list prices it charges (None: nobody's), and what was written for its models, by glob."""

    vendor: str | None = None
    models: Mapping[str, ModelFacts] = field(default_factory=dict)


def usable(rates: Rates | None, dialect: Dialect) -> Rates | None:
    """The rates, if they can price an ask of this kind."""
    return rates if rates is None or rates.generates or dialect == "embeddings" else None


class PriceBook:
    """Prices and sizes of targets. `clock` gives seconds since the epoch: list prices change by date and by hour."""

    def __init__(
        self,
        accounts: Mapping[str, Account],
        models: Mapping[str, ModelFacts],
        library: Library,
        clock: Callable[[], float],
    ) -> None:
        """`models`: what was written under `models[]`, by the configured name or glob."""
        self._accounts = {name: (one.vendor, _Globs(one.models)) for name, one in accounts.items()}
        self._models = models
        self._library = library
        self._clock = clock
        self._found: dict[tuple[str, str, str, str], tuple[ModelFacts, float]] = {}

    def facts(self, target: Target, service_tier: str = "") -> ModelFacts:
        """What is known of `target`. `service_tier` is what the request asks for, where the vendor charges by it."""
        key = (target.provider, target.model, target.label, service_tier)
        found = self._found.get(key)
        now = self._clock()
        if found is None or found[1] <= now:
            found = self._look_up(target, service_tier, now)
            self._found.pop(key, None)
            if len(self._found) >= KEPT:
                del self._found[next(iter(self._found))]
            self._found[key] = found
        return found[0]

    def rates(self, target: Target, dialect: Dialect, service_tier: str = "") -> Rates | None:
        """The price of an ask at `target`; None where it is not known."""
        return usable(self.facts(target, service_tier).rates, dialect)

    def _look_up(self, target: Target, service_tier: str, now: float) -> tuple[ModelFacts, float]:
        vendor, globs = self._accounts.get(target.provider, (None, _Globs({})))
        facts = globs.find(target.model).over(self._models.get(target.label, UNKNOWN))
        if vendor is None:
            return facts, float("inf")
        listed, until = self._library.find(vendor, target.model, service_tier, now)
        return facts.over(listed), until


class _Globs:
    """Facts by name or glob: an exact name wins, then the longest glob, then the order of the file."""

    def __init__(self, facts: Mapping[str, ModelFacts]) -> None:
        self._exact = {name: one for name, one in facts.items() if "*" not in name}
        globs = sorted((name for name in facts if "*" in name), key=lambda name: -len(name))
        self._globs = [(_compiled(name), facts[name]) for name in globs]

    def find(self, model: str) -> ModelFacts:
        """Of several that fit, each member is the first one's that says it."""
        found = self._exact.get(model, UNKNOWN)
        for pattern, facts in self._globs:
            if pattern.fullmatch(model):
                found = found.over(facts)
        return found


def _compiled(glob: str) -> re.Pattern[str]:
    return re.compile(re.escape(glob).replace(r"\*", ".*"), re.DOTALL)


OnUnknownPrice = Literal["auto", "allow", "deny"]


def unknown_refused(policy: OnUnknownPrice, *, usd_limited: bool) -> bool:
    """Whether a request without a known price is refused. `usd_limited`: a limit in USD applies to it."""
    return policy == "deny" or (policy == "auto" and usd_limited)


def line_to_paste(target: Target) -> str:
    """What makes the price of `target` known, once USD are figures: one line of YAML under `place_to_paste`."""
    model = target.model.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{model}": {{price: {{input: USD, output: USD}}}}'


def place_to_paste(target: Target) -> str:
    return f"providers.{target.provider}.models"


def vendor_of(base_url: str, patterns: Iterable[tuple[str, str]]) -> str | None:
    """Whose API answers at `base_url`, by (vendor, pattern) as the library lists them; None: nobody known."""
    for vendor, pattern in patterns:
        if re.match(pattern, base_url):
            return vendor
    return None
