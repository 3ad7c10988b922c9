"""Which conversations are not understood, and what is said of each: by hand, one by one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.context.atoms import Untrimmable, atoms_of
from proxy.context.heads import Dialect
from tests.context.pieces import SAYS, USER, calls, refusal, result


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (result("z"), "orphan_result"),
        ({"role": "tool", "content": "r"}, "orphan_result"),
        ({"role": "tool", "tool_call_id": None}, "orphan_result"),
        ({"role": "tool", "tool_call_id": 7}, "malformed"),
        ({"role": "function", "name": None}, "orphan_result"),
        (calls("z"), "unanswered_call"),
        (calls("z", role="user"), "malformed"),
        ({"role": "assistant", "tool_calls": [{"type": "function"}]}, "malformed"),
        ({"role": "assistant", "tool_calls": [{"id": 7}]}, "malformed"),
        ({"role": "assistant", "tool_calls": [None]}, "malformed"),
        ({"role": "assistant", "tool_calls": {"id": "a"}}, "malformed"),
        ({"role": "assistant", "function_call": "auto"}, "malformed"),
        ({"role": "assistant", "function_call": {}}, "malformed"),
        ({"role": "critic", "content": "c"}, "unknown_role"),
        ({"role": "User", "content": "c"}, "unknown_role"),
        ({"role": ["user"], "content": "c"}, "unknown_role"),
        ({"content": "c"}, "unknown_role"),
        ({}, "unknown_role"),
        (None, "not_an_object"),
        ("user", "not_an_object"),
        ([USER], "not_an_object"),
        (1.5, "not_an_object"),
    ],
)
def test_a_chat_that_is_not_understood(message: Any, reason: str) -> None:
    assert refusal("chat", USER, SAYS, message) == (reason, 2)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"type": "function_call", "name": "f"}, "malformed"),
        ({"type": "function_call", "call_id": 1}, "malformed"),
        ({"type": "function_call_output", "output": "o"}, "orphan_result"),
        ({"type": "message", "content": "u"}, "unknown_role"),
        ({"type": "message", "role": "tool", "content": "u"}, "unknown_role"),
        ({"role": "critic", "content": "u"}, "unknown_role"),
        ({"content": "u"}, "unknown_role"),
        ({"type": 5, "role": "user"}, "malformed"),
        ("user", "not_an_object"),
        (None, "not_an_object"),
    ],
)
def test_items_that_are_not_understood(item: Any, reason: str) -> None:
    assert refusal("responses", USER, USER, item) == (reason, 2)


def test_results_that_come_before_their_call_are_orphans() -> None:
    assert refusal("chat", result("a"), calls("a")) == ("orphan_result", 0)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"role": "user", "content": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed"),
        (b"[" * 100_000 + b"]" * 100_000, "not_an_object"),
        (b'{"role": 1e999}', "malformed"),
        (b'{"role": ' + b"1" * 5000 + b"}", "malformed"),
        (b'{"role": "\\ud800"}', "malformed"),
        (b'{"role": "user", "content": NaN}', "malformed"),
        (b'{"role": "\xff"}', "malformed"),
        (b'{"role": "user"', "malformed"),
        (b"", "not_an_object"),
        (b"\x00", "not_an_object"),
    ],
)
@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_what_cannot_be_read(dialect: Dialect, raw: bytes, reason: str) -> None:
    user = json.dumps(USER).encode()
    with pytest.raises(Untrimmable) as raised:
        atoms_of(dialect, [user, raw, user])
    assert (raised.value.reason, raised.value.position) == (reason, 1)
