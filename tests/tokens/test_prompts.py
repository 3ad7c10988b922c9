"""What of a request is prompt text, dialect by dialect, and what tools look like to a model."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.tokens import prompts, tools, walks
from proxy.types import Dialect

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy


def found(value: Any) -> tuple[int, list[str]]:
    return walks.texts(walks.MESSAGE, json.dumps(value).encode())


@pytest.mark.parametrize(
    ("message", "extra", "texts"),
    [
        ({"role": "user", "content": "hi"}, 3, ["user", "hi"]),
        ({"role": "user", "content": "hi", "name": "bob"}, 4, ["user", "hi", "bob"]),
        ({"role": "assistant", "content": None, "refusal": "no"}, 3, ["assistant", "no"]),
        ({"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "42"}]}, 3, ["tool", "42"]),
        (
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "see"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
                    {"type": "refusal", "refusal": "no"},
                    "bare",
                ],
            },
            3,
            ["user", "see", "no", "bare"],
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
                    {"id": "c2", "type": "custom", "custom": {"name": "g", "input": "text"}},
                ],
            },
            9,
            ["assistant", "f", '{"x":1}', "g", "text"],
        ),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}, 6, ["assistant", "f", "{}"]),
        ({"role": "assistant", "content": "a", "reasoning_content": "b"}, 3, ["assistant", "a", "b"]),
        # items of the Responses API
        ({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}, 3, ["user", "hi"]),
        ({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}, 4, ["{}", "f"]),
        ({"type": "function_call_output", "call_id": "c", "output": "42"}, 3, ["42"]),
        ({"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}, 3, ["hm"]),
        ("bare", 3, ["bare"]),
        # odd ones
        ({}, 3, []),
        ({"role": 7, "content": {"text": "x"}, "name": "", "tool_calls": {"a": 1}}, 3, []),
        ({"tool_calls": [None, 1, {"function": "f"}, {"function": {"name": 1}}]}, 6, []),
        (None, 0, []),
        (7, 0, []),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_a_message(message: Any, extra: int, texts: list[str]) -> None:
    assert found(message) == (extra, texts)


def take(dialect: Dialect, **members: Any) -> prompts.Prompt:
    return prompts.take_apart(
        dialect, {name: msgspec.Raw(json.dumps(value).encode()) for name, value in members.items()}
    )


def units(prompt: prompts.Prompt) -> list[tuple[int, list[str]]]:
    return [walks.texts(kind, raw) for kind, raw in prompt.units]


@pytest.mark.parametrize(
    ("dialect", "members", "expected"),
    [
        ("completions", {"prompt": "a", "suffix": "b"}, [(0, ["a"]), (0, ["b"])]),
        ("completions", {"prompt": ["a", "b"]}, [(0, ["a", "b"])]),
        ("completions", {"prompt": [1, 2, 3]}, [(3, [])]),
        ("completions", {"prompt": [[1, 2], [3]]}, [(3, [])]),
        ("completions", {"prompt": None}, [(0, [])]),
        ("completions", {"prompt": {"a": "b"}}, [(0, [])]),
        ("embeddings", {"input": "a", "prompt": "not this"}, [(0, ["a"])]),
        ("embeddings", {"input": ["a", [1, "x"], None, 2.5]}, [(1, ["a"])]),
        ("responses", {"input": "a", "instructions": "b"}, [(4, ["b"]), (4, ["a"])]),
        ("responses", {"instructions": None}, [(0, [])]),
        ("models", {"input": "a"}, []),
        ("passthrough", {"input": "a", "messages": [1]}, []),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_other_dialects(dialect: Dialect, members: dict[str, Any], expected: list[tuple[int, list[str]]]) -> None:
    assert units(take(dialect, **members)) == expected


def test_chat_has_one_unit_a_message_and_the_replys_opening() -> None:
    prompt = take("chat", messages=[{"role": "user", "content": "a"}, "b"], model="m")
    assert [walks.texts(walks.MESSAGE, raw) for raw in prompt.messages] == [(3, ["user", "a"]), (3, ["b"])]
    assert (prompt.fixed, len(prompt.messages), prompt.many, prompt.units) == (3, 2, False, [])


def test_tools_of_both_apis_render_the_same() -> None:
    function = {
        "name": "f",
        "description": "Do f.",
        "parameters": {"type": "object", "properties": {"x": {"enum": [1, "a"]}}},
    }
    nested = take("chat", messages=[], tools=[{"type": "function", "function": function}])
    flat = take("responses", input=[], tools=[{"type": "function", **function}])
    legacy = take("chat", messages=[], functions=[function])
    expected = (
        9,
        ['namespace functions {\n\n// Do f.\ntype f = (_: {\nx?: 1 | "a",\n}) => any;\n\n} // namespace functions'],
    )
    assert units(nested) == units(flat) == units(legacy) == [expected]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", (1, [])),
        ("auto", (0, [])),
        ({"type": "function", "function": {"name": "f"}}, (4, ["f"])),
        ({"type": "function", "name": "f"}, (4, ["f"])),
        ({"type": 1}, (0, [])),
        (None, (0, [])),
    ],
)
def test_tool_choice(choice: Any, expected: tuple[int, list[str]]) -> None:
    assert units(take("chat", tools=[{"type": "function", "name": "f"}], tool_choice=choice))[-1] == expected
    assert units(take("chat", messages=[], tool_choice=choice)) == []  # nothing to choose from


def test_a_system_message_and_tools_share_a_frame() -> None:
    def fixed(role: str) -> int:
        return take("chat", messages=[{"role": role, "content": "x"}], tools=[{"type": "function", "name": "f"}]).fixed

    assert fixed("system") == fixed("user") - 4


@pytest.mark.parametrize(
    ("schema", "rendered"),
    [
        ({"type": "string"}, "string"),
        ({"type": "integer"}, "number"),
        ({"type": ["string", "null"]}, "string | null"),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "boolean | null"),
        ({"enum": ["a", 1, None]}, '"a" | 1 | null'),
        ({"const": "x"}, '"x"'),
        ({"type": "array", "items": {"type": "number"}}, "number[]"),
        ({"type": "array"}, "any[]"),
        ({"type": "object"}, "object"),
        (
            {"type": "object", "properties": {"a": {"type": "string", "description": "deep"}}, "required": ["a"]},
            "{\n  a: string,\n}",
        ),
        ({"$ref": "#/definitions/loop"}, "any"),
        ({"type": 7}, "any"),
        (True, "any"),
        ([], "any"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_a_schema_as_a_type(schema: Any, rendered: str) -> None:
    text = tools.render([{"name": "f", "parameters": {"type": "object", "properties": {"p": schema}}}])
    assert text.splitlines()[2:-2] == ["type f = (_: {", *f"p?: {rendered},".splitlines(), "}) => any;"]


SCHEMA = '{"type": "object",  "properties": {"a": {"enum": [1e15]}}}'


@pytest.mark.parametrize(
    ("dialect", "member", "raw", "expected"),
    [
        ("chat", "response_format", '{"type":"json_schema","json_schema":{"name":"n","schema":%s}}', ["n"]),
        ("responses", "text", '{"format":{"type":"json_schema","name":"n","description":"d","schema":%s}}', ["n", "d"]),
        ("chat", "response_format", '{"type":"json_schema","json_schema":{"name":7,"schema":%s}}', []),
    ],
)
def test_the_schema_of_a_reply_counts_as_it_was_written(
    dialect: Dialect, member: str, raw: str, expected: list[str]
) -> None:
    prompt = prompts.take_apart(dialect, {member: msgspec.Raw((raw % SCHEMA).encode())})
    assert units(prompt) == [(walks.FORMAT_TOKENS, [*expected, SCHEMA])]


@pytest.mark.parametrize(
    "value",
    [None, {"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": 7, "more": "of the same"}],
)
def test_a_reply_without_a_schema_counts_nothing_for_it(value: Any) -> None:
    assert all(found == (0, []) for found in units(take("chat", response_format=value)))


def test_odd_tools_are_left_out_and_custom_ones_show_their_grammar() -> None:
    grammar = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: WORD"}}
    custom = {"type": "custom", "custom": {"name": "g", "description": "G.", "format": grammar}}
    odd = [None, 1, "x", {"type": "web_search"}, {"type": "function", "function": 3}, {}, {"name": None}]
    functions = tools.functions_of([*odd, custom])
    assert "// G.\ntype g = () => any;\nstart: WORD" in tools.render(functions)
    assert len(functions) == 1
    assert tools.functions_of({"a": 1}) == []


def test_a_schema_as_deep_as_json_allows_renders() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        schema = {"type": "object", "properties": {"p": schema}, "anyOf": [schema, "odd"]}
    assert "any" in tools.render([{"name": "f", "parameters": schema}])


def test_a_type_named_again_and_again_is_rendered_once() -> None:
    """Sixteen levels of a hundred each would be rendered a hundred to the sixteenth times."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(20):
        schema = {"type": ["object"] * 100 + [7, "array"] * 100, "properties": {"p": schema}, "items": {"type": "null"}}
    text = tools.render([{"name": "f", "parameters": schema}])
    assert text.count("null[]") == 16
    assert len(text) < 3_000


