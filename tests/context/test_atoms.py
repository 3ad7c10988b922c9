"""What of a conversation belongs together, by hand, one by one."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from proxy.context.atoms import Atom, atoms_of
from proxy.context.heads import Dialect
from tests.context.pieces import SAYS, SPOKE, SYSTEM, THINKS, USER, atoms, call, calls, output, refusal, result, spans

# -- chat ------------------------------------------------------------------------------------------------------------


def test_a_message_without_calls_is_an_atom() -> None:
    developer = {"role": "developer", "content": None}
    assert atoms("chat", SYSTEM, developer, USER, SAYS, {"role": "user"}) == [
        Atom(0, 1, pinned=True),
        Atom(1, 2, pinned=True),
        Atom(2, 3, user=True),
        Atom(3, 4),
        Atom(4, 5, user=True),
    ]


@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_nothing_has_no_atoms(dialect: Dialect) -> None:
    assert atoms(dialect) == []


def test_calls_and_all_their_results_are_one_atom() -> None:
    found = atoms("chat", USER, calls("a", "b"), result("b"), result("a"), SAYS)
    assert found == [Atom(0, 1, user=True), Atom(1, 4, outputs=(2, 3)), Atom(4, 5)]


def test_no_calls_are_no_tie() -> None:
    assert spans("chat", calls(), {**SAYS, "tool_calls": None}, {**USER, "tool_calls": []}) == [(0, 1), (1, 2), (2, 3)]


def test_an_id_that_comes_back_is_that_of_the_latest_call() -> None:
    turn = (calls("call_0"), result("call_0"))
    assert spans("chat", USER, *turn, *turn, SAYS, *turn) == [(0, 1), (1, 3), (3, 5), (5, 6), (6, 8)]


def test_the_call_that_was_left_is_the_earlier_one() -> None:
    assert refusal("chat", USER, calls("a"), calls("a"), result("a")) == ("unanswered_call", 1)


def test_one_id_for_two_calls_of_a_message_needs_two_results() -> None:
    assert spans("chat", calls("a", "a"), result("a"), result("a")) == [(0, 3)]
    assert refusal("chat", USER, calls("a", "a"), result("a")) == ("unanswered_call", 1)


def test_what_stands_between_a_call_and_its_result_belongs_to_them() -> None:
    found = atoms("chat", calls("a", "b"), result("a"), USER, SYSTEM, result("b"), SAYS)
    assert found == [Atom(0, 5, pinned=True, user=True, outputs=(1, 4)), Atom(5, 6)]


def test_ties_that_overlap_are_one_atom() -> None:
    assert spans("chat", calls("a"), calls("b"), result("a"), SAYS, result("b"), SAYS) == [(0, 5), (5, 6)]


def test_a_legacy_function_is_tied_by_its_name() -> None:
    asks = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    tells = {"role": "function", "name": "f", "content": "r"}
    assert atoms("chat", USER, asks, tells, asks, tells) == [
        Atom(0, 1, user=True),
        Atom(1, 3, outputs=(2,)),
        Atom(3, 5, outputs=(4,)),
    ]
    assert refusal("chat", asks, {**tells, "name": "g"}) == ("orphan_result", 1)
    assert refusal("chat", asks) == ("unanswered_call", 0)
    assert refusal("chat", asks, tells, tells) == ("duplicate_result", 2)
    assert refusal("chat", calls("f"), tells) == ("orphan_result", 1)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "u", "cache_control": {"type": "ephemeral"}},
        {"role": "user", "content": [{"type": "text", "text": "u", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": [{"type": "text", "text": "u", "cache_control": "1h"}]},
    ],
)
def test_what_marks_the_end_of_a_cached_prefix_is_pinned(message: Any) -> None:
    assert atoms("chat", message) == [Atom(0, 1, pinned=True, user=True)]
    assert atoms("responses", message) == [Atom(0, 1, pinned=True, user=True)]


@pytest.mark.parametrize(
    "content",
    [
        "cache_control",
        '{"cache_control": 1}',
        [{"type": "text", "text": "cache_control"}],
        [{"type": "text", "text": "u", "cache_control": None}],
    ],
)
def test_what_only_speaks_of_it_is_not(content: Any) -> None:
    assert atoms("chat", {"role": "user", "content": content}) == [Atom(0, 1, user=True)]


def test_a_marked_result_pins_its_call() -> None:
    marked = {**result("a"), "content": [{"type": "text", "text": "r", "cache_control": {"type": "ephemeral"}}]}
    assert atoms("chat", calls("a"), marked) == [Atom(0, 2, pinned=True, outputs=(1,))]
    parts = [{"type": "input_text", "text": "o", "cache_control": {"type": "ephemeral"}}]
    assert atoms("responses", call("a"), {**output("a"), "output": parts})[0].pinned


# -- responses -------------------------------------------------------------------------------------------------------


def test_what_the_model_said_in_one_go_is_one_atom() -> None:
    found = atoms("responses", USER, THINKS, SPOKE, call("a"), call("b"), output("a"), output("b"), THINKS, SPOKE)
    assert found == [Atom(0, 1, user=True), Atom(1, 7, outputs=(5, 6)), Atom(7, 9)]


def test_a_loop_of_calls_is_an_atom_for_each_turn() -> None:
    """Otherwise a session with one task and a thousand calls could never be cut."""
    turns = [item for at in range(50) for item in (THINKS, call(f"c{at}"), output(f"c{at}"))]
    assert spans("responses", USER, *turns) == [(0, 1), *((at, at + 3) for at in range(1, 151, 3))]


def test_reasoning_is_tied_to_whatever_follows() -> None:
    unknown = {"type": "premonition"}
    assert spans("responses", THINKS, USER, USER) == [(0, 2), (2, 3)]
    assert spans("responses", unknown, THINKS, unknown, unknown) == [(0, 1), (1, 3), (3, 4)]
    assert spans("responses", call("a"), THINKS, output("a"), USER, THINKS) == [(0, 3), (3, 4), (4, 5)]


@pytest.mark.parametrize(
    ("made", "answer"),
    [
        (call("a"), output("a")),
        (call("a", "custom_tool_call", input="x"), output("a", "custom_tool_call_output")),
        (call("a", "computer_call"), output("a", "computer_call_output")),
        (call("a", "local_shell_call"), output("a", "local_shell_call_output")),
        (call("a", "local_shell_call"), {"type": "local_shell_call_output", "id": "a", "output": "o"}),
        (call("a", "shell_call"), output("a", "shell_call_output")),
        (call("a", "apply_patch_call"), output("a", "apply_patch_call_output")),
        (call("a", "tool_search_call"), output("a", "tool_search_output")),
        (call("a", "of_a_later_day_call"), output("a", "of_a_later_day_call_output")),
    ],
)
def test_outputs_are_tied_by_call_id_whatever_their_type(made: Any, answer: Any) -> None:
    assert atoms("responses", USER, made, answer, USER)[1] == Atom(1, 3, outputs=(2,))
    assert refusal("responses", USER, made) == ("unanswered_call", 1)
    assert refusal("responses", USER, answer) == ("orphan_result", 1)
    assert refusal("responses", made, answer, answer) == ("duplicate_result", 2)


@pytest.mark.parametrize("kind", ["web_search_call", "mcp_call", "code_interpreter_call", "tool_search_call"])
def test_what_the_provider_ran_needs_no_output(kind: str) -> None:
    ran = {"type": kind, "id": "ws_1", "call_id": None}
    assert spans("responses", USER, THINKS, ran, SPOKE, USER) == [(0, 1), (1, 4), (4, 5)]


def test_what_the_provider_found_among_the_tools_is_its_own() -> None:
    found = {"type": "tool_search_output", "id": "ts_1", "call_id": None, "tools": []}
    assert spans("responses", {"type": "tool_search_call", "id": "ts_0"}, found, SPOKE) == [(0, 3)]


def test_an_approval_is_tied_to_what_asked_for_it() -> None:
    asks = {"type": "mcp_approval_request", "id": "mcpr_1", "name": "write"}
    grants = {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True}
    assert atoms("responses", USER, asks, grants, USER)[1] == Atom(1, 3)
    assert refusal("responses", asks) == ("unanswered_call", 0)
    assert refusal("responses", grants) == ("orphan_result", 0)
    assert refusal("responses", call("mcpr_1"), grants) == ("orphan_result", 1)
    assert refusal("responses", {**asks, "id": None}, {**grants, "approval_request_id": None}) == ("malformed", 0)


@pytest.mark.parametrize("kind", ["compaction", "compaction_summary", "summary", "context_compaction"])
def test_a_compaction_is_pinned(kind: str) -> None:
    assert atoms("responses", {"type": kind, "encrypted_content": "x"}) == [Atom(0, 1, pinned=True)]


def test_items_without_a_type_are_messages() -> None:
    assert atoms("responses", SYSTEM, {**SYSTEM, "role": "developer"}, USER, SAYS) == [
        Atom(0, 1, pinned=True),
        Atom(1, 2, pinned=True),
        Atom(2, 3, user=True),
        Atom(3, 4),
    ]


@pytest.mark.parametrize("reference", [{"type": "item_reference", "id": "msg_1"}, {"id": "msg_1"}])
def test_what_is_only_referred_to_cannot_be_counted(reference: Any) -> None:
    assert refusal("responses", USER, reference) == ("stored_item", 1)


# -- both ------------------------------------------------------------------------------------------------------------


def test_of_a_member_that_is_there_twice_the_last_one_counts() -> None:
    assert atoms_of("chat", [b'{"role": "user", "role": "system"}']) == [Atom(0, 1, pinned=True)]


def test_a_mark_in_what_cannot_be_decoded_is_taken_for_one() -> None:
    deep = b"[" * 900 + b"]" * 900
    raw = b'{"role": "user", "content": [{"cache_control": ' + deep + b"}]}"
    assert atoms_of("chat", [raw]) == [Atom(0, 1, pinned=True, user=True)]


def test_the_decoders_own_slices_are_as_good_as_bytes() -> None:
    array = json.dumps([SYSTEM, USER, calls("a"), result("a")]).encode()
    raws = msgspec.json.decode(array, type=list[msgspec.Raw])
    assert atoms_of("chat", raws) == atoms("chat", SYSTEM, USER, calls("a"), result("a"))


@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_as_many_messages_as_a_body_can_hold(dialect: Dialect) -> None:
    turn = [calls("a"), result("a")] if dialect == "chat" else [call("a"), output("a")]
    raws = [json.dumps(message).encode() for message in turn] * 32_768
    assert len(atoms_of(dialect, raws)) == 32_768
    nested = [raws[0]] * 32_768 + [raws[1]] * 32_768
    assert len(atoms_of(dialect, nested)) == 1
