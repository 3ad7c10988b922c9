"""Where a conversation is cut: by hand, and against a replay that is written as plainly as it can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.context.atoms import Atom
from proxy.context.trim import KEPT_OUTPUTS, Cut, trim


def single(start: int, *, pinned: bool = False, user: bool = False) -> Atom:
    return Atom(start, start + 1, pinned, user)


def conversation(kinds: str) -> list[Atom]:
    """One message each: s(ystem), u(ser), a(ssistant)."""
    return [single(at, pinned=kind == "s", user=kind == "u") for at, kind in enumerate(kinds)]


def cut(kinds: str, each: Sequence[int], high: int, low: int, *, fixed: int = 0, reserve: int = 0) -> Cut:
    return trim(conversation(kinds), each, fixed=fixed, high=high, low=low, reserve=reserve)


def test_what_fits_is_let_be_even_where_the_note_would_not() -> None:
    found = cut("suaua", [10] * 5, 50, 35, reserve=30)
    assert (found.stages, found.before, found.after, found.fits) == ((), 50, 50, True)


def test_the_oldest_go_until_it_is_low() -> None:
    found = cut("suaauaau", [10] * 8, 70, 50)
    assert found.stages == ((2, 3, 4),)
    assert (found.before, found.after, found.fits) == (80, 50, True)


def test_the_note_counts_from_the_first_removal_on() -> None:
    found = cut("suaauaau", [10] * 8, 70, 50, reserve=7)
    assert found.stages == ((2, 3, 4, 5),)
    assert found.after == 47


def test_then_the_cut_stays_until_it_is_full_again() -> None:
    stages = [cut("su" + "aau" * turns, [10] * (2 + 3 * turns), 100, 60).stages for turns in range(1, 12)]
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(stages))
    assert len(set(stages)) == len(stages[-1]) + 1 < len(stages) / 1.5
    assert [atom for stage in stages[-1] for atom in stage] == [*range(2, 2 + sum(map(len, stages[-1])))]


def test_the_latest_user_message_goes_once_there_is_a_later_one() -> None:
    early = cut("uauaaa", [10] * 6, 50, 30)
    assert early.stages == ((1, 3, 4),)
    late = cut("uauaaauaa", [10] * 9, 50, 30)
    assert late.stages == ((1, 3, 4), (2, 5, 7))


def test_instructions_stay_wherever_they_stand() -> None:
    assert cut("suasaas", [10] * 7, 60, 10).stages == ((2, 4, 5),)


def test_without_a_user_the_rest_is_cut_all_the_same() -> None:
    assert cut("saaaa", [10] * 5, 40, 20).stages == ((1, 2, 3),)


def test_instructions_alone_are_refused_if_they_do_not_fit() -> None:
    found = cut("s", [100], 50, 35, fixed=5)
    assert (found.stages, found.fits, found.pinned, found.newest, found.after) == ((), False, 105, 100, 105)


def test_where_everything_is_pinned_nothing_goes() -> None:
    found = cut("ssss", [20] * 4, 50, 35)
    assert (found.stages, found.fits, found.pinned, found.newest) == ((), False, 80, 20)


def test_an_empty_conversation_costs_what_stands_around_it() -> None:
    assert trim([], [], fixed=7, high=7, low=5, reserve=9) == Cut((), (), 7, 7, 7, 0, True)
    assert not trim([], [], fixed=8, high=7, low=5, reserve=9).fits


def test_what_must_stay_is_told_apart_from_the_newest() -> None:
    found = cut("suaaua", [10, 5, 10, 10, 6, 90], 100, 70, fixed=3, reserve=2)
    assert (found.pinned, found.newest, found.fits) == (3 + 10 + 5 + 6 + 90 + 2, 90, False)
    assert found.after == found.pinned
    assert found.stages == ((2, 3),)


def test_too_large_for_a_moment_is_no_refusal_later() -> None:
    kinds, each = "uaauaa", [10, 10, 10, 10, 200, 10]
    assert not cut(kinds[:5], each[:5], 100, 70).fits
    later = cut(kinds, each, 100, 70)
    assert later.fits
    assert later.stages == ((1, 2), (4,))
    assert later.after == 30


def test_everything_that_must_stay_goes_to_the_limit_and_not_only_to_low() -> None:
    found = cut("sua", [40, 20, 30], 90, 10)
    assert (found.stages, found.fits) == ((), True)


# -- masks -----------------------------------------------------------------------------------------------------------


def tools(count: int) -> list[Atom]:
    """A task, and calls with one output each."""
    turns = [Atom(at, at + 2, outputs=(at + 1,)) for at in range(1, 1 + 2 * count, 2)]
    return [single(0, user=True), *turns]


def masked(count: int, high: int, low: int, saves: int = 80) -> Cut:
    each = [10] + [10, 90] * count
    masks = [0] + [0, saves] * count
    return trim(tools(count), each, fixed=0, high=high, low=low, reserve=50, masks=masks)


def test_outputs_are_masked_before_anything_goes() -> None:
    found = masked(10, 1000, 800)
    assert (found.stages, found.masked) == ((), (2, 4, 6))
    assert (found.before, found.after) == (1010, 1010 - 3 * 80)  # and no note


def test_what_masking_cannot_save_is_dropped() -> None:
    found = masked(10, 1000, 700, saves=20)
    assert found.stages == ((1, 2, 3),)
    assert found.masked == (8, 10, 12)  # those of the dropped are gone with them
    assert found.after == 1010 - 3 * 100 - 3 * 20 + 50


def test_the_newest_outputs_are_never_masked() -> None:
    found = masked(KEPT_OUTPUTS + 1, 400, 2)
    assert found.masked == ()
    assert found.stages == ((1, 2, 3),)


def test_nor_are_those_within_the_newest_half_of_low() -> None:
    """The newest three aside, seven could be masked; but the newest 400 tokens begin within the seventh turn."""
    found = masked(10, 1000, 800, saves=30)
    assert found.masked == (6, 8, 10, 12)
    assert found.stages == ((1, 2),)
    assert found.after == 1010 - 2 * 100 - 4 * 30 + 50


def test_pinned_outputs_are_not_masked() -> None:
    atoms = tools(10)
    atoms[1] = Atom(1, 3, pinned=True, outputs=(2,))
    each, masks = [10] + [10, 90] * 10, [0] + [0, 80] * 10
    found = trim(atoms, each, fixed=0, high=1000, low=800, reserve=50, masks=masks)
    assert found.masked == (4, 6, 8)


def test_the_newest_atom_is_never_masked() -> None:
    """The model has not seen it yet."""
    atoms = [single(0, user=True), Atom(1, 11, outputs=tuple(range(2, 11)))]
    each, masks = [10, 10, *[100] * 9], [0, 0, *[90] * 9]
    found = trim(atoms, each, fixed=0, high=500, low=400, reserve=5, masks=masks)
    assert (found.masked, found.fits) == ((), False)
    later = trim([*atoms, single(11)], [*each, 1], fixed=0, high=500, low=400, reserve=5, masks=[*masks, 0])
    assert (later.masked, later.stages, later.after) == ((2, 3, 4, 5, 6, 7), (), 921 - 540)


# -- the same, written plainly ---------------------------------------------------------------------------------------


class Given(NamedTuple):
    atoms: list[Atom]
    each: list[int]
    masks: list[int] | None
    fixed: int
    high: int
    low: int
    reserve: int


def plainly(given: Given) -> tuple[list[tuple[int, ...]], set[int], int]:
    """Stages, masked messages and what is left; every rule looked up anew for every atom."""
    atoms, each, masks = given.atoms, given.each, given.masks
    gone: set[int] = set()
    hidden: set[int] = set()
    stages: list[tuple[int, ...]] = []

    def total(n: int) -> int:
        left = sum(sum(each[a.start : a.end]) for k, a in enumerate(atoms[: n + 1]) if k not in gone)
        saved = sum(
            (masks or [])[at] for k, a in enumerate(atoms) for at in a.outputs if at in hidden and k not in gone
        )
        return given.fixed + left - saved + (given.reserve if gone else 0)

    for n in range(len(atoms)):
        if total(n) <= given.high:
            continue
        outputs = [(k, at) for k, a in enumerate(atoms[: n + 1]) for at in a.outputs]
        for k, at in outputs[:-KEPT_OUTPUTS] if masks is not None else ():
            behind = sum(each[at + 1 : atoms[n].end])
            may = k != n and behind >= given.low // 2 and k not in gone and not atoms[k].pinned
            if may and masks is not None and masks[at] > 0 and total(n) > given.low:
                hidden.add(at)
        users = [k for k, a in enumerate(atoms[: n + 1]) if a.user]
        stage = []
        for k in range(n):
            if k not in gone and not atoms[k].pinned and k not in {*users[:1], *users[-1:]} and total(n) > given.low:
                gone.add(k)
                stage.append(k)
        if stage:
            stages.append(tuple(stage))
    hidden -= {at for k in gone for at in atoms[k].outputs}
    return stages, hidden, total(len(atoms) - 1)


@st.composite
def inputs(draw: st.DrawFn) -> Given:
    atoms: list[Atom] = []
    each: list[int] = []
    masks: list[int] = []
    for kind, size in draw(st.lists(st.tuples(st.sampled_from("suaattttmM"), st.integers(0, 60)), max_size=25)):
        length = 1 + size % 3 if kind in "tmM" else 1
        start = len(each)
        outputs = tuple(range(start + 1, start + length))
        atoms.append(Atom(start, start + length, kind in "sM", kind in "um", outputs))
        each += [size] * length
        masks += [max(size - 10, 0) if at in outputs else 0 for at in range(start, start + length)]
    high = draw(st.integers(0, 400))
    low = draw(st.integers(0, high))
    masking = draw(st.booleans())
    return Given(atoms, each, masks if masking else None, draw(st.integers(0, 40)), high, low, draw(st.integers(0, 20)))


@settings(max_examples=600, deadline=None)
@given(inputs())
def test_the_cursor_finds_what_a_plain_search_finds(given: Given) -> None:
    atoms, each, masks, fixed, high, low, reserve = given
    found = trim(atoms, each, fixed=fixed, high=high, low=low, reserve=reserve, masks=masks)
    stages, hidden, left = plainly(given)
    assert found.stages == tuple(stages)
    assert found.masked == tuple(sorted(hidden))
    assert found.after == left
    assert found.fits == (left <= high)
    assert found.before == fixed + sum(each)
