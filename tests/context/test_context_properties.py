"""What holds of every conversation that is cut, each by its number in the design: P1 to P10. Here the machine writes
the conversations; `test_atoms.py` and its neighbours hold those that people have met."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from proxy.context.atoms import Atom, atoms_of
from proxy.context.heads import Dialect
from proxy.context.rewrite import MARKER_TOKENS, marker, mask_savings, placeholder, rewritten
from proxy.context.trim import Cut, trim
from tests.context.conversations import Case, cases
from tests.context.judged import ties, tokens
from tests.faults.fleet import LONG

CONVERSATIONS = settings(
    max_examples=10_000 if LONG else 1000, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
_split = msgspec.json.Decoder(list[msgspec.Raw]).decode


@dataclass
class Done:
    """A case, and what became of it."""

    case: Case

    @cached_property
    def each(self) -> list[int]:
        return self.case.each

    @cached_property
    def atoms(self) -> list[Atom]:
        return atoms_of(self.case.dialect, self.case.raws)

    @cached_property
    def masks(self) -> list[int] | None:
        case = self.case
        return mask_savings(case.dialect, case.raws, self.atoms, self.each) if case.masking else None

    def cut_to(self, atoms: list[Atom]) -> Cut:
        """Of the conversation up to some atom."""
        case = self.case
        end = atoms[-1].end if atoms else 0
        masks = None if self.masks is None else self.masks[:end]
        return trim(
            atoms, self.each[:end], fixed=case.fixed, high=case.high, low=case.low, reserve=MARKER_TOKENS, masks=masks
        )

    @cached_property
    def cut(self) -> Cut:
        return self.cut_to(self.atoms)

    @cached_property
    def out(self) -> bytes:
        note = marker(self.cut, self.each, self.atoms)
        return rewritten(self.case.dialect, self.case.raws, self.atoms, self.cut, note, self.each)

    @cached_property
    def dropped(self) -> set[int]:
        return {k for stage in self.cut.stages for k in stage}

    @cached_property
    def kept(self) -> list[int]:
        """Positions of the messages that stay."""
        return [at for k, atom in enumerate(self.atoms) if k not in self.dropped for at in range(atom.start, atom.end)]

    @cached_property
    def sent(self) -> list[bytes]:
        """What goes out, without the note."""
        sent = [bytes(raw) for raw in _split(self.out)]
        if self.dropped:
            del sent[self.leading]
        return sent

    @cached_property
    def leading(self) -> int:
        roles = [message.get("role") in ("system", "developer") for message in self.case.messages]
        return [*roles, False].index(False)


def p1_calls_and_results_stay_together(done: Done) -> None:
    kept = set(done.kept)
    for call, result in ties(done.case.dialect, done.case.messages):
        assert (call in kept) == (result in kept)
    list(ties(done.case.dialect, json.loads(done.out)))


def p2_instructions_stay(done: Done) -> None:
    def instructions(raws: list[bytes]) -> list[bytes]:
        return [raw for raw in raws if json.loads(raw).get("role") in ("system", "developer")]

    assert instructions(done.sent) == instructions(done.case.raws)


def p3_the_task_and_the_latest_word_stay(done: Done) -> None:
    spoken = [at for at, message in enumerate(done.case.messages) if message.get("role") == "user"]
    assert {*spoken[:1], *spoken[-1:]} <= set(done.kept)


def p4_nothing_is_added_but_one_note(done: Done) -> None:
    case, masked = done.case, set(done.cut.masked)
    assert masked <= set(done.kept)
    for at, raw in zip(done.kept, done.sent, strict=True):
        if at in masked:
            member = "content" if case.dialect == "chat" else "output"
            assert json.loads(raw) == {**case.messages[at], member: placeholder(done.each[at])}
        else:
            assert raw == case.raws[at]
    if done.dropped:
        note = json.loads(done.out)[done.leading]
        assert (note["role"], note["content"][:12]) == ("user", "[breakwater]")


def p5_it_fits_or_is_refused(done: Done) -> None:
    cut, case = done.cut, done.case
    assert case.fixed + sum(tokens(bytes(raw)) for raw in _split(done.out)) <= cut.after
    assert cut.fits == (cut.after <= case.high)
    assert cut.before == case.fixed + sum(done.each)
    if not cut.fits:
        assert cut.after == cut.pinned
    assert cut.newest <= cut.pinned <= cut.after


def p6_what_fits_is_let_be(done: Done) -> None:
    if done.case.fixed + sum(done.each) <= done.case.high:
        assert not done.cut.stages
        assert done.out == b"[" + b",".join(done.case.raws) + b"]"


def p7_a_cut_stays_where_it_is(done: Done) -> None:
    """What is removed from a beginning, up to any atom, is removed from the whole, and in the same stages."""
    whole, gone = done.cut, set(range(len(done.case.raws))) - set(done.kept)
    for length in range(len(done.atoms)):
        part = done.cut_to(done.atoms[:length])
        assert {k for stage in part.stages for k in stage} <= done.dropped
        assert part.stages == whole.stages[: len(part.stages)]
        assert set(part.masked) <= set(whole.masked) | gone
        if length % 8 == 7:
            end = done.atoms[length - 1].end
            assert atoms_of(done.case.dialect, done.case.raws[:end]) == done.atoms[:length]


def p8_what_was_cut_is_not_cut_again(done: Done) -> None:
    if done.cut.fits:
        raws = [bytes(raw) for raw in _split(done.out)]
        again = Done(replace(done.case, messages=[json.loads(raw) for raw in raws], raws=raws))
        assert again.out == done.out


def p9_reasoning_stays_with_what_came_of_it(done: Done) -> None:
    """Next to each other, too: no note comes between them."""
    sent = json.loads(done.out)
    came = [after for message, after in pairwise(done.case.messages) if message.get("type") == "reasoning"]
    left = [after for message, after in pairwise(sent) if message.get("type") == "reasoning"]
    rest = iter(came)
    for after in left:
        assert any(_alike(after, one) for one in rest)
    kept = set(done.kept)
    for at, message in enumerate(done.case.messages[:-1]):
        if message.get("type") == "reasoning":
            assert (at in kept) == (at + 1 in kept)


def _alike(sent: Any, given: Any) -> bool:
    """But for a masked output."""
    return {**sent, "output": 0} == {**given, "output": 0}


def p10_the_same_goes_in_and_the_same_comes_out(done: Done) -> None:
    """Also where a message is part of a larger buffer, as the decoder leaves it."""
    case = done.case
    again = Done(replace(case, raws=_split(b"[" + b",".join(case.raws) + b"]")))  # type: ignore[arg-type]
    again.each = done.each
    assert again.cut == done.cut
    assert again.out == done.out


PROPERTIES: tuple[Callable[[Done], None], ...] = (
    p1_calls_and_results_stay_together,
    p2_instructions_stay,
    p3_the_task_and_the_latest_word_stay,
    p4_nothing_is_added_but_one_note,
    p5_it_fits_or_is_refused,
    p6_what_fits_is_let_be,
    p7_a_cut_stays_where_it_is,
    p8_what_was_cut_is_not_cut_again,
    p9_reasoning_stays_with_what_came_of_it,
    p10_the_same_goes_in_and_the_same_comes_out,
)


def every_property(case: Case) -> None:
    done = Done(case)
    for holds in PROPERTIES:
        holds(done)


@pytest.mark.faults
@pytest.mark.slow
@CONVERSATIONS
@given(cases("chat"))
def test_every_chat_is_cut_as_promised(case: Case) -> None:
    every_property(case)


@pytest.mark.faults
@pytest.mark.slow
@CONVERSATIONS
@given(cases("responses"))
def test_every_conversation_of_items_is_cut_as_promised(case: Case) -> None:
    every_property(case)


@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_the_generated_conversations_are_worth_it(dialect: Dialect) -> None:
    """Without it a generator that writes only what fits would make every property true."""
    seen = {"cut": 0, "twice": 0, "masked": 0, "refused": 0, "untouched": 0, "ties": 0}

    @settings(max_examples=200, database=None, deadline=None, derandomize=True)
    @given(cases(dialect))
    def look(case: Case) -> None:
        done = Done(case)
        seen["cut"] += bool(done.cut.stages)
        seen["twice"] += len(done.cut.stages) > 1
        seen["masked"] += bool(done.cut.masked)
        seen["refused"] += not done.cut.fits
        seen["untouched"] += not done.cut.stages and not done.cut.masked
        seen["ties"] += any(result > call + 1 for call, result in ties(dialect, case.messages))

    look()
    assert min(seen.values()) >= 5, seen
