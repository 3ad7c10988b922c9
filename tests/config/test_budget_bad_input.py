"""What cannot be meant in limits, prices and tenants: each is named with its line."""

from __future__ import annotations

import pytest
from written import MINIMAL, File

from proxy.money import LARGEST

USD = ("usd_per_minute", "usd_per_hour", "usd_per_day", "usd_per_month")
COUNTS = ("requests_per_minute", "tokens_per_minute", "max_concurrent")
WHOLE, AMOUNT = "expected a whole number, got ", "expected an amount in USD, such as 2.50, got "
TOO_MUCH = "is larger than 9,007,199.25 USD, the most that is counted exactly"
TOO_LITTLE = "must be more than 0, at least a nano-dollar; null means no limit"
KEY, OTHER = "bw-acme-0123456789abcdef", "bw-beta-0123456789abcdef"


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("-1", "must be at least 1"),
        ("0", "must be at least 1"),
        (str(LARGEST + 1), f"must be at most {LARGEST}"),
        ("9" * 30, f"must be at most {LARGEST}"),
        ("9" * 31, WHOLE + "text"),
        ("1.5", WHOLE + "a number"),
        ("10.0", WHOLE + "a number"),
        ("1e3", WHOLE + "a number"),
        (".nan", WHOLE + "a number"),
        (".inf", WHOLE + "a number"),
        ("10k", WHOLE + "text"),
        ("1_000", WHOLE + "text"),
        ("'10'", WHOLE + "text: take the quotes away"),
        ("true", WHOLE + "true or false"),
        ("[1]", WHOLE + "a list"),
        ("{a: 1}", WHOLE + "a section"),
    ],
)
def test_a_count_is_a_whole_number_that_can_be_counted(config: File, name: str, written: str, complaint: str) -> None:
    column = len(name) + 5
    expected = [f"config.yaml:3:{column}: budget.{name}: {complaint}"]
    assert config.errors(MINIMAL + f"budget:\n  {name}: {written}\n") == expected


@pytest.mark.parametrize("name", USD)
@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("-1", "must not be negative"),
        ("-0.01", "must not be negative"),
        ("0", TOO_LITTLE),
        ("0.0", TOO_LITTLE),
        ("1e-10", TOO_LITTLE),
        ("9007199.3", TOO_MUCH),
        ("1e30", TOO_MUCH),
        ("1e400", "expected a finite number"),
        (".nan", "expected a finite number"),
        (".inf", "expected a finite number"),
        ("5 USD", AMOUNT + "text"),
        ("$5", None),
        ("5,00", AMOUNT + "text"),
        ("true", AMOUNT + "true or false"),
        ("[5]", AMOUNT + "a list"),
    ],
)
def test_an_amount_is_dollars_that_can_be_counted(config: File, name: str, written: str, complaint: str | None) -> None:
    (error,) = config.errors(MINIMAL + f"budget:\n  {name}: {written}\n")
    assert error.startswith(f"config.yaml:3:{len(name) + 5}: budget.{name}: ")
    if complaint is not None:
        assert error.endswith(complaint)


def test_the_largest_limits_are_allowed(config: File) -> None:
    text = f"budget: {{tokens_per_minute: {LARGEST}, usd_per_month: 9007199.25, usd_per_day: 0.000000001}}\n"
    assert config.load(MINIMAL + text + "state: redis://localhost\n").settings.budget.tokens_per_minute == LARGEST


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (MINIMAL + "global_budget:\n  tokens_per_minute: 0\n", "3:22: global_budget.tokens_per_minute"),
        (
            "providers:\n  a:\n    kind: mock\n    limits: {usd_per_day: -1}\n",
            "4:27: providers.a.limits.usd_per_day",
        ),
        (
            MINIMAL + f"tenants:\n- name: a\n  keys: [{KEY}]\n  budget: {{max_concurrent: 0}}\n",
            "5:28: tenants[0].budget.max_concurrent",
        ),
    ],
)
def test_every_section_of_limits_is_held_to_the_same(config: File, text: str, place: str) -> None:
    (error,) = config.errors(text)
    assert error.startswith(f"config.yaml:{place}: must ")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("usd_per_week", "did you mean"),
        ("tokens_per_hour", "did you mean 'tokens_per_minute'?"),
        ("eur_per_day", "did you mean 'usd_per_day'?"),
        ("requests_per_second", "did you mean 'requests_per_minute'?"),
        ("USD_PER_DAY", "did you mean 'usd_per_day'?"),
        ("limit", "known here: "),
    ],
)
def test_an_unknown_unit_is_an_unknown_key(config: File, key: str, hint: str) -> None:
    for path, text, place in (
        ("budget", f"budget:\n  {key}: 1\n", "3:3"),
        ("global_budget", f"global_budget:\n  {key}: 1\n", "3:3"),
        ("tenants[0].budget", f"tenants:\n- name: a\n  keys: [{KEY}]\n  budget:\n    {key}: 1\n", "6:5"),
    ):
        (error,) = config.errors(MINIMAL + text)
        assert error.startswith(f"config.yaml:{place}: {path}.{key}: unknown key: {hint}")