MESSAGE_NAMES = [
    "role",
    "content",
    "text",
    "function",
    "custom",
    "name",
    "arguments",
    "tool_calls",
    "output",
    "summary",
]
TOOL_NAMES = ["type", "parameters", "properties", "items", "enum", "anyOf", "required", "description", "format"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*MESSAGE_NAMES, *TOOL_NAMES]), inner, max_size=6)
    ),
    max_leaves=30,
)


@settings(RELAXED)
@given(JSON, st.sampled_from(sorted(walks.WALKS)))
def test_any_json_is_survived(value: Any, kind: bytes) -> None:
    extra, texts = walks.texts(kind, json.dumps(value).encode())
    assert extra >= 0
    assert all(isinstance(text, str) for text in texts)


@settings(RELAXED)
@given(st.dictionaries(st.sampled_from(["messages", "tools", "functions", "input", "prompt", "tool_choice"]), JSON))
def test_any_body_is_taken_apart(members: dict[str, Any]) -> None:
    for dialect in ("chat", "completions", "embeddings", "responses", "models", "passthrough"):
        prompt = take(dialect, **members)  # type: ignore[arg-type]
        assert len(prompt.selected) == len(prompt.messages)


@pytest.mark.parametrize("raw", [b'{"content":"\\ud800"}', b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}", b"\xff", b""])
def test_what_will_not_decode_is_plain_text(raw: bytes) -> None:
    extra, (text,) = walks.texts(walks.MESSAGE, raw)
    assert extra == 0
    assert len(text) == len(raw)


@pytest.mark.parametrize(
    "filler",
    [
        '{"role":"user","content":"x"}',
        '{"content":"},{ }  ,  {"}',
        '{"a":[{"b":1},{"c":[{},{}]}]}',
        '"' + "y" * 100_000 + '"',
        '{"content":"' + "z" * 3_000_000 + '"}',
        "[{},{},{}]",
    ],
    ids=lambda filler: filler[:30],
)
def test_a_long_array_is_split_as_a_short_one(filler: str) -> None:
    separator = " ,\n "
    count = max(4_000_000 // len(filler), 3)
    raw = ("[ " + separator.join([filler] * count) + " ]").encode()
    assert [bytes(part) for part in prompts.split(raw)] == [filler.encode()] * count


@pytest.mark.parametrize("tail", ["", "}", "]]", ",", ",]", "{]", " x]"])
def test_a_long_array_that_is_broken_is_refused(tail: str) -> None:
    raw = ("[" + ",".join(['{"role":"user","content":"x"}'] * 100_000)).encode() + tail.encode()
    with pytest.raises(msgspec.DecodeError):
        prompts.split(raw)


def test_of_very_many_messages_an_even_selection_is_taken() -> None:
    prompt = take("chat", messages=[{"role": "user", "content": str(number)} for number in range(200_000)])
    assert prompt.many
    assert len(prompt.messages) == 200_000
    assert prompts.MANY // 2 < len(prompt.selected) <= prompts.MANY
    numbers = [int(msgspec.json.decode(raw)["content"]) for raw in prompt.selected]
    assert {b - a for a, b in itertools.pairwise(numbers)} == {4}


@pytest.mark.parametrize("count", [0, 1, prompts.MANY])
def test_as_many_messages_as_can_be_counted_are_all_selected(count: int) -> None:
    prompt = take("chat", messages=[1] * count)
    assert not prompt.many
    assert prompt.selected is prompt.messages
    assert len(prompt.messages) == count
