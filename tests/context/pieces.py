"""The pieces that conversations are written of by hand, and what is asked of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.context.atoms import Atom, Untrimmable, atoms_of
from proxy.context.heads import Dialect

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "u"}
SAYS = {"role": "assistant", "content": "a"}
THINKS = {"type": "reasoning", "id": "rs_1", "summary": []}
SPOKE = {"type": "message", "role": "assistant", "content": []}


def calls(*ids: str, **more: Any) -> dict[str, Any]:
    made = [{"id": one, "type": "function", "function": {"name": "f", "arguments": "{}"}} for one in ids]
    return {"role": "assistant", "content": None, "tool_calls": made, **more}


def result(of: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": of, "content": "r"}


def call(call_id: str, kind: str = "function_call", **more: Any) -> dict[str, Any]:
    return {"type": kind, "id": "fc_1", "call_id": call_id, "name": "f", "arguments": "{}", **more}


def output(call_id: str, kind: str = "function_call_output", **more: Any) -> dict[str, Any]:
    return {"type": kind, "call_id": call_id, "output": "o", **more}


def atoms(dialect: Dialect, *messages: Any) -> list[Atom]:
    return atoms_of(dialect, [json.dumps(message).encode() for message in messages])


def spans(dialect: Dialect, *messages: Any) -> list[tuple[int, int]]:
    return [(atom.start, atom.end) for atom in atoms(dialect, *messages)]


def refusal(dialect: Dialect, *messages: Any) -> tuple[str, int | None]:
    with pytest.raises(Untrimmable) as raised:
        atoms(dialect, *messages)
    return raised.value.reason, raised.value.position
