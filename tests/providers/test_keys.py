"""Which credential a request gets, and how long one that was refused rests."""

from __future__ import annotations

from collections import Counter

import pytest

from proxy.errors import Cooling
from proxy.providers.base import Resting
from proxy.providers.keys import MAX_ASKED_SECONDS, SURE, Keys
from proxy.types import Headers

ONE: list[Headers] = [[(b"authorization", b"Bearer one")]]
THREE: list[Headers] = [[(b"authorization", b"Bearer %d" % number)] for number in range(3)]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def keys(headers: list[Headers], clock: Clock, random: float = 0.0) -> Keys:
    return Keys(headers, now=clock, random=lambda: random)


def test_keys_take_turns() -> None:
    pool = keys(THREE, Clock())
    assert Counter(pool.pick("m") for _ in range(9)) == {0: 3, 1: 3, 2: 3}


def test_what_belongs_together_stays_with_one_key() -> None:
    pool = keys(THREE, Clock())
    picked = {run: pool.pick("m", b"run-%d" % run) for run in range(60)}
    assert {run: pool.pick("m", b"run-%d" % run) for run in range(60)} == picked
    assert set(picked.values()) == {0, 1, 2}


def test_a_refused_key_rests_as_long_as_it_was_asked_to_and_the_others_serve() -> None:
    clock = Clock()
    pool = keys(THREE, clock)
    assert pool.refused(0, "m", "rate", 5.0)
    assert {pool.pick("m") for _ in range(9)} == {1, 2}
    assert {pool.pick("m", b"run-%d" % run) for run in range(60)} == {1, 2}
    assert pool.resting("m") is None
    clock.now += 5.0
    assert {pool.pick("m") for _ in range(9)} == {0, 1, 2}


def test_where_all_rest_the_first_to_be_ready_is_told_of_and_why() -> None:
    clock = Clock()
    pool = keys(THREE, clock)
    assert pool.refused(0, "m", "rate", 5.0)
    for _ in range(SURE):
        assert pool.refused(1, "m", "credential", None)
    assert not pool.refused(2, "m", "rate", 3.0)
    assert pool.resting("m") == Resting(3.0, "rate")
    assert pool.pick("m") == 2


def test_a_model_that_a_key_may_not_use_takes_nothing_from_the_others() -> None:
    pool = keys(ONE, Clock())
    for _ in range(SURE):
        assert not pool.refused(0, "unknown", "credential", None)
    assert pool.resting("unknown") is not None
    assert pool.resting("m") is None


def test_one_slip_of_a_provider_s_switches_nothing_off() -> None:
    pool = keys(ONE, Clock())
    for _ in range(10):
        for _ in range(SURE - 1):
            pool.refused(0, "m", "credential", None)
        assert pool.resting("m") is None
        pool.accepted(0, "m")


def test_no_client_can_switch_a_model_off_by_what_it_writes() -> None:
    pool = keys(ONE, Clock())
    for _ in range(100):
        pool.refused(0, "m", "forbidden", None)
    assert pool.resting("m") is None


@pytest.mark.parametrize("why", ["credential", "forbidden"])
def test_a_refused_key_is_avoided_at_once_where_there_is_another(why: Cooling) -> None:
    pool = keys(THREE, Clock())
    assert pool.refused(0, "m", why, None)
    assert {pool.pick("m") for _ in range(9)} == {1, 2}


@pytest.mark.parametrize(
    ("why", "seconds"), [("rate", [1, 2, 4, 8, 16, 30, 30]), ("credential", [60, 60, 60, 120, 240])]
)
def test_a_rest_grows_with_each_refusal_in_a_row(why: Cooling, seconds: list[float]) -> None:
    clock = Clock()
    pool = keys(ONE, clock, random=0.999999999)
    for expected in seconds:
        pool.refused(0, "m", why, None)
        rest = pool.rests[0, "m"]
        assert rest.until - clock.now == pytest.approx(expected)
        clock.now = rest.until


def test_what_was_refused_together_counts_once() -> None:
    clock = Clock()
    pool = keys(ONE, clock, random=0.999999999)
    for _ in range(50):
        pool.refused(0, "m", "rate", None)
    rest = pool.resting("m")
    assert rest is not None
    assert rest.seconds == pytest.approx(1.0)


def test_a_rest_without_a_time_is_at_least_half_as_long() -> None:
    pool = keys(ONE, Clock(), random=0.0)
    for _ in range(SURE):
        pool.refused(0, "m", "credential", None)
    assert pool.resting("m") == Resting(30.0, "credential")


def test_nobody_is_sent_away_for_a_day_by_a_header() -> None:
    pool = keys(ONE, Clock())
    pool.refused(0, "m", "rate", 86_400.0)
    assert pool.resting("m") == Resting(MAX_ASKED_SECONDS, "rate")


def test_an_answer_makes_the_next_refusal_a_first_one_but_cuts_no_rest_short() -> None:
    clock = Clock()
    pool = keys(ONE, clock, random=0.999999999)
    for _ in range(2):
        pool.refused(0, "m", "rate", None)
        pool.accepted(0, "m")  # it was sent before
        assert pool.resting("m") is not None
        clock.now += 2.0
    pool.refused(0, "m", "rate", None)
    assert pool.rests[0, "m"].refusals == 3
    clock.now += 4.0
    pool.accepted(0, "m")
    pool.refused(0, "m", "rate", None)
    assert pool.rests[0, "m"].refusals == 1


def test_what_is_remembered_is_bounded_whatever_models_clients_ask_for() -> None:
    clock = Clock()
    pool = keys(ONE, clock)
    for number in range(10_000):
        pool.refused(0, f"model-{number}", "rate", None)
    assert len(pool.rests) <= 4096
    assert pool.resting("model-9999") is not None
