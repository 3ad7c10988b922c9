"""The books that must agree: the provider's ledger, the gateways' outbox, roll-ups, budgets and metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from proxy.money import nano_usd
from tests.faults.fleet import NANO_PER_TOKEN, Figures, Fleet, until
from tests.faults.load import Outcome

Served = tuple[int, int]
"""Tokens of input and output of one request."""


@dataclass(frozen=True)
class Books:
    tenant: str
    billed: list[Served]
    """By the provider, one for each request that it accepted."""
    records: list[dict[str, Any]]
    """Of the outbox: one for each attempt that was settled."""
    lost: list[dict[str, Any]]
    """Of the outbox: reservations whose lease ran out, of all tenants."""
    budget: dict[str, Any]
    usage: list[dict[str, Any]]
    """Roll-ups, by quality."""

    @property
    def provider_tokens(self) -> int:
        return sum(given + made for given, made in self.billed)

    @property
    def spent_tokens(self) -> int:
        """By the gateways' own window, exact: money is tokens here."""
        spent = self.budget["windows"]["usd_per_month"]["spent"]
        assert nano_usd(Decimal(spent)) % NANO_PER_TOKEN == 0
        return nano_usd(Decimal(spent)) // NANO_PER_TOKEN

    def of(self, *, estimated: bool) -> list[Served]:
        return [(one["input"], one["output"]) for one in self.records if one["estimated"] is estimated]

    def unaccounted(self) -> Counter[Served]:
        """What the provider billed and no record with its own figures says."""
        left = Counter(self.billed)
        left.subtract(Counter(self.of(estimated=False)))
        return left


async def closed(fleet: Fleet, tenant: str, since: int) -> Books:
    """The books of one tenant, which alone was served since that entry of the ledger, once nothing is in flight."""
    budget = await fleet.quiet(tenant)
    await until(lambda: _ledger_closed(fleet, since), "the provider to close its books")
    served = [one for one in await fleet.mock.entries(since) if one["status"] == 200]
    billed = [(one["prompt_tokens"], one["completion_tokens"]) for one in served]
    outbox = await fleet.outbox()
    records = [one for one in outbox if one.get("tenant") == tenant]
    usage = (await fleet.admin("/admin/usage", since="24h", by="tenant,quality")).json()["rows"]
    own = [row for row in usage if row["tenant"] == tenant]
    return Books(tenant, billed, records, [one for one in outbox if "lost" in one], budget, own)


async def _ledger_closed(fleet: Fleet, since: int) -> bool:
    return not any(one["in_flight"] for one in await fleet.mock.entries(since))


def agree(books: Books, *, lost_tokens: int = 0) -> None:
    """The gateways' books agree with one another: every reservation was settled once, and everything adds up.

    `lost_tokens`: charged for reservations of this tenant whose process died."""
    ids = Counter(one["id"] for one in books.records)
    assert set(ids.values()) <= {1}, "settled twice: " + ", ".join(one for one, count in ids.items() if count > 1)
    in_records = sum(one["input"] + one["output"] for one in books.records)
    in_rollups = sum(row["input"] + row["output"] for row in books.usage)
    assert in_records == in_rollups
    assert sum(row["requests"] for row in books.usage) == len(books.records)
    assert books.spent_tokens == in_records + lost_tokens
    assert sum(nano_usd(Decimal(row["cost_usd"])) for row in books.usage) == in_records * NANO_PER_TOKEN


def agree_with_the_provider(books: Books) -> None:
    """Nobody left: to the token, and request by request."""
    assert not books.of(estimated=True)
    assert not books.lost
    assert +books.unaccounted() == Counter()
    assert -books.unaccounted() == Counter()
    assert books.spent_tokens == books.provider_tokens


async def metrics_add_up(fleet: Fleet, before: Figures, books: Books, outcomes: list[Outcome], refusals: int) -> None:
    """P23: what was admitted is what was settled (nothing is held any more), and what was refused is what was said."""
    tenant = f'tenant="{books.tenant}"'
    admitted = sum(1 for one in outcomes if not one.refused)

    def told(page: Figures, name: str, *labels: str) -> int:
        found = [
            page[one] - before.get(one, 0.0)
            for one in page
            if one.startswith(f"breakwater_{name}{{") and all(label in one for label in (tenant, *labels))
        ]
        return round(sum(found))

    async def complete() -> Figures | None:  # a page may be a second old
        page = await fleet.metrics()
        return page if told(page, "requests_total") >= admitted + refusals else None

    page = await until(complete, "the metrics to tell of all requests")
    assert told(page, "requests_total") == admitted + refusals
    assert told(page, "requests_total", 'status="429"') == refusals
    assert told(page, "budget_refusals_total") == refusals
    told_tokens = told(page, "tokens_total", 'kind="input"') + told(page, "tokens_total", 'kind="output"')
    assert told_tokens == sum(one["input"] + one["output"] for one in books.records)
    assert told(page, "budget_reserved") == 0
