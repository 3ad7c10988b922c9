"""What comes after a failed attempt: every rule once, without a provider."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import (
    ConnectFailed,
    StreamInterrupted,
    UpstreamBroken,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.fault_tolerance.retry import OPEN, Bounds, Course, RetryPolicy, Step
from proxy.types import Target

A, B, C = Target("a", "m", "m"), Target("b", "m", "m"), Target("c", "m", "m")
A2 = Target("a", "n", "m")
DOWN = UpstreamUnavailable("x").but(reason="server_error")


def credential() -> UpstreamError:
    return UpstreamUnavailable("x").but(reason="credential", retryable=False, trips_breaker=False, cools="credential")


def limited(seconds: float | None) -> UpstreamError:
    return UpstreamRateLimited("x").but(reason="rate_limited", asked=seconds)


def course(
    *targets: Target,
    replayable: bool = True,
    deadline: float = 900.0,
    calls: int = 6,
    random: float = 0.5,
    **policy: Any,
) -> Course:
    return Course(RetryPolicy(**policy), targets, Bounds(deadline, calls), lambda: random, replayable=replayable)


def test_a_request_has_nowhere_else_to_go_once_each_target_has_failed_it_or_is_open() -> None:
    one = course(A, B, C)
    one.skipped(0, OPEN, 0.0)
    one.failed(1, DOWN, 0.0)
    assert not one.is_exhausted
    one.skipped(2, "rate_limited", 0.0, 5.0)
    assert not one.is_exhausted, "a key that rests is no reason to try a target that is down"
    one.failed(2, DOWN, 0.0)
    assert one.is_exhausted


def after(error: UpstreamError, *targets: Target, **more: Any) -> Step | None:
    one = course(*targets, **more)
    one.failed(0, error, 0.0)
    return one.next(0.0)


@pytest.mark.parametrize(
    ("error", "here", "elsewhere"),
    [
        (DOWN, True, True),
        (ConnectFailed("x", reason="refused"), True, True),
        (UpstreamBroken("x", reason="reset"), True, True),
        (UpstreamTimeout("x"), False, True),
        (limited(None), True, True),
        (credential(), False, True),
        (UpstreamBroken("x", reason="encoding"), False, True),
        (UpstreamBroken("x", reason="too_large"), False, False),
        (StreamInterrupted("x"), False, False),
        (UpstreamError("x"), False, False),
    ],
    ids=lambda value: getattr(value, "reason", None) or str(value),
)
def test_what_is_sent_again_where(error: UpstreamError, here: bool, elsewhere: bool) -> None:
    step = after(error, A)
    assert (step is not None) == here
    if here:
        assert step == Step(0, 0.5, True)  # half of the first delay
    assert after(error, A, B) == (Step(1) if elsewhere else None)  # at once, and it draws nothing


def test_a_timeout_is_repeated_at_the_same_place_only_where_that_is_wanted() -> None:
    assert after(UpstreamTimeout("x"), A) is None
    assert after(UpstreamTimeout("x"), A, on_timeout=True) == Step(0, 0.5, True)


@pytest.mark.parametrize("error", [DOWN, limited(1.0), credential(), UpstreamTimeout("x")], ids=lambda e: e.reason)
def test_what_must_not_be_served_twice_is_sent_again_only_if_nothing_was_sent(error: UpstreamError) -> None:
    assert after(error, A, B, replayable=False) is None
    assert after(ConnectFailed("x", reason="refused"), A, B, replayable=False) == Step(1)


def test_another_key_of_the_same_provider_comes_at_once_and_before_other_targets() -> None:
    error = limited(5.0)
    error.other_key = True
    assert after(error, A, B) == Step(0)


def test_the_delay_grows_and_is_capped() -> None:
    one = course(A, base_delay=1.0, max_delay=3.0, max_attempts=6, random=1.0)
    waits = []
    for _ in range(4):
        one.failed(0, DOWN, 0.0)
        step = one.next(0.0)
        assert step is not None
        waits.append(step.wait)
    assert waits == [1.0, 2.0, 3.0, 3.0]


def test_without_jitter_a_delay_is_its_most_and_a_wish_is_obeyed_to_the_letter() -> None:
    assert after(DOWN, A, jitter=False) == Step(0, 1.0, True)
    assert after(limited(7.0), A, jitter=False) == Step(0, 7.0)


@pytest.mark.parametrize(
    ("asked", "more", "step"),
    [
        (2.0, {}, Step(0, 2.5)),  # and half of the base delay, for it is more than a tenth of two seconds
        (20.0, {}, Step(0, 21.0)),
        (31.0, {}, None),
        (20.0, {"deadline": 20.5}, None),
        (20.0, {"deadline": 19.0}, None),
    ],
)
def test_what_a_provider_asks_for_is_obeyed_if_it_fits(asked: float, more: dict[str, Any], step: Step | None) -> None:
    assert after(limited(asked), A, **more) == step


def test_what_a_dying_provider_asks_for_is_obeyed_and_draws_all_the_same() -> None:
    assert after(UpstreamUnavailable("x").but(reason="overloaded", asked=2.0), A) == Step(0, 2.5, True)


def test_targets_come_in_order_and_then_the_one_that_may_be_asked_first() -> None:
    one = course(A, B, C)
    one.failed(0, limited(20.0), 0.0)
    assert one.next(0.0) == Step(1)
    one.failed(1, DOWN, 1.0)
    assert one.next(1.0) == Step(2)
    one.failed(2, credential(), 2.0)
    assert one.next(2.0) == Step(1, 0.5, True)
    one.failed(1, DOWN, 3.0)
    assert one.next(3.0) is None  # four attempts


def test_time_that_has_passed_counts_towards_the_wait() -> None:
    one = course(A, B)
    one.failed(0, limited(10.0), 0.0)
    assert one.next(0.0) == Step(1)
    one.failed(1, credential(), 6.0)
    assert one.next(6.0) == Step(0, 4.5)


def test_what_was_only_skipped_is_tried_after_its_rest_and_draws_nothing() -> None:
    one = course(A)
    one.skipped(0, "rate_limited", 0.0, 2.0)
    assert one.next(0.0) == Step(0, 2.5)


def test_a_target_that_rests_again_and_again_does_not_keep_a_request() -> None:
    one = course(A, max_attempts=3)
    steps = 0
    for now in range(100):
        one.skipped(0, "rate_limited", float(now), 1.0)
        if one.next(float(now)) is None:
            break
        steps += 1
    assert steps == 3


def test_an_open_circuit_is_passed_over_and_remembered_for_a_probe() -> None:
    one = course(A, B)
    one.skipped(0, OPEN, 0.0)
    assert one.next(0.0) == Step(1)
    one.failed(1, credential(), 0.0)
    assert one.next(0.0) is None
    assert one.open_positions(0.0) == [0]
    assert one.open_positions(900.0) == []


def test_another_target_of_a_provider_that_failed_draws_on_its_budget() -> None:
    assert after(DOWN, A, A2) == Step(1, draws=True)
    assert after(credential(), A, A2) == Step(1)
    assert after(DOWN, A, B, A2) == Step(1)


def test_what_the_budget_denies_is_left_out() -> None:
    one = course(A, B)
    one.failed(0, DOWN, 0.0)
    one.next(0.0)
    one.failed(1, DOWN, 0.0)
    assert one.next(0.0) == Step(0, 0.5, True)
    one.denied(0)
    assert one.next(0.0) == Step(1, 0.5, True)
    one.denied(1)
    assert one.next(0.0) is None


@pytest.mark.parametrize("more", [{"calls": 0}, {"max_attempts": 1}, {"deadline": 0.0}])
def test_calls_attempts_and_time_end_it(more: dict[str, Any]) -> None:
    assert after(DOWN, A, B, **more) is None


def test_a_wait_that_reaches_beyond_the_deadline_is_not_begun() -> None:
    assert after(DOWN, A, deadline=0.4) is None
    assert after(DOWN, A, deadline=0.6) == Step(0, 0.5, True)


ERRORS = st.sampled_from([DOWN, limited(None), limited(1.0), credential(), UpstreamTimeout("x"), None])


@given(
    errors=st.lists(ERRORS, max_size=40),
    count=st.integers(1, 5),
    attempts=st.integers(1, 6),
    random=st.floats(0, 1, exclude_max=True),
)
def test_attempts_are_bounded_and_only_a_return_waits(
    errors: list[UpstreamError | None], count: int, attempts: int, random: float
) -> None:
    targets = [Target(f"p{number}", "m", "m") for number in range(count)]
    one = course(*targets, max_attempts=attempts, random=random, deadline=1e9)
    made, at, now, seen = 0, 0, 0.0, set()
    for error in errors:
        seen.add(at)
        if error is None:
            one.skipped(at, OPEN, now)
        else:
            made += 1
            one.failed(at, error, now)
        step = one.next(now)
        if step is None:
            break
        assert made < attempts
        if step.position not in seen:
            assert (step.wait, step.draws) == (0.0, False)
        else:
            standing = one.standings[step.position]
            assert not standing.out
            assert step.wait <= 31.0
        at, now = step.position, now + step.wait
    assert made <= attempts
