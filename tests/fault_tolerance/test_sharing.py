"""How targets that share are ordered."""

from __future__ import annotations

from collections import Counter
from random import Random

from proxy.fault_tolerance.sharing import Sharing, together
from proxy.types import Target
from tests.providers.upstream import HEADERS, chat

A, B, C, D = (Target(name, "m", "m") for name in "abcd")


def sharing(seed: int = 1) -> Sharing:
    return Sharing(Random(seed).random)


def test_targets_that_do_not_share_keep_their_order() -> None:
    assert list(sharing().order([[A], [B], [C]], chat())) == [A, B, C]


def test_one_target_is_passed_on_as_it_is() -> None:
    groups = ((A,),)
    assert sharing().order(groups, chat()) is groups[0]


def test_the_fewest_in_flight_come_first_and_the_next_group_last() -> None:
    one = sharing()
    for target in (A, A, B):
        one.begun(target)
    assert list(one.order([[A, B, C], [D]], chat())) == [C, B, A, D]
    one.ended(A)
    one.ended(A)
    assert [one.in_flight(target) for target in (A, B, C)] == [0, 1, 0]


def test_of_equals_each_gets_its_part() -> None:
    one = sharing()
    firsts = Counter(one.order([[A, B]], chat())[0].provider for _ in range(400))
    assert 150 < firsts["a"] < 250


def test_nothing_is_kept_of_what_is_idle() -> None:
    one = sharing()
    one.begun(A)
    one.ended(A)
    assert one._in_flight == {}


def test_what_belongs_together_stays_together_however_busy_it_is() -> None:
    one = sharing()
    runs = [chat(headers=[*HEADERS, (b"x-breakwater-run-id", b"run-%d" % number)]) for number in range(200)]
    before = [one.order([[A, B, C]], run)[0] for run in runs]
    for target in before:
        one.begun(target)
    assert [one.order([[A, B, C]], run)[0] for run in runs] == before
    assert min(Counter(target.provider for target in before).values()) > 40


def test_a_target_that_drops_out_moves_only_its_own() -> None:
    one = sharing()
    runs = [chat(prompt_cache_key=f"key-{number}") for number in range(200)]
    for run in runs:
        whole = list(one.order([[A, B, C]], run))
        assert list(one.order([[A, B]], run)) == [target for target in whole if target is not C]


def test_the_run_wins_over_the_prompt_s_key_and_null_is_none() -> None:
    run = [*HEADERS, (b"x-breakwater-run-id", b"run-1")]
    assert together(chat(headers=run, prompt_cache_key="k")) == b"run-1"
    assert together(chat(prompt_cache_key="k")) == b'"k"'
    assert together(chat(prompt_cache_key=None)) == b""
    assert together(chat(prompt_cache_key="")) == b""
    assert together(chat()) == b""
