"""Budgets and prices as they are written: amounts are exact, `false` switches off, null lifts, and words stay words."""

from __future__ import annotations

from decimal import Decimal
from typing import get_args

import pytest
from written import MINIMAL, File

from proxy.budget.library import GenaiPrices
from proxy.budget.pricing import FREE, facts_of
from proxy.budget.settings import UNWRITTEN, BudgetSettings
from proxy.providers.settings import Vendor

PRICED = "providers:\n  a:\n    kind: openai\n    models:\n      m:\n        price: {}\n"


def test_an_amount_is_what_was_written_to_the_last_digit(config: File) -> None:
    for text in ("0.000000001", "2.00", "3", "${SPEND:-1.10}"):
        settings = config.load(MINIMAL + f"budget:\n  usd_per_day: {text}\n").settings
        written = text.removeprefix("${SPEND:-").removesuffix("}")
        assert settings.budget.usd_per_day == Decimal(written)


def test_unwritten_observes_and_whatever_is_written_enforces(config: File) -> None:
    assert config.load(MINIMAL).settings.budget is UNWRITTEN
    for text in ("budget:\n", "budget: {}\n", "budget:\n  tokens_per_minute: null\n"):
        assert config.load(MINIMAL + text).settings.budget == BudgetSettings()
    by_variable = config.load(MINIMAL, env={"BREAKWATER_BUDGET__TOKENS_PER_MINUTE": "7"}).settings.budget
    assert (by_variable.mode, by_variable.tokens_per_minute, by_variable.usd_per_minute) == ("enforce", 7, None)


def test_false_is_mode_off(config: File) -> None:
    for text in ("budget: false\n", "budget: {mode: off}\n"):
        assert config.load(MINIMAL + text).settings.budget.mode == "off"


def test_a_price_is_a_section_or_none(config: File) -> None:
    def facts(price: str) -> object:
        return facts_of(config.load(PRICED.format(price)).settings.providers["a"].models["m"]).rates

    assert facts("none") == FREE
    assert facts("null") is None
    rates = facts_of(config.load(PRICED.format("{input: 0.15, output: 0.6}")).settings.providers["a"].models["m"]).rates
    assert rates is not None
    assert (rates.input, rates.cached_input, rates.output, rates.reasoning) == (
        150_000_000,
        150_000_000,
        600_000_000,
        600_000_000,
    )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "budget:\n  usd_per_day: lots\n",
            "3:16: budget.usd_per_day: expected an amount in USD, such as 2.50, got text",
        ),
        ("budget:\n  usd_per_day: -1\n", "3:16: budget.usd_per_day: must not be negative"),
        ("budget:\n  tokens_per_minute: 0\n", "3:22: budget.tokens_per_minute: must be at least 1"),
        (
            "budget:\n  tokens_per_minute: 1.5\n",
            "3:22: budget.tokens_per_minute: expected a whole number, got a number",
        ),
        ("budget: true\n", "2:9: budget: expected a section with keys, got true or false"),
        ("global_budget: false\n", "2:16: global_budget: expected a section with keys, got true or false"),
    ],
)
def test_what_no_limit_can_be_is_named_with_its_line(config: File, text: str, error: str) -> None:
    assert config.errors(MINIMAL + text) == [f"config.yaml:{error}"]


def test_a_word_that_is_no_price_is_named(config: File) -> None:
    (error,) = config.errors(PRICED.format("free"))
    assert error == "config.yaml:6:16: providers.a.models.m.price: expected a section with keys, or none"


def test_vendors_are_those_of_the_price_list() -> None:
    assert set(get_args(Vendor)) - {"none"} == GenaiPrices().vendors
