"""Settings of budgets: limits, prices, and what happens where one is reached or unknown.

Limits and prices are written in several places (a provider's account, all tenants together, one tenant, one key), so
their models stand here for all of them. Dollars are exact decimals in the file and integer nano-dollars behind it.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from itertools import pairwise
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from proxy.money import LARGEST, nano_usd
from proxy.settings import DAY_MS, MadeFile, Section

REFERENCE_TOKENS_PER_MINUTE: Final = 40_000
REFERENCE_USD_PER_MINUTE: Final = Decimal("2.00")

Mode = Literal["off", "observe", "enforce"]


def _decimal(value: Any) -> Any:
    """YAML hands over the shortest float that was meant: its text is what was written."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return value
    try:
        return Decimal(str(value).strip())
    except InvalidOperation:
        raise ValueError("expected an amount in USD, such as 2.50") from None


def _amount(value: Decimal) -> Decimal:
    if not value.is_finite():
        raise ValueError("expected an amount in USD, such as 2.50")
    if value < 0:
        raise ValueError("must not be negative")
    try:
        nano_usd(value)
    except OverflowError:
        raise ValueError("is larger than 9,007,199.25 USD, the most that is counted exactly") from None
    return value


def _limit(value: Decimal) -> Decimal:
    if nano_usd(value) == 0:
        raise ValueError("must be more than 0, at least a nano-dollar; null means no limit")
    return value


Usd = Annotated[Decimal, BeforeValidator(_decimal), AfterValidator(_amount)]
"""Dollars, 0 or more: at most 9,007,199.25, kept to the nano-dollar."""

UsdLimit = Annotated[Usd, AfterValidator(_limit)]

Count = Annotated[int, Field(ge=1, le=LARGEST)]


class LimitSettings(Section):
    """How much in which span of time; null is no limit. Minutes slide, hours, days and months are those of UTC."""

    requests_per_minute: Count | None = None
    """Requests in any 60 seconds."""
    tokens_per_minute: Count | None = None
    """Tokens of input and output in any 60 seconds."""
    usd_per_minute: UsdLimit | None = None
    """Dollars in any 60 seconds."""
    usd_per_hour: UsdLimit | None = None
    """Dollars in an hour of the clock, UTC."""
    usd_per_day: UsdLimit | None = None
    """Dollars in a day, UTC."""
    usd_per_month: UsdLimit | None = None
    """Dollars in a month of the calendar, UTC."""
    max_concurrent: Count | None = None
    """Requests in progress at once."""

    @property
    def limited(self) -> bool:
        return any(getattr(self, name) is not None for name in LimitSettings.model_fields)


class BudgetSettings(LimitSettings):
    """What a tenant, or one of its keys, may spend, and how strictly it is held to that."""

    mode: Mode = "enforce"
    """off: nothing is counted against a limit; observe: counted and said, never refused; enforce: refused."""
    wait_ms: int = Field(default=0, ge=0, le=DAY_MS)
    """Milliseconds that a request may wait for its turn instead of being refused; 0 refuses at once."""
    estimate: Literal["adaptive", "max"] = "adaptive"
    """How much output is reserved: adaptive: as much as 95 of 100 replies took, while little is at risk, then the
    most; max: always the most that a reply can have."""
    on_overrun: Literal["finish", "cut"] = "finish"
    """A stream outgrows its reservation and the window is full: let it finish, or cut it with finish reason length."""
    on_store_error: Literal["local", "deny", "allow"] = "local"
    """The store is away: go on with this process's share of the limits, refuse, or let everything pass."""
    on_unknown_price: Literal["auto", "allow", "deny"] = "auto"
    """A model has no known price: auto refuses it only where a limit in USD applies."""
    on_lost: Literal["charge", "refund"] = "charge"
    """A process died with the request: charge what was reserved, or give it back."""

    @model_validator(mode="before")
    @classmethod
    def _may_be_switched_off(cls, value: Any) -> Any:
        return {"mode": "off"} if value is False else value


UNWRITTEN: Final = BudgetSettings(
    mode="observe",
    tokens_per_minute=REFERENCE_TOKENS_PER_MINUTE,
    usd_per_minute=REFERENCE_USD_PER_MINUTE,
)
"""A configuration without a `budget` section: nothing is refused, and events say what the reference would refuse."""


def merged(base: BudgetSettings, *over: BudgetSettings | None) -> BudgetSettings:
    """`base` with what later ones say in its place. Only what was written counts: a written null lifts a limit.

    Over an unwritten section, whoever writes one starts from the written defaults: `tenants[].budget` alone enforces.
    """
    result = base
    for one in over:
        if one is None or not one.model_fields_set:
            continue
        if result is UNWRITTEN:
            result = BudgetSettings()
        result = result.model_copy(update={name: getattr(one, name) for name in one.model_fields_set})
    return result


class TierSettings(Section):
    """Prices of requests with a long input, in USD per million tokens. They hold for all tokens of such a request."""

    above: Count
    """Input tokens, cached ones included, above which these prices hold."""
    input: Usd
    """Input tokens."""
    cached_input: Usd | None = None
    """Input tokens that the provider's cache served; null: as input."""
    cache_write: Usd | None = None
    """Input tokens that the provider's cache stored; null: as input."""
    output: Usd
    """Output tokens."""
    reasoning: Usd | None = None
    """Output tokens of hidden reasoning; null: as output."""
    audio_input: Usd | None = None
    """Input tokens of audio; null: as input."""
    audio_output: Usd | None = None
    """Output tokens of audio; null: as output."""


class PriceSettings(Section):
    """Prices in USD per million tokens."""

    input: Usd
    """Input tokens."""
    cached_input: Usd | None = None
    """Input tokens that the provider's cache served; null: as input."""
    cache_write: Usd | None = None
    """Input tokens that the provider's cache stored; null: as input."""
    output: Usd
    """Output tokens; 0 for embeddings."""
    reasoning: Usd | None = None
    """Output tokens of hidden reasoning; null: as output."""
    audio_input: Usd | None = None
    """Input tokens of audio; null: as input."""
    audio_output: Usd | None = None
    """Output tokens of audio; null: as output."""
    request: Usd = Decimal(0)
    """USD of each request beside its tokens."""
    tiers: tuple[TierSettings, ...] = ()
    """Other prices for longer inputs, in ascending order of `above`."""

    @model_validator(mode="after")
    def _tiers_ascend(self) -> PriceSettings:
        starts = [tier.above for tier in self.tiers]
        if any(first >= second for first, second in pairwise(starts)):
            raise ValueError("tiers: expected ascending values of 'above'")
        return self


class ModelFactsSettings(Section):
    """What is known of a model beside its name."""

    price: PriceSettings | Literal["none"] | None = None
    """USD per million tokens; none: it costs nothing; null: as the price list says."""
    context_window: Count | None = None
    """Tokens of input and output together; null: as the price list says."""
    max_output_tokens: Count | None = None
    """The most that one reply can have; null: 4096 is assumed where the client sets none."""


class SinkSettings(Section):
    """Where settled requests are written."""

    file: MadeFile
    """File of JSON lines; it is made if it is not there, its directory is not."""
    max_bytes: int = Field(default=104_857_600, ge=65_536, le=2**40)
    """Size at which the file is renamed to FILE.1 and begun anew."""
    keep: int = Field(default=10, ge=1, le=1000)
    """Renamed files that are kept beside the current one."""


class LedgerSettings(Section):
    """The record of what was spent."""

    sinks: tuple[SinkSettings, ...] = ()
    """Files that receive one JSON line for each settled request."""
