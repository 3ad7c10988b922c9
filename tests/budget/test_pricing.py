"""Costs against exact decimals, list prices against the library's own arithmetic, and whose word wins."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from itertools import pairwise

import genai_prices
import pytest
from genai_prices.data_snapshot import get_snapshot
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import structs

from proxy.budget.library import GenaiPrices, rates_of
from proxy.budget.pricing import (
    FREE,
    KEPT,
    UNKNOWN,
    Account,
    ModelFacts,
    NoLibrary,
    PriceBook,
    Rates,
    Tier,
    ceiling,
    cost,
    facts_of,
    line_to_paste,
    place_to_paste,
    unknown_refused,
    vendor_of,
)
from proxy.budget.pricing import rates_of as written_rates
from proxy.budget.settings import PriceSettings
from proxy.config.loader import load
from proxy.config.problems import ConfigErrors
from proxy.money import LARGEST, nano_usd, usd_text
from proxy.types import Target, Usage

MINI = Rates(150_000_000, 75_000_000, 150_000_000, 600_000_000, 600_000_000)
NOW = datetime(2026, 11, 15, tzinfo=UTC).timestamp()

rate = st.integers(0, 10**12)
plain_rates = st.builds(Rates, rate, rate, rate, rate, rate, st.integers(0, 10**9))


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    given_tokens = draw(st.integers(0, 10**7))
    made = draw(st.integers(0, 10**6))
    read = draw(st.integers(0, given_tokens))
    write = draw(st.integers(0, given_tokens - read))
    return Usage(given_tokens, made, read, write, draw(st.integers(0, made)))


@st.composite
def tiered(draw: st.DrawFn) -> Rates:
    """Each tier at least as dear as the one before, as every list price is."""
    one = draw(plain_rates)
    tiers = []
    above = 0
    last = one
    for _ in range(draw(st.integers(0, 3))):
        above += draw(st.integers(1, 10**6))
        more = draw(st.lists(rate, min_size=5, max_size=5))
        last = Rates(
            last.input + more[0],
            last.cached_input + more[1],
            last.cache_write + more[2],
            last.output + more[3],
            last.reasoning + more[4],
            last.request,
        )
        tiers.append(Tier(above, last))
    return Rates(one.input, one.cached_input, one.cache_write, one.output, one.reasoning, one.request, tuple(tiers))


def exact(usage: Usage, rates: Rates) -> Decimal:
    """Nano-dollars, not rounded."""
    chosen = rates
    for tier in rates.tiers:
        if usage.input > tier.above:
            chosen = tier.rates
    parts = (
        (usage.input - usage.cache_read - usage.cache_write, chosen.input),
        (usage.cache_read, chosen.cached_input),
        (usage.cache_write, chosen.cache_write),
        (usage.output - usage.reasoning, chosen.output),
        (usage.reasoning, chosen.reasoning),
    )
    return sum((Decimal(tokens) * price for tokens, price in parts), Decimal(0)) / 1_000_000 + chosen.request


@given(usages(), tiered())
def test_a_cost_is_the_exact_one_rounded_up_once(usage: Usage, rates: Rates) -> None:
    assert cost(usage, rates) == min(int(exact(usage, rates).to_integral_value(ROUND_CEILING)), LARGEST)


@given(usages(), tiered(), st.sampled_from(["input", "cache_read", "cache_write", "output", "reasoning"]), st.data())
def test_more_tokens_never_cost_less(usage: Usage, rates: Rates, kind: str, data: st.DataObject) -> None:
    more = data.draw(st.integers(0, 10**6))
    grown = {"input": usage.input, "output": usage.output} | {
        name: getattr(usage, name) for name in ("cache_read", "cache_write", "reasoning")
    }
    grown[kind] += more
    if kind in ("cache_read", "cache_write"):
        grown["input"] += more
    if kind == "reasoning":
        grown["output"] += more
    assert cost(Usage(**grown), rates) >= cost(usage, rates)


@given(usages(), tiered())
def test_the_ceiling_is_above_every_cost_of_as_many_tokens(usage: Usage, rates: Rates) -> None:
    assert ceiling(usage.input, usage.output, rates) >= cost(usage, rates)


def test_known_bills() -> None:
    assert cost(Usage(1_000_000, 1_000_000), MINI) == nano_usd(Decimal("0.75"))
    assert cost(Usage(2000, 100, cache_read=1500), MINI) == nano_usd(Decimal("0.0002475"))
    assert cost(Usage(1, 0), MINI) == 150
    assert cost(Usage(0, 0), MINI) == 0
    assert cost(Usage(1, 0), Rates(1, 1, 1, 1, 1)) == 1, "a fraction of a nano-dollar is charged as one"
    assert cost(Usage(2**53, 2**53), Rates(10**12, 0, 0, 10**12, 0)) == LARGEST
    assert cost(Usage(10, 10), FREE) == 0


def test_a_threshold_prices_all_tokens_once_it_is_exceeded() -> None:
    long = Rates(2_000_000, 2_000_000, 2_000_000, 4_000_000, 4_000_000)
    rates = Rates(1_000_000, 1_000_000, 1_000_000, 3_000_000, 3_000_000, tiers=(Tier(200, long),))
    assert cost(Usage(200, 1), rates) == 203
    assert cost(Usage(201, 1), rates) == 406


@pytest.mark.parametrize(
    ("usd", "nano"),
    [("0", 0), ("0.15", 150_000_000), ("1e-9", 1), ("0.4e-9", 0), ("0.6e-9", 1), ("9007199.254740991", LARGEST)],
)
def test_dollars_become_nano_dollars(usd: str, nano: int) -> None:
    assert nano_usd(Decimal(usd)) == nano


@pytest.mark.parametrize("usd", ["9007199.254740992", "1e400", "1e999999"])
def test_more_than_can_be_counted_exactly_is_refused(usd: str) -> None:
    with pytest.raises(OverflowError):
        nano_usd(Decimal(usd))


@pytest.mark.parametrize("usd", ["-1", "NaN", "Infinity", "-0.000001"])
def test_what_is_no_amount_is_refused(usd: str) -> None:
    with pytest.raises(ValueError, match="finite"):
        nano_usd(Decimal(usd))


@given(st.integers(0, LARGEST))
def test_dollars_are_written_exactly(nano: int) -> None:
    assert Decimal(usd_text(nano)) * 10**9 == nano


# -- the library -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> GenaiPrices:
    return GenaiPrices()


OFFLINE = """
import sys
touched = []
sys.addaudithook(lambda event, args: touched.append(event) if event.startswith("socket.") else None)
from proxy.budget.library import GenaiPrices
facts, _ = GenaiPrices().find("openai", "gpt-4o-mini", "", 1768435200.0)
assert facts.rates is not None, facts
print(sorted(set(touched)))
"""


def test_no_socket_is_opened_at_import_or_look_up() -> None:
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_list_prices_as_published(library: GenaiPrices) -> None:
    facts, until = library.find("openai", "gpt-4o-mini-2024-07-18", "", NOW)
    assert facts.rates is not None
    assert (facts.rates.input, facts.rates.cached_input, facts.rates.output) == (150_000_000, 75_000_000, 600_000_000)
    assert facts.context_window == 128_000
    assert until == float("inf")
    plain, _ = library.find("openai", "gpt-4.1", "", NOW)
    priority, _ = library.find("openai", "gpt-4.1", "priority", NOW)
    assert plain.rates is not None
    assert priority.rates is not None
    assert priority.rates.output > plain.rates.output


def test_a_price_that_changes_by_date_is_looked_up_again(library: GenaiPrices) -> None:
    before, until = library.find("openai", "o3", "", datetime(2025, 6, 9, tzinfo=UTC).timestamp())
    after, _ = library.find("openai", "o3", "", datetime(2025, 6, 10, tzinfo=UTC).timestamp())
    assert before.rates is not None
    assert after.rates is not None
    assert (before.rates.input, after.rates.input) == (10 * 10**9, 2 * 10**9)
    assert until < float("inf")


@pytest.mark.parametrize(
    ("vendor", "model"),
    [("openai", "gpt-99-nobody-knows"), ("nobody", "gpt-4o"), ("openai", ""), ("openai", "x" * 10**6)],
)
def test_what_the_library_does_not_know_is_unknown(library: GenaiPrices, vendor: str, model: str) -> None:
    assert library.find(vendor, model, "", NOW)[0].rates is None


def test_a_list_price_of_zero_is_unknown() -> None:
    assert rates_of(genai_prices.types.ModelPrice(input_mtok=Decimal(0), output_mtok=Decimal(0))) is None
    assert rates_of(genai_prices.types.ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(0))) is None
    assert rates_of(genai_prices.types.ModelPrice(audio_hours=Decimal(1))) is None


@settings(max_examples=25, deadline=None)
@given(usages())
def test_costs_agree_with_the_library_for_every_model_priced_by_text(usage: Usage) -> None:
    """To the nano-dollar: the library's rates have at most nine decimals, and we round up once."""
    compared = 0
    when = datetime.fromtimestamp(NOW, UTC)
    theirs = genai_prices.Usage(
        input_tokens=usage.input,
        output_tokens=usage.output,
        cache_read_tokens=usage.cache_read,
        cache_write_tokens=usage.cache_write,
        output_reasoning_tokens=usage.reasoning,
    )
    for provider in get_snapshot().providers:
        for model in provider.models[:20]:
            price = model.get_prices(when)
            rates = rates_of(price)
            if rates is None:
                continue
            expected = price.calc_price(theirs)["total_price"] * 10**9
            assert -1 < Decimal(cost(usage, rates)) - expected < 2, (provider.id, model.id)
            compared += 1
    assert compared > 300


