"""A cut conversation as JSON: what the note says, where it stands, what a masked output looks like, what they cost."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.context.atoms import Atom, atoms_of
from proxy.context.heads import Dialect
from proxy.context.rewrite import MARKER_TOKENS, MASKED_TOKENS, marker, mask_savings, placeholder, removal, rewritten
from proxy.context.trim import Cut
from proxy.tokens import walks
from proxy.tokens.vocabularies import SHARED, Vocabulary
from tests.context.conversations import Case, cases

LONG_OUTPUT = "a word, another word, and so on " * 20
DIGITS = [1, 2, *(10**power - 1 for power in range(2, 13))]


@pytest.fixture(scope="module", params=["o200k_base", "cl100k_base"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return asyncio.run(SHARED.get(request.param))


def cost(raw: bytes, vocabulary: Vocabulary) -> int:
    extra, texts = walks.texts(walks.MESSAGE, raw)
    return extra + sum(map(vocabulary.count, texts))


def removed(*stages: tuple[int, ...], masked: tuple[int, ...] = ()) -> Cut:
    return Cut(stages, masked, before=0, after=0, pinned=0, newest=0, fits=True)


def encoded(*messages: Any) -> list[bytes]:
    return [json.dumps(message).encode() for message in messages]


# -- the note --------------------------------------------------------------------------------------------------------


def test_the_note_says_how_much_is_gone() -> None:
    atoms = [Atom(0, 1), Atom(1, 4), Atom(4, 5), Atom(5, 7)]
    each = [100, 10, 20, 30, 400, 5, 6]
    assert marker(removed((1,), (2, 3)), each, atoms) == (
        "[breakwater] 6 earlier messages (471 tokens) were removed to fit the context window."
    )
    assert marker(removed((1,), masked=(4, 6)), each, atoms) == removal(3, 60, masked=2)


def test_the_note_knows_one_from_many() -> None:
    assert removal(1, 1) == "[breakwater] 1 earlier message (1 token) was removed to fit the context window."
    assert (
        removal(42, 31204) == "[breakwater] 42 earlier messages (31204 tokens) were removed to fit the context window."
    )


def test_the_note_tells_of_masked_outputs_too() -> None:
    assert removal(1, 9, masked=1) == (
        "[breakwater] 1 earlier message (9 tokens) and the contents of 1 tool output were removed"
        " to fit the context window."
    )
    assert "and the contents of 3 tool outputs were" in removal(2, 9, masked=3)


def test_the_note_costs_no_more_than_is_reserved(vocabulary: Vocabulary) -> None:
    """A number costs by its digits: three to a token."""
    highest = 0
    for messages in DIGITS:
        for tokens in DIGITS:
            for masked in (0, *DIGITS):
                text = removal(messages, tokens, masked)
                highest = max(highest, cost(msgspec.json.encode({"role": "user", "content": text}), vocabulary))
    assert highest == MARKER_TOKENS


@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_the_note_stands_behind_the_leading_instructions(dialect: Dialect) -> None:
    system, developer = {"role": "system", "content": "s"}, {"role": "developer", "content": "d"}
    says, user = {"role": "assistant", "content": "a"}, {"role": "user", "content": "u"}
    added = {"role": "user", "content": "NOTE"}

    def out(*messages: Any, dropped: int) -> Any:
        raws = encoded(*messages)
        atoms = [Atom(at, at + 1) for at in range(len(raws))]
        return json.loads(rewritten(dialect, raws, atoms, removed((dropped,)), "NOTE", [1] * len(raws)))

    assert out(system, developer, user, says, user, dropped=3) == [system, developer, added, user, user]
    assert out(says, system, user, dropped=0) == [added, system, user]
    assert out(system, says, system, dropped=1) == [system, added, system]
    assert out(user, says, dropped=1) == [added, user]


def test_only_messages_are_instructions_among_items() -> None:
    raws = encoded({"type": "message", "role": "system"}, {"type": "premonition", "role": "system"}, {"role": "user"})
    out = rewritten("responses", raws, [Atom(at, at + 1) for at in range(3)], removed((2,)), "NOTE", [1] * 3)
    assert [entry.get("content") for entry in json.loads(out)] == [None, "NOTE", None]


def test_members_that_nobody_asked_about_may_be_odd() -> None:
    raws = [b'{"role":"system","type":1e999}', b'{"role":"user","type":1e999}', b'{"role":"user"}']
    out = rewritten("chat", raws, atoms_of("chat", raws), removed((1,)), None, [1] * 3)
    assert out == b"[" + raws[0] + b"," + raws[2] + b"]"
    told = rewritten("chat", raws, atoms_of("chat", raws), removed((1,)), "NOTE", [1] * 3)
    assert told == b"[" + raws[0] + b',{"role":"user","content":"NOTE"},' + raws[2] + b"]"


def test_what_stays_keeps_its_bytes() -> None:
    raws = [b'{ "role":"system" , "content":"\\u0041\\ud83d\\ude42" }', b'{"role":"user"}', b'{"role":"user","n":1.50}']
    out = rewritten("chat", raws, [Atom(at, at + 1) for at in range(3)], removed((1,)), 'a "note"\n', [1] * 3)
    assert out == b"[" + raws[0] + b',{"role":"user","content":"a \\"note\\"\\n"},' + raws[2] + b"]"


def test_without_a_note_there_is_none() -> None:
    raws = encoded({"role": "user"}, {"role": "user"})
    assert rewritten("chat", raws, [Atom(0, 1), Atom(1, 2)], removed((0,)), None, [1, 1]) == b'[{"role": "user"}]'


def test_nothing_left_is_an_empty_array_with_a_note() -> None:
    assert rewritten("chat", encoded({"role": "user"}), [Atom(0, 1)], removed((0,)), None, [1]) == b"[]"
    assert rewritten("chat", [], [], removed(), "NOTE", []) == b"[]"


# -- masks -----------------------------------------------------------------------------------------------------------


def test_a_masked_output_keeps_all_else() -> None:
    call = b'{"role":"assistant","tool_calls":[{"id":"c"}]}'
    result = b'{"x": [1.0,\t2], "role":"tool", "content": "a lot", "tool_call_id" : "\\u0063"}'
    atoms = atoms_of("chat", [call, result])
    out = rewritten("chat", [call, result], atoms, removed(masked=(1,)), "NOTE", [5, 1204])
    masked = (
        b'{"x":[1.0,\t2],"role":"tool","content":"[output removed by proxy: 1,204 tokens]","tool_call_id":"\\u0063"}'
    )
    assert out == b"[" + call + b"," + masked + b"]"


def test_an_item_is_masked_by_its_output() -> None:
    raws = encoded(
        {"type": "function_call", "call_id": "c"}, {"type": "function_call_output", "call_id": "c", "output": "o"}
    )
    out = json.loads(rewritten("responses", raws, [Atom(0, 2, outputs=(1,))], removed(masked=(1,)), None, [5, 30]))
    assert out[1] == {
        "type": "function_call_output",
        "call_id": "c",
        "output": "[output removed by proxy: 30 tokens]",
    }


def test_some_of_several_outputs_are_masked() -> None:
    raws = encoded({"role": "user"}, *({"role": "tool", "content": str(at)} for at in range(4)), {"role": "user"})
    atoms = [Atom(0, 1), Atom(1, 5, outputs=(1, 2, 3, 4)), Atom(5, 6)]
    out = json.loads(rewritten("chat", raws, atoms, removed((0,), masked=(2, 4)), None, [1, 2, 3, 4, 5, 6]))
    assert [entry.get("content") for entry in out] == ["0", placeholder(3), "2", placeholder(5), None]


def saved(dialect: Dialect, message: dict[str, Any], tokens: int = 1000, *, pinned: bool = False) -> int:
    return mask_savings(dialect, encoded(message), [Atom(0, 1, pinned, outputs=(0,))], [tokens])[0]


def test_what_a_text_can_stand_for_is_maskable() -> None:
    whole = 1000 - MASKED_TOKENS
    tool = {"role": "tool", "tool_call_id": "c"}
    assert saved("chat", {**tool, "content": LONG_OUTPUT}) == whole
    assert saved("chat", {**tool, "content": [{"type": "text", "text": LONG_OUTPUT}]}) == whole
    assert saved("chat", {**tool, "content": None}) == 0
    assert saved("chat", tool) == 0
    assert saved("chat", {**tool, "content": LONG_OUTPUT}, pinned=True) == 0
    item = {"call_id": "c", "output": LONG_OUTPUT}
    parts = [{"type": "input_text", "text": LONG_OUTPUT}]
    assert saved("responses", {"type": "function_call_output", **item}) == whole
    assert saved("responses", {"type": "custom_tool_call_output", "output": parts}) == whole
    assert saved("responses", {"type": "local_shell_call_output", **item}) == whole
    assert saved("responses", {"type": "shell_call_output", "call_id": "c", "output": parts}) == 0
    assert saved("responses", {"type": "computer_call_output", "output": {"type": "computer_screenshot"}}) == 0
    assert saved("responses", {"type": "of_a_later_day_output", **item}) == 0


def test_little_is_not_masked() -> None:
    tool = {"role": "tool", "tool_call_id": "c", "content": "x"}
    assert saved("chat", tool, MASKED_TOKENS + 15) == 0
    assert saved("chat", tool, MASKED_TOKENS + 16) == 16


def test_what_masking_leaves_is_not_saved() -> None:
    tool = {"role": "tool", "tool_call_id": "c", "content": LONG_OUTPUT, "name": "n" * 500}
    assert 1000 - MASKED_TOKENS - 510 < saved("chat", tool) < 1000 - MASKED_TOKENS - 500
    assert saved("chat", tool, 530) == 0


def test_what_cannot_be_taken_apart_is_not_masked() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    raws = [b'{"role":"tool","content":' + deep + b"}", b'{"\\ud800":1,"content":"x"}', b"7"]
    assert mask_savings("chat", raws, [Atom(at, at + 1, outputs=(at,)) for at in range(3)], [1000] * 3) == [0, 0, 0]


def test_a_masked_message_costs_no_more_than_is_said(vocabulary: Vocabulary) -> None:
    highest = 0
    for tokens in DIGITS:
        for dialect, message in (
            ("chat", {"role": "tool", "tool_call_id": "c", "content": "x"}),
            ("chat", {"role": "function", "name": "f", "content": "x"}),
            ("responses", {"type": "function_call_output", "call_id": "c", "output": "x"}),
        ):
            raws = encoded(message)
            atoms = [Atom(0, 1, outputs=(0,))]
            out = rewritten(dialect, raws, atoms, removed(masked=(0,)), None, [tokens])  # type: ignore[arg-type]
            left_over = 8 if "name" in message else 0
            highest = max(highest, cost(out[1:-1], vocabulary) - left_over)
    assert highest == MASKED_TOKENS


@settings(max_examples=60, deadline=None)
@given(case=st.one_of(cases("chat"), cases("responses")))
def test_real_counts_of_masked_messages_keep_the_promise(vocabulary: Vocabulary, case: Case) -> None:
    each = [cost(raw, vocabulary) if len(raw) < 20_000 else 0 for raw in case.raws]
    atoms = atoms_of(case.dialect, case.raws)
    for at, saving in enumerate(mask_savings(case.dialect, case.raws, atoms, each)):
        if saving:
            whole = [Atom(0, 1, outputs=(0,))]
            out = rewritten(case.dialect, [case.raws[at]], whole, removed(masked=(0,)), None, [each[at]])
            assert cost(out[1:-1], vocabulary) <= each[at] - saving
