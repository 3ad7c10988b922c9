"""How many tokens one target gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.context.limits import believed, corrected, limit_of, margin
from proxy.types import TooLong

SOME = st.integers(1, 2_000_000)


@pytest.mark.parametrize(
    ("max_tokens", "window", "minute", "output", "limit"),
    [
        (None, None, None, 0, None),  # what nobody knows is no limit
        (None, 128_000, None, 0, 126_720),
        (None, 128_000, None, 16_000, 110_720),
        (75_000, 128_000, None, 0, 75_000),
        (75_000, 128_000, None, 100_000, 26_720),
        (75_000, None, None, 16_000, 75_000),  # an operator's limit is of the prompt alone
        (None, None, 40_000, 1000, 39_000),
        (75_000, 128_000, 40_000, 0, 40_000),
        (None, 8_000, None, 9_000, 7_920),  # a maximum beyond the window is the provider's to refuse
        (None, 8_000, None, 7_920, 7_920),
        (None, 8_000, None, 7_919, 1),
        (None, 1, None, 0, 1),
    ],
)
def test_the_smallest_of_what_is_known_is_the_limit(
    max_tokens: int | None, window: int | None, minute: int | None, output: int, limit: int | None
) -> None:
    assert limit_of(max_tokens, window, minute, output) == limit


@given(st.none() | SOME, st.none() | SOME, st.none() | SOME, st.integers(0, 3_000_000))
def test_a_limit_is_never_above_what_it_is_made_of(
    max_tokens: int | None, window: int | None, minute: int | None, output: int
) -> None:
    limit = limit_of(max_tokens, window, minute, output)
    given_ = [one for one in (max_tokens, window, minute) if one is not None]
    if not given_:
        assert limit is None
    else:
        assert limit is not None
        assert 1 <= limit <= min(given_)
        if window is not None and output < window - margin(window):
            assert limit + output + margin(window) <= window


@pytest.mark.parametrize(
    ("sent", "refusal", "output", "limit"),
    [
        (10_000, TooLong(), 0, 9_000),  # no figures: a tenth less
        (10_000, TooLong(8_000, 10_000), 0, 7_840),
        (10_000, TooLong(8_000, 12_000, 2_000), 2_000, 5_880),  # its input was 10,000 and 6,000 are left for it
        (5_000, TooLong(8_000, 10_000), 0, 3_920),  # it counts twice what we count
        (10_000, TooLong(8_000), 0, 7_840),  # it does not say how much it counted: ours has to do
        (9_000, TooLong(128_000, 100_000), 0, 8_820),  # figures that make no sense still lead to less
        (1, TooLong(), 0, 1),
    ],
)
def test_a_refusal_corrects_the_limit(sent: int, refusal: TooLong, output: int, limit: int) -> None:
    assert abs(corrected(sent, refusal, output) - limit) <= 1


@given(st.integers(2, 10**7), st.none() | SOME, st.none() | SOME, st.none() | SOME, st.integers(0, 10**6))
def test_a_second_try_is_always_shorter(
    sent: int, window: int | None, asked: int | None, of_output: int | None, output: int
) -> None:
    assert 1 <= corrected(sent, TooLong(window, asked, of_output), output) < sent


def test_a_minute_has_to_hold_every_choice_and_a_window_one() -> None:
    assert limit_of(None, 128_000, 40_000, 1000, choices=4) == 36_000
    assert limit_of(None, 10_000, None, 1000, choices=4) == 8_900


@pytest.mark.parametrize(
    ("sent", "refusal", "output", "window"),
    [
        (10_000, TooLong(8_000), 0, 8_000),  # it does not say how much it counted
        (10_000, TooLong(8_000, 10_000), 0, 8_000),
        (10_000, TooLong(8_000, 10_100), 0, 8_000),  # what the margin is for
        (10_000, TooLong(8_000, 10_200), 0, 7_600),
        (8_000, TooLong(8_000, 10_000), 0, 6_400),
        (8_000, TooLong(8_000, 12_000, 2_000), 0, 6_400),  # its input was 10,000
        (8_000, TooLong(8_000, 10_000), 2_000, 8_000),  # it may have counted the reply, too
        (1_000, TooLong(8_000, 10_000), 0, 4_000),
    ],
)
def test_a_provider_that_counts_more_has_less_room_by_our_count(
    sent: int, refusal: TooLong, output: int, window: int
) -> None:
    assert refusal.window is not None
    assert believed(refusal.window, sent, refusal, output) == window