def test_in_every_list_price_more_input_costs_at_least_as_much(library: GenaiPrices) -> None:
    """What `cost` promises, for cliffs only holds if no tier is cheaper than the one below it."""
    for provider in get_snapshot().providers:
        for model in provider.models:
            rates = rates_of(model.get_prices(datetime.fromtimestamp(NOW, UTC)))
            steps = [] if rates is None else [rates, *(tier.rates for tier in rates.tiers)]
            for low, high in pairwise(steps):
                assert high.input >= low.input, (provider.id, model.id)
                assert high.output >= low.output, (provider.id, model.id)


def test_vendors_by_address(library: GenaiPrices) -> None:
    patterns = list(library.patterns())
    assert vendor_of("https://api.openai.com/v1", patterns) == "openai"
    assert vendor_of("https://api.anthropic.com", patterns) == "anthropic"
    assert vendor_of("https://acme.openai.azure.com/openai/v1", patterns) == "azure"
    assert vendor_of("http://10.0.0.7:8000/v1", patterns) is None
    assert {"openai", "anthropic", "azure"} <= library.vendors


# -- who wins --------------------------------------------------------------------------------------------------------


class Listed:
    """A price list of one price, which changes every hour."""

    def __init__(self) -> None:
        self.asked = 0

    def find(self, vendor: str, model: str, service_tier: str, now: float) -> tuple[ModelFacts, float]:
        self.asked += 1
        if vendor != "acme":
            return UNKNOWN, float("inf")
        hour = int(now // 3600)
        return ModelFacts(Rates(hour, hour, hour, hour, hour), 1000, None), (hour + 1) * 3600.0


def flat(amount: int) -> Rates:
    return Rates(amount, amount, amount, amount, amount)


def test_the_nearest_word_wins_member_by_member() -> None:
    book = PriceBook(
        {
            "own": Account(
                "acme", {"m*": ModelFacts(flat(7)), "m-long*": ModelFacts(None, 50, 5), "m-1": ModelFacts(flat(1))}
            ),
            "list": Account("acme"),
            "bare": Account(None),
        },
        {"named": ModelFacts(flat(9), 90, 9)},
        Listed(),
        lambda: 3600.0 * 3,
    )
    assert book.facts(Target("own", "m-1", "x")) == ModelFacts(flat(1), 1000)
    assert book.facts(Target("own", "m-2", "x")) == ModelFacts(flat(7), 1000)
    assert book.facts(Target("own", "m-long-2", "x")) == ModelFacts(flat(7), 50, 5)
    assert book.facts(Target("own", "m-2", "named")) == ModelFacts(flat(7), 90, 9)
    assert book.facts(Target("list", "m-2", "named")) == ModelFacts(flat(9), 90, 9)
    assert book.facts(Target("list", "m-2", "x")) == ModelFacts(flat(3), 1000)
    assert book.facts(Target("bare", "m-2", "x")) == UNKNOWN


def test_a_price_is_looked_up_once_and_again_when_it_may_have_changed() -> None:
    listed = Listed()
    now = [100.0]
    book = PriceBook({"p": Account("acme")}, {}, listed, lambda: now[0])
    target = Target("p", "m", "m")
    assert [book.rates(target, "chat") for _ in range(3)] == [flat(0)] * 3
    assert listed.asked == 1
    now[0] = 3600.0
    assert book.rates(target, "chat") == flat(1)
    assert listed.asked == 2


def test_names_that_clients_invent_do_not_pile_up() -> None:
    listed = Listed()
    book = PriceBook({"p": Account("acme")}, {}, listed, lambda: 0.0)
    for number in range(KEPT + 100):
        book.facts(Target("p", f"m{number}", "*"))
    assert len(book._found) == KEPT
    book.facts(Target("p", f"m{KEPT + 99}", "*"))
    assert listed.asked == KEPT + 100


def test_a_price_without_output_serves_embeddings_only() -> None:
    rates = Rates(5, 5, 5, 0, 0, generates=False)
    book = PriceBook({"p": Account(None, {"*": ModelFacts(rates)})}, {}, NoLibrary(), lambda: 0.0)
    assert book.rates(Target("p", "m", "*"), "embeddings") == rates
    assert book.rates(Target("p", "m", "*"), "chat") is None


@pytest.mark.parametrize(
    ("policy", "limited", "refused"),
    [("auto", True, True), ("auto", False, False), ("allow", True, False), ("deny", False, True), ("deny", True, True)],
)
def test_what_an_unknown_price_does(policy: str, limited: bool, refused: bool) -> None:
    assert unknown_refused(policy, usd_limited=limited) is refused  # type: ignore[arg-type]


PASTED = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.isprintable)


