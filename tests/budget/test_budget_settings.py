"""Limits and prices as they are written, and what is refused with which words."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from proxy.budget.settings import (
    UNWRITTEN,
    BudgetSettings,
    LedgerSettings,
    LimitSettings,
    ModelFactsSettings,
    PriceSettings,
    merged,
)
from proxy.money import nano_usd


def refused(model: type[Any], value: object) -> str:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value)
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in caught.value.errors())


@pytest.mark.parametrize("written", [2.0, "2.00", 2, "2", Decimal("2.0")])
def test_an_amount_may_be_written_in_any_usual_way(written: object) -> None:
    settings = BudgetSettings.model_validate({"usd_per_minute": written})
    assert settings.usd_per_minute is not None
    assert nano_usd(settings.usd_per_minute) == 2_000_000_000


@pytest.mark.parametrize(
    ("written", "nano"),
    [(0.1, 100_000_000), (0.15, 150_000_000), (0.3, 300_000_000), (1e-9, 1), ("1.000000001", 10**9 + 1)],
)
def test_what_was_written_is_meant_to_the_nano_dollar(written: object, nano: int) -> None:
    amount = LimitSettings.model_validate({"usd_per_day": written}).usd_per_day
    assert amount is not None
    assert nano_usd(amount) == nano


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"usd_per_day": 0}, "usd_per_day: Value error, must be more than 0"),
        ({"usd_per_day": "1e-10"}, "must be more than 0, at least a nano-dollar"),
        ({"usd_per_day": -1}, "must not be negative"),
        ({"usd_per_day": 1e300}, "is larger than 9,007,199.25 USD"),
        ({"usd_per_day": "9007199.254740992"}, "is larger than"),
        ({"usd_per_day": float("nan")}, "finite"),
        ({"usd_per_day": float("inf")}, "finite"),
        ({"usd_per_day": True}, "usd_per_day"),
        ({"usd_per_day": "two"}, "expected an amount in USD"),
        ({"usd_per_day": []}, "usd_per_day"),
        ({"tokens_per_minute": 0}, "greater than or equal to 1"),
        ({"tokens_per_minute": -5}, "greater than or equal to 1"),
        ({"tokens_per_minute": 2**53}, "less than or equal to"),
        ({"tokens_per_minute": 1.5}, "integer"),
        ({"tokens_per_minute": "40k"}, "integer"),
        ({"tokens_per_minute": True}, "integer"),
        ({"max_concurrent": 0}, "greater than or equal to 1"),
        ({"tokens_per_hour": 5}, "tokens_per_hour: Extra inputs"),
        ({"eur_per_day": 5}, "eur_per_day: Extra inputs"),
        ({"estimate": "p95"}, "estimate"),
        ({"on_store_error": "open"}, "on_store_error"),
        ({"wait_ms": -1}, "wait_ms"),
        ({"mode": "on"}, "mode"),
    ],
)
def test_bad_limits_are_refused(written: dict[str, object], words: str) -> None:
    assert words in refused(BudgetSettings, written)


def test_a_written_section_enforces_and_limits_nothing_it_does_not_say() -> None:
    written = BudgetSettings()
    assert written.mode == "enforce"
    assert not written.limited
    assert BudgetSettings(max_concurrent=1).limited


def test_an_unwritten_section_observes_with_the_reference_values() -> None:
    assert (UNWRITTEN.mode, UNWRITTEN.tokens_per_minute, UNWRITTEN.usd_per_minute) == (
        "observe",
        40_000,
        Decimal("2.00"),
    )
    assert (UNWRITTEN.requests_per_minute, UNWRITTEN.usd_per_hour, UNWRITTEN.max_concurrent) == (None, None, None)


def test_false_switches_it_off() -> None:
    assert BudgetSettings.model_validate(False).mode == "off"
    assert merged(BudgetSettings(tokens_per_minute=5), BudgetSettings.model_validate(False)).mode == "off"
    assert "bool" not in refused(BudgetSettings, True)


def test_what_a_tenant_writes_goes_over_the_section_member_by_member() -> None:
    section = BudgetSettings(tokens_per_minute=10, usd_per_day=Decimal(5), wait_ms=7)
    tenant = BudgetSettings(tokens_per_minute=20, usd_per_day=None)
    key = BudgetSettings(mode="observe")
    result = merged(section, tenant, None, key)
    assert (result.tokens_per_minute, result.usd_per_day, result.wait_ms, result.mode) == (20, None, 7, "observe")
    assert merged(section, BudgetSettings()) == section
    assert merged(section) == section


def test_a_written_default_lifts_nothing_by_accident() -> None:
    """`mode: enforce` written by a tenant over an observing section enforces, though it is the default."""
    assert merged(BudgetSettings(mode="observe"), BudgetSettings(mode="enforce")).mode == "enforce"


def test_a_tenant_alone_starts_from_the_written_defaults() -> None:
    result = merged(UNWRITTEN, BudgetSettings(usd_per_day=Decimal(50)))
    assert (result.mode, result.tokens_per_minute, result.usd_per_day) == ("enforce", None, Decimal(50))


def test_prices() -> None:
    facts = ModelFactsSettings.model_validate({"price": {"input": 0.15, "cached_input": 0.075, "output": 0.60}})
    assert isinstance(facts.price, PriceSettings)
    assert (facts.price.input, facts.price.cache_write) == (Decimal("0.15"), None)
    assert ModelFactsSettings.model_validate({"price": "none"}).price == "none"
    assert "output" in refused(ModelFactsSettings, {"price": {"input": 1}})
    assert "price" in refused(ModelFactsSettings, {"price": "free"})
    assert "negative" in refused(PriceSettings, {"input": -1, "output": 1})
    tiers = ({"above": 200_000, "input": 2, "output": 3}, {"above": 100_000, "input": 2, "output": 3})
    assert "ascending" in refused(PriceSettings, {"input": 1, "output": 1, "tiers": tiers})
    assert "context_window" in refused(ModelFactsSettings, {"context_window": 0})


def test_sinks() -> None:
    assert LedgerSettings().sinks == ()
    assert "file" in refused(LedgerSettings, {"sinks": ({},)})
    assert "max_bytes" in refused(LedgerSettings, {"sinks": ({"file": "x", "max_bytes": 1},)})
