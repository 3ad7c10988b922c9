"""List prices out of genai-prices: the data that its package carries, never its updater. Nothing here opens a socket.

The import brings an HTTP client that nobody here uses: alone it takes up to a quarter of a second and 30 MB. So it is
done once, by the one who builds the application, and only for a configuration that needs it. A look-up takes 25 us and
more: `PriceBook` remembers it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final

from genai_prices.data_snapshot import DataSnapshot, get_snapshot
from genai_prices.types import ModelPrice, Provider, TieredPrices

from proxy.budget.pricing import UNKNOWN, ModelFacts, Rates, Tier
from proxy.money import nano_usd

CHANGES_SECONDS: Final = 300.0
"""How often a price that depends on date or hour is looked up again."""

MAX_MODEL_CHARS: Final = 256

_PRICED_BY_TOKENS: Final = frozenset({"input_mtok", "output_mtok"})


class GenaiPrices:
    """The library as `pricing.Library`. Vendors are its provider ids, such as `openai`, `anthropic`, `azure`."""

    def __init__(self) -> None:
        self._snapshot: DataSnapshot = get_snapshot()
        self._vendors: Mapping[str, Provider] = {one.id: one for one in self._snapshot.providers}

    @property
    def vendors(self) -> frozenset[str]:
        return frozenset(self._vendors)

    def patterns(self) -> Iterator[tuple[str, str]]:
        """(vendor, pattern of its base URLs), in the order in which they are to be tried."""
        return ((one.id, one.api_pattern) for one in self._snapshot.providers)

    def find(self, vendor: str, model: str, service_tier: str, now: float) -> tuple[ModelFacts, float]:
        """See `pricing.Library`."""
        provider = self._vendors.get(vendor)
        if provider is None or not model:
            return UNKNOWN, float("inf")
        # By hand rather than by the snapshot's own look-up, whose cache would grow with every name a client invents.
        found = provider.find_model(model[:MAX_MODEL_CHARS], all_providers=self._snapshot.providers)
        if found is None:
            return UNKNOWN, float("inf")
        # `priority` costs more and `flex` less; what the library has no variant for is charged as standard.
        context = {"service_tier": service_tier} if service_tier else None
        rates = rates_of(found.get_prices(datetime.fromtimestamp(now, UTC), context))
        changes = isinstance(found.prices, list) or (
            context is not None and any(one.constraint is not None for one in found.price_variants or ())
        )
        return ModelFacts(rates, found.context_window), now + CHANGES_SECONDS if changes else float("inf")


def rates_of(price: ModelPrice) -> Rates | None:
    """A list price as integers; None where it is zero, or not by token of text."""
    listed: dict[str, Decimal | TieredPrices] = {name: one for name, one in vars(price).items() if one is not None}
    if any(_base(listed[name]) == 0 for name in _PRICED_BY_TOKENS & listed.keys()) or "input_mtok" not in listed:
        return None
    starts = sorted({tier.start for one in listed.values() if isinstance(one, TieredPrices) for tier in one.tiers})
    tiers = tuple(Tier(start, _rates_at(listed, start)) for start in starts)
    return replace(_rates_at(listed, None), tiers=tiers, generates="output_mtok" in listed)


def _rates_at(listed: Mapping[str, Decimal | TieredPrices], start: int | None) -> Rates:
    """The rates of the tier that begins at `start`; None is the base. What has no price of its own is as its kind."""

    def rate(name: str, instead: int) -> int:
        one = listed.get(name)
        return instead if one is None else nano_usd(_at(one, start))

    plain = rate("input_mtok", 0)
    output = rate("output_mtok", 0)
    requests = listed.get("requests_kcount")
    per_request = 0 if requests is None else nano_usd(_at(requests, start) / 1000)
    heard, spoken = rate("input_audio_mtok", plain) or plain, rate("output_audio_mtok", output) or output
    return Rates(
        plain,
        rate("cache_read_mtok", plain),
        rate("cache_write_mtok", plain),
        output,
        rate("output_reasoning_mtok", output),
        per_request,
        audio=None if (heard, spoken) == (plain, output) else (heard, spoken),
    )


def _at(one: Decimal | TieredPrices, start: int | None) -> Decimal:
    if not isinstance(one, TieredPrices):
        return one
    reached = [tier.price for tier in one.tiers if start is not None and tier.start <= start]
    return reached[-1] if reached else one.base


def _base(one: Decimal | TieredPrices) -> Decimal:
    return one.base if isinstance(one, TieredPrices) else one
