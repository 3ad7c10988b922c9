"""P11: any JSON is either understood or said not to be; nothing else comes out of it, and nothing is repaired.

Half of it are good conversations that were damaged, because only those come near the borders of what is understood.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from proxy.context.atoms import Atom, Untrimmable, atoms_of
from proxy.context.heads import Dialect
from proxy.context.rewrite import MARKER_TOKENS, marker, mask_savings, rewritten
from proxy.context.trim import trim
from tests.context.conversations import written
from tests.context.judged import ties
from tests.faults.fleet import LONG

REASONS = {
    "not_an_object",
    "malformed",
    "unknown_role",
    "orphan_result",
    "duplicate_result",
    "unanswered_call",
    "stored_item",
}
ODD: tuple[Any, ...] = (None, True, 0, -1.5, 10**40, "", "user", "\x00", "tool", [], [None], {}, {"id": "a"}, [["a"]])
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
MANY = settings(RELAXED, max_examples=3000 if LONG else 200)
SLOWLY_MADE = settings(RELAXED, max_examples=1000 if LONG else 100)


def understood(dialect: Dialect, raws: list[Any]) -> list[Atom] | Untrimmable:
    try:
        return atoms_of(dialect, raws)
    except Untrimmable as error:
        return error


def process(dialect: Dialect, raws: list[Any], limit: int = 100) -> bytes | None:
    """All of it, as one request goes through it; None if the conversation is not understood."""
    atoms = understood(dialect, raws)
    if isinstance(atoms, Untrimmable):
        assert atoms.reason in REASONS
        assert atoms.position in range(len(raws))
        return None
    assert [at for atom in atoms for at in range(atom.start, atom.end)] == list(range(len(raws)))
    each = [len(raw) // 4 + 4 for raw in raws]
    masks = mask_savings(dialect, raws, atoms, each)
    cut = trim(atoms, each, fixed=3, high=limit, low=limit * 7 // 10, reserve=MARKER_TOKENS, masks=masks)
    return rewritten(dialect, raws, atoms, cut, marker(cut, each, atoms), each)


def damaged(messages: list[Any], seed: int) -> list[Any]:
    draw = random.Random(seed)
    messages = copy.deepcopy(messages)
    for _ in range(draw.randrange(1, 4)):
        if not messages:
            break
        at = draw.randrange(len(messages))
        kind = draw.randrange(6)
        if kind == 0:
            del messages[at]
        elif kind == 1:
            messages.insert(draw.randrange(len(messages) + 1), copy.deepcopy(messages[at]))
        elif kind == 2:
            other = draw.randrange(len(messages))
            messages[at], messages[other] = messages[other], messages[at]
        elif kind == 3:
            messages[at] = draw.choice(ODD)
        elif isinstance(messages[at], dict) and messages[at]:
            _retype(messages[at], draw)
    return messages


def _retype(message: dict[str, Any], draw: random.Random) -> None:
    member = draw.choice(sorted(message))
    inner = message[member]
    if isinstance(inner, list) and inner and isinstance(inner[0], dict) and draw.random() < 0.5:
        _retype(inner[0], draw) if inner[0] else None
    elif draw.random() < 0.2:
        del message[member]
    else:
        message[member] = draw.choice(ODD)


@pytest.mark.faults
@pytest.mark.parametrize("dialect", ["chat", "responses"])
@MANY
@given(steps=st.lists(st.integers(0, 65_535), min_size=1, max_size=12), seed=st.integers(0, 2**32))
def test_damaged_conversations_are_understood_or_not(dialect: Dialect, steps: list[int], seed: int) -> None:
    messages = damaged(written(dialect, steps), seed)
    out = process(dialect, [json.dumps(message).encode() for message in messages])
    event("understood" if out else "not understood")
    if out is not None:
        list(ties(dialect, json.loads(out)))
        list(ties(dialect, messages))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
NAMES = st.sampled_from(
    (
        *("role", "type", "id", "call_id", "tool_call_id", "tool_calls", "function_call", "name", "content", "output"),
        *("cache_control", "approval_request_id"),
    )
)
KINDS = st.sampled_from(("user", "tool", "assistant", "function", "system", "message", "reasoning", "function_call"))
NEARLY = st.dictionaries(NAMES, JSON | KINDS | st.just([{"id": "a"}]), max_size=6)


@pytest.mark.faults
@pytest.mark.parametrize("dialect", ["chat", "responses"])
@SLOWLY_MADE
@given(values=st.lists(JSON | NEARLY, max_size=6))
def test_any_json_is_understood_or_not(dialect: Dialect, values: list[Any]) -> None:
    process(dialect, [json.dumps(value).encode() for value in values])


@pytest.mark.parametrize("dialect", ["chat", "responses"])
@MANY
@given(raws=st.lists(st.binary(max_size=40), max_size=4))
def test_even_what_is_no_json_raises_nothing_else(dialect: Dialect, raws: list[bytes]) -> None:
    process(dialect, raws)


@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_every_member_of_every_type(dialect: Dialect) -> None:
    """Not by chance: each member of each message of a conversation that has all kinds, retyped in every way."""
    messages = written(dialect, range(400, 436))
    raws = [json.dumps(message).encode() for message in messages]
    assert process(dialect, raws, 10_000)
    for at, message in enumerate(messages):
        for member in message:
            for value in ODD:
                raw = json.dumps({**message, member: value}).encode()
                process(dialect, [*raws[:at], raw, *raws[at + 1 :]], 10_000)


def test_a_message_that_is_nested_too_deeply_is_not_understood() -> None:
    deep: Any = msgspec.Raw(b'{"role": "user", "content": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}")
    assert process("chat", [deep]) is None


def test_lone_surrogates_raise_nothing_else() -> None:
    for escape in (b"\\ud800", b"\\udc00", b"\\ud800\\ud800"):
        for member in (b"role", b"content", b"tool_call_id", b"\\ud800"):
            process("chat", [b'{"role": "user", "' + member + b'": "' + escape + b'"}'])