@settings(max_examples=60, deadline=None)
@example('odd"name')
@example("back\\slash")
@example("${HOME}")
@example("ft:gpt-4o:acme::id")
@given(PASTED)
def test_the_line_to_paste_makes_the_price_known(tmp_path_factory: pytest.TempPathFactory, model: str) -> None:
    target = Target("dear", model, "*")
    line = line_to_paste(target)
    assert place_to_paste(target) == "providers.dear.models"
    for others in ("", "      other: {context_window: 5}\n"):
        text = f"providers:\n  dear:\n    kind: openai\n    vendor: none\n    models:\n{others}      {line}\n"
        file = tmp_path_factory.mktemp("pasted") / "config.yaml"
        file.write_text(text)
        with pytest.raises(ConfigErrors) as caught:
            load(file, {})
        assert all("expected an amount in USD" in one.message for one in caught.value.problems)
        file.write_text(text.replace("input: USD, output: USD", "input: 2.50, output: 10"))
        provider = load(file, {}).settings.providers["dear"]
        account = Account(None, {name: facts_of(one) for name, one in provider.models.items()})
        rates = PriceBook({"dear": account}, {}, NoLibrary(), lambda: 0.0).rates(target, "chat")
        assert rates == Rates(2_500_000_000, 2_500_000_000, 2_500_000_000, 10**10, 10**10)