def test_the_environment_is_held_to_the_same(config: File) -> None:
    errors = config.errors(MINIMAL, env={"BREAKWATER_BUDGET__TOKENS_PER_MINUTE": "-1"})
    assert errors == ["environment BREAKWATER_BUDGET__TOKENS_PER_MINUTE: budget.tokens_per_minute: must be at least 1"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            f"tenants:\n- name: a\n  keys: [{KEY}]\n- name: a\n  keys: [{OTHER}]\n",
            "5:9: tenants[1].name: 'a' is the name of tenants[0] already",
        ),
        (
            f"tenants:\n- name: a\n  keys: [{KEY}]\n- name: b\n  keys: [{OTHER}, {KEY}]\n",
            "6:36: tenants[1].keys[1]: the same key stands in tenants[0].keys[0]: each holder needs keys of its own",
        ),
        (
            f"tenants:\n- name: a\n  keys: [{KEY}, {KEY}]\n",
            "4:36: tenants[0].keys[1]: the same key stands in tenants[0].keys[0]: each holder needs keys of its own",
        ),
    ],
)
def test_a_name_and_a_key_have_one_holder(config: File, text: str, error: str) -> None:
    (found,) = config.errors(MINIMAL + text)
    assert found == f"config.yaml:{error}"
    assert KEY not in found


@pytest.mark.parametrize(
    "name", ["a{b}", "a:b", "a b", "a/b", "", "ä", "a\\nb", "x" * 65, "\\u202e", "{bw:0}", "default", "other"]
)
def test_a_name_that_could_be_taken_for_something_else_is_no_tenant(config: File, name: str) -> None:
    (error,) = config.errors(MINIMAL + f'tenants:\n- name: "{name}"\n  keys: [{KEY}]\n')
    assert error.startswith("config.yaml:3:9: tenants[0].name: ")


def test_prices_are_held_to_the_same(config: File) -> None:
    for price, complaint in (
        ("{input: -1, output: 1}", "input: must not be negative"),
        ("{input: .nan, output: 1}", "input: expected a finite number"),
        ("{input: 1}", "output: is missing"),
        ("{input: 1, output: USD}", "output: expected an amount in USD, such as 2.50, got text"),
        ("{input: 1, output: 1e12}", f"output: {TOO_MUCH}"),
        ("{input: 1, output: 1, tiers: [{above: 0, input: 1, output: 1}]}", "tiers[0].above: must be at least 1"),
    ):
        (error,) = config.errors(f"providers: {{a: {{kind: mock, models: {{'m[1]': {{price: {price}}}}}}}}}\n")
        assert error.startswith("config.yaml:1:")
        assert error.endswith(f': providers.a.models["m[1]"].price.{complaint}')


def test_tiers_that_do_not_ascend_are_named_at_the_price(config: File) -> None:
    tier = "{above: 5, input: 1, output: 1}"
    price = f"{{input: 1, output: 1, tiers: [{tier}, {tier}]}}"
    (error,) = config.errors(MINIMAL + f"models:\n- name: m\n  targets: [openai/m]\n  price: {price}\n")
    assert error == "config.yaml:5:10: models[0].price: tiers: expected ascending values of 'above'"
