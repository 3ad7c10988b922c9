"""The sketch against the true percentile, estimates within their bounds, and what may be at risk at once."""

from __future__ import annotations

from collections import deque
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.budget.estimate import (
    DEFAULT_MOST,
    FIRST_GUESS,
    FORGET_AT,
    PAIRS,
    SAMPLES,
    Expectations,
    Exposure,
    Sketch,
    bucket_of,
    estimate,
    top_of,
)

counts = st.one_of(st.integers(0, 200), st.integers(0, 10_000), st.integers(0, 2**31 - 1))


def true_p95(values: list[int]) -> int:
    """The smallest value that at least 95 % of the values do not exceed."""
    ranked = sorted(values)
    return ranked[-(-len(values) * 19 // 20) - 1]


@given(st.integers(0, 2**31 - 1))
def test_a_bucket_holds_its_counts_within_a_thirty_second(value: int) -> None:
    bucket = bucket_of(value)
    top = top_of(bucket)
    assert value <= top <= value + value // 32
    assert bucket_of(top) == bucket
    assert bucket_of(top + 1) == bucket + 1


@given(st.lists(counts, min_size=1, max_size=FORGET_AT - 1))
def test_the_sketch_is_at_or_just_above_the_true_percentile(values: list[int]) -> None:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    true = true_p95(values)
    assert true <= sketch.p95() <= true + true // 32
    assert sketch.samples == len(values)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["narrow", "bimodal", "long tail"]))
def test_the_sketch_stays_near_the_percentile_of_the_recent_past(seed: int, shape: str) -> None:
    """Of 5000 replies of one habit it remembers 500: their percentile is off by five deviations at most."""
    random = Random(seed)
    sketch = Sketch()
    seen = []
    for _ in range(5000):
        if shape == "narrow":
            value = random.randrange(80, 120)
        elif shape == "bimodal":
            value = 8000 if random.random() < 0.10 else 20
        else:
            value = int(random.paretovariate(1.3) * 50)
        seen.append(value)
        sketch.add(value)
    ranked = sorted(seen)
    assert ranked[int(5000 * 0.90)] <= sketch.p95() <= ranked[int(5000 * 0.995)] * 33 // 32
    assert sketch.samples < FORGET_AT


def test_the_sketch_follows_a_change_of_habit() -> None:
    sketch = Sketch()
    for _ in range(3000):
        sketch.add(8000)
    for _ in range(4000):
        sketch.add(20)
    assert sketch.p95() == 20


def test_rare_large_replies_survive_the_forgetting() -> None:
    """6 % of the replies are large and all different: each forgetting finds them in buckets of one."""
    sketch = Sketch()
    for number in range(20_000):
        sketch.add(4000 + number * 37 % 4000 if number % 100 < 6 else 20)
        if number > 100:
            assert sketch.p95() >= 4000, number


@given(st.lists(counts, max_size=2500))
@settings(max_examples=30, deadline=None)
def test_the_pointer_agrees_with_a_fresh_count(values: list[int]) -> None:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    held = deque(index for index, count in enumerate(sketch._counts) for _ in range(count))
    assert sketch.samples == len(held)
    if held:
        assert sketch.p95() == top_of(true_p95(list(held)))


def test_the_same_replies_give_the_same_figures() -> None:
    def run() -> list[int]:
        known = Expectations()
        figures = []
        for number in range(5000):
            known.saw("t", "m", number * 7919 % 3001)
            figures.append(known.output("t", "m", None))
        return figures

    assert run() == run()


def test_a_model_nobody_knows_yet() -> None:
    known = Expectations()
    assert known.output("t", "m", None) == FIRST_GUESS
    assert known.output("t", "m", 10) == 10
    assert known.output("t", "m", 100_000) == FIRST_GUESS
    for _ in range(SAMPLES - 1):
        known.saw("t", "m", 5)
    assert known.output("t", "m", None) == FIRST_GUESS
    known.saw("t", "m", 5)
    assert known.output("t", "m", None) == 5
    assert known.output("t", "m", 3) == 3
    assert known.output("other", "m", None) == FIRST_GUESS, "one tenant's habits tell nothing of another's"


def test_pairs_are_bounded_and_the_silent_ones_go_first() -> None:
    known = Expectations()
    for _ in range(SAMPLES):
        known.saw("kept", "m", 5)
    for number in range(PAIRS * 2):
        known.saw(f"t{number}", "m", 5)
        known.saw("kept", "m", 5)
    assert len(known._sketches) == PAIRS
    assert known.output("kept", "m", None) == 5


optional = st.one_of(st.none(), st.integers(1, 2**31 - 1))


@given(
    st.integers(0, 2**31),
    optional,
    st.integers(1, 128),
    st.integers(0, 2**31 - 1),
    optional,
    optional,
)
def test_an_estimate_is_within_its_bounds(
    input_tokens: int, asked: int | None, choices: int, expected: int, cap: int | None, window: int | None
) -> None:
    found = estimate(
        input_tokens=input_tokens,
        asked=asked,
        choices=choices,
        expected=expected,
        max_output_tokens=cap,
        context_window=window,
    )
    assert 0 <= found.expected <= found.most
    assert found.expected <= expected * choices
    assert found.most <= choices * (asked or cap or DEFAULT_MOST)
    if window is not None and input_tokens < window:
        assert input_tokens + found.most // choices <= window
    if window is None:
        assert found.most == choices * (asked or cap or DEFAULT_MOST)


def test_the_maximum_is_the_clients_own_then_the_models_then_4096() -> None:
    def most(asked: int | None, cap: int | None, window: int | None) -> int:
        return estimate(
            input_tokens=1000, asked=asked, choices=1, expected=0, max_output_tokens=cap, context_window=window
        ).most

    assert most(10, 20, None) == 10
    assert most(None, 20, None) == 20
    assert most(None, None, None) == 4096
    assert most(None, None, 3000) == 2000
    assert most(None, None, 500) == 0


def test_what_makes_no_text_has_no_output() -> None:
    found = estimate(
        input_tokens=7, asked=5, choices=3, expected=9, max_output_tokens=1, context_window=1, generates=False
    )
    assert (found.expected, found.most) == (0, 0)


share = st.one_of(st.none(), st.integers(1, 10_000))


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000), st.booleans())), share, share)
def test_what_is_at_risk_is_bounded(asks: list[tuple[int, int, bool]], tokens: int | None, usd: int | None) -> None:
    """Never above the share, or the largest single risk; and nothing remains when all is over."""
    exposure = Exposure()
    running: list[tuple[int, int]] = []
    for risk_tokens, risk_usd, ends in asks:
        if ends and running:
            exposure.drop(*running.pop(0))
        if exposure.fits(risk_tokens, risk_usd, tokens, usd):
            exposure.add(risk_tokens, risk_usd)
            running.append((risk_tokens, risk_usd))
        assert tokens is None or exposure.tokens <= max(tokens, exposure.largest_tokens)
        assert usd is None or exposure.nano_usd <= max(usd, exposure.largest_nano_usd)
    for one in running:
        exposure.drop(*one)
    assert (exposure.tokens, exposure.nano_usd, exposure.running) == (0, 0, 0)


def test_with_n_times_the_maximum_all_n_run_on_their_expectation() -> None:
    exposure = Exposure()
    for _ in range(50):
        assert exposure.fits(4000, 0, 50 * 4096, None)
        exposure.add(4000, 0)
    assert not exposure.fits(50 * 96 + 4001, 0, 50 * 4096, None)