# -- audio -----------------------------------------------------------------------------------------------------------


@given(usages(), st.integers(0, 10**7), st.integers(0, 10**6), rate, rate)
def test_audio_is_priced_as_audio_and_counted_once(usage: Usage, heard: int, spoken: int, dear: int, loud: int) -> None:
    usage = structs.replace(usage, input_audio=min(heard, usage.input), output_audio=min(spoken, usage.output))
    rates = replace(MINI, audio=(dear, loud))
    plain = usage.input - usage.cache_read - usage.cache_write
    audio = min(usage.input_audio, plain)
    said = min(usage.output_audio, usage.output - usage.reasoning)
    text = structs.replace(usage, input=usage.input - audio, output=usage.output - said, input_audio=0, output_audio=0)
    due = exact(text, MINI) + (Decimal(audio) * dear + Decimal(said) * loud) / 1_000_000
    assert cost(usage, rates) == min(int(due.to_integral_value(ROUND_CEILING)), LARGEST)
    assert cost(usage, MINI) == cost(structs.replace(usage, input_audio=0, output_audio=0), rates)
    assert ceiling(usage.input, usage.output, rates) >= cost(usage, rates)


def test_audio_as_the_library_lists_it(library: GenaiPrices) -> None:
    facts, _ = library.find("openai", "gpt-audio", "", NOW)
    assert facts.rates is not None
    assert facts.rates.audio == (32 * 10**9, 64 * 10**9)
    usage = Usage(1000, 200, input_audio=600, output_audio=150)
    model = next(one for one in library._vendors["openai"].models if one.id == "gpt-audio")
    theirs = genai_prices.Usage(input_tokens=1000, output_tokens=200, input_audio_tokens=600, output_audio_tokens=150)
    expected = model.get_prices(datetime.fromtimestamp(NOW, UTC)).calc_price(theirs)["total_price"]
    assert cost(usage, facts.rates) == expected * 10**9


def test_audio_as_it_is_written() -> None:
    written = PriceSettings.model_validate({"input": 1, "output": 2, "audio_output": 5})
    rates = written_rates(written)
    assert rates.audio == (10**9, 5 * 10**9)
    assert written_rates(PriceSettings.model_validate({"input": 1, "output": 2})).audio is None


def test_a_price_of_requests_is_rounded_to_the_nearest() -> None:
    listed = genai_prices.types.ModelPrice(
        input_mtok=Decimal(1), output_mtok=Decimal(1), requests_kcount=Decimal("0.0000016")
    )
    rates = rates_of(listed)
    assert rates is not None
    assert rates.request == 2
