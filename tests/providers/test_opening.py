"""What brings something of a reply, and what only promises one."""

from __future__ import annotations

import orjson
import pytest

from proxy.providers.opening import chunk_promises, response_promises


def choice(**members: object) -> bytes:
    return orjson.dumps({"id": "c", "choices": [{"index": 0, **members}]})


@pytest.mark.parametrize(
    "data",
    [
        choice(delta={"role": "assistant", "content": ""}, finish_reason=None),
        choice(delta={"role": "assistant", "content": None, "refusal": None, "tool_calls": []}),
        choice(delta={}),
        choice(delta=None),
        choice(text="", finish_reason=None),
        b'{"choices":[],"prompt_filter_results":[{"prompt_index":0}]}',
        b'{"choices":[],"usage":null}',
    ],
)
def test_it_only_promises(data: bytes) -> None:
    assert chunk_promises(data)


@pytest.mark.parametrize(
    "data",
    [
        choice(delta={"content": "x"}),
        choice(delta={"content": " "}),
        choice(delta={"reasoning_content": "x"}),
        choice(delta={"tool_calls": [{"index": 0}]}),
        choice(delta={"function_call": {}}),
        choice(delta={"audio": ""}),
        choice(delta={}, finish_reason="stop"),
        choice(text="x"),
        b'{"choices":[{"delta":{}},{"delta":{"content":"x"}}]}',
        b'{"choices":[],"usage":{"prompt_tokens":1}}',
        b'{"error":null}',
        b'{"choices":1}',
        b"[]",
    ],
)
def test_it_brings_something(data: bytes) -> None:
    assert not chunk_promises(data)


@pytest.mark.parametrize(
    ("kind", "promises"),
    [
        ("response.created", True),
        ("response.in_progress", True),
        ("response.output_item.added", False),
        ("response.completed", False),
        ("unheard.of", False),
    ],
)
def test_a_response_is_announced_before_it_begins(kind: str, promises: bool) -> None:
    assert response_promises(orjson.dumps({"type": kind})) == promises
