"""The bound out of bytes: whatever a body holds, no count exceeds it. Cheap constructs come in crowds, so that what a
single one has too much adds up to more than any constant hides."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from proxy.tokens.bound import FRAME_TOKENS, most_of, most_with
from proxy.tokens.count import Counter
from proxy.tokens.media import NONE, Media
from proxy.tokens.recall import Measured
from proxy.tokens.slices import EXACT_CHARS, SLICE_CHARS
from proxy.types import Dialect

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
ENCODINGS = ("o200k_base", "cl100k_base")
COUNTER = Counter()


def measured(dialect: Dialect, fields: dict[str, msgspec.Raw], encoding: str = "o200k_base") -> Measured:
    return asyncio.run(COUNTER.measure(dialect, fields, encoding, "gpt-4o"))


def holds(dialect: Dialect, **members: bytes) -> None:
    """The bound of a body, given its members as JSON."""
    fields = {name: msgspec.Raw(value) for name, value in members.items()}
    most = most_of(dialect, fields)
    for encoding in ENCODINGS:
        found = measured(dialect, fields, encoding)
        assert found.total >= found.fixed + sum(found.each)
        if found.media == NONE:
            assert most is None or found.total <= most
        else:
            assert most is None
        assert found.total <= most_with(dialect, fields, found.media)


def tight(value: Any) -> bytes:
    """As short as JSON can be: numbers of many digits by their exponent."""
    text = msgspec.json.encode(value)
    for exponent in (15, 12, 9):
        text = text.replace(b"1" + b"0" * exponent + b".0", b"1e%d" % exponent)
    return text


TEXTS = st.one_of(
    st.text(max_size=12),
    st.text("abc {}[]:,.;|/\\\"'\n\r\t -_=<>()123", max_size=12),
    st.text(st.characters(min_codepoint=0, max_codepoint=0x20), max_size=6),
    st.sampled_from(["", " ", "\n", "<|endoftext|>", "<|im_start|>user", "🜁", "\u200b" * 4, "ﷺ", "e\u0301", "\x7f"]),
)
NUMBERS = st.sampled_from([0, 1, -1, 12, 1e9, 1e12, 1e15, -1e15, 9e9, 1e16, 0.1, 1e-4, 10**30, 2.5e-8])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS


def crowd(member: st.SearchStrategy[Any], most: int = 60) -> st.SearchStrategy[list[Any]]:
    """Some members, all of them many times."""
    return st.builds(lambda some, times: some * times, st.lists(member, max_size=3), st.integers(1, most))


PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "input_text"]), "text": TEXTS}),
    st.fixed_dictionaries({}, optional={"text": TEXTS, "refusal": TEXTS}),
    TEXTS,
)
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "function": st.fixed_dictionaries({}, optional={"name": TEXTS, "arguments": TEXTS}),
        "custom": st.fixed_dictionaries({}, optional={"name": TEXTS, "input": TEXTS}),
    },
)
MESSAGES = st.one_of(
    LEAVES,
    st.lists(TEXTS, max_size=2),
    st.fixed_dictionaries({"role": TEXTS}, optional={"content": TEXTS | crowd(PARTS), "name": TEXTS}),
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "system", "assistant", "tool"]),
            "content": TEXTS | crowd(PARTS),
            "name": TEXTS,
            "refusal": TEXTS,
            "tool_calls": crowd(CALLS),
            "function_call": st.fixed_dictionaries({}, optional={"name": TEXTS, "arguments": TEXTS}),
            "output": TEXTS,
            "input": TEXTS,
            "summary": crowd(PARTS),
            "arguments": TEXTS,
        },
    ),
)


@settings(RELAXED, max_examples=200)
@given(crowd(MESSAGES), TEXTS, st.booleans())
@example([{}] * 400, "", False)
@example(["", "a", "ab"] * 400, "", False)
@example([[""]] * 400, "", False)
@example([{"tool_calls": [{"function": {}, "custom": {}}] * 400}], "", False)
@example([{"function_call": {}}] * 400, "\n", True)
def test_conversations(messages: list[Any], instructions: str, escaped: bool) -> None:
    def write(value: Any) -> bytes:
        return json.dumps(value).encode() if escaped else tight(value)

    holds("chat", messages=write(messages))
    holds("responses", input=write(messages), instructions=write(instructions))
    holds("responses", input=write(instructions), instructions=write(messages))


SCHEMAS = st.recursive(
    LEAVES
    | st.builds(dict, type=st.sampled_from(["string", "object", "array", "x", 1, ["string", "null"]]))
    | st.builds(dict, enum=crowd(LEAVES))
    | st.builds(dict, const=LEAVES | crowd(NUMBERS)),
    lambda inner: st.one_of(
        st.builds(dict, anyOf=crowd(inner)),
        st.builds(dict, oneOf=crowd(inner)),
        st.builds(
            lambda kind, members, required: {"type": kind, "properties": members, "required": required},
            st.sampled_from(["object", ["object", "array"], ["object"] * 40]),
            st.dictionaries(TEXTS, inner, max_size=5),
            st.lists(TEXTS, max_size=2),
        ),
        st.builds(dict, type=st.just("array"), items=inner),
        st.builds(
            lambda member, description: {"properties": {"p": member}, "description": description, "type": "object"},
            inner,
            TEXTS,
        ),
    ),
    max_leaves=12,
)
DEFINITIONS = st.one_of(
    st.fixed_dictionaries({"name": TEXTS}, optional={"description": TEXTS, "parameters": SCHEMAS}),
    st.fixed_dictionaries({}, optional={"name": LEAVES, "parameters": SCHEMAS}),
    st.builds(lambda name, text: {"name": name, "format": {"definition": text}}, TEXTS, TEXTS),
)
TOOLS = st.one_of(
    DEFINITIONS,
    st.builds(lambda inner: {"type": "function", "function": inner}, DEFINITIONS),
    st.builds(lambda inner: {"type": "custom", "custom": inner}, DEFINITIONS),
    LEAVES,
)


def parameters(schema: Any) -> Any:
    return {"name": "f", "parameters": {"type": "object", "properties": {"p": schema}}}


def nested(depth: int, names: int) -> Any:
    schema: Any = 1
    for _ in range(depth):
        schema = {"type": "object", "properties": {chr(97 + number): schema for number in range(names)}}
    return schema


@settings(RELAXED, max_examples=80)
@given(crowd(TOOLS, 30), SCHEMAS, LEAVES | st.builds(dict, type=st.just("function"), name=TEXTS))
@example([{"name": ""}] * 400, None, "none")
@example([{}] * 400, None, None)
@example([parameters({"enum": [1e15] * 400})], {"enum": [1e15] * 400}, None)
@example([parameters({"enum": [[1e9] * 400]})], None, None)
@example([parameters({"enum": [1] * 400})], None, None)
@example([parameters({"anyOf": [1] * 400})], None, None)
@example([parameters({"anyOf": [{"anyOf": [1]}] * 100})], None, None)
@example([parameters({"type": "object", "properties": {chr(192 + number): 1 for number in range(400)}})], None, None)
@example([parameters(nested(4, 4))], nested(4, 4), None)
@example([parameters(nested(16, 1))] * 20, None, None)
@example([{"name": "f", "format": {"definition": "\n"}, "description": "\n"}] * 400, None, None)
def test_definitions(tools: list[Any], schema: Any, choice: Any) -> None:
    members = {"tools": tight(tools), "tool_choice": tight(choice)}
    flat = tight([tool.get("function", tool) if isinstance(tool, dict) else tool for tool in tools])
    shaped = {"type": "json_schema", "name": "reply", "schema": schema}
    wrapped = tight({"type": "json_schema", "json_schema": shaped})
    holds("chat", messages=b"[]", functions=flat, response_format=wrapped, **members)
    holds("responses", text=tight({"format": shaped}), **members)


@settings(RELAXED, max_examples=100)
@given(st.one_of(TEXTS, crowd(TEXTS | st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=5))), TEXTS)
def test_prompts(prompt: Any, suffix: str) -> None:
    holds("completions", prompt=tight(prompt), suffix=tight(suffix))
    holds("embeddings", input=tight(prompt))


@pytest.mark.parametrize(
    "raw",
    [
        b'"' + b"\xff" * 2000 + b'"',
        b'[{"content":"\\ud800"},' * 100,
        b"[" * 5000,
        b'[{"content":"' + b"\xf0\x9f" * 1000 + b'"}]',
        b'[{"content":"\\ud800' + "\ufffd".encode() * 1000 + b'"}]',
    ],
    ids=["no UTF-8", "a lone surrogate", "a nesting without end", "half characters", "replacement characters"],
)
def test_what_will_not_decode(raw: bytes) -> None:
    for dialect, member in (("chat", "messages"), ("chat", "tools"), ("responses", "input"), ("completions", "prompt")):
        holds(dialect, **{member: raw})  # type: ignore[arg-type]


DEAR, CHEAP = "🜁", "the "


def test_an_extrapolation_keeps_to_it_too() -> None:
    """Dear text where the samples are taken, or before the rest is estimated; cheap text elsewhere."""
    room = 4 * EXACT_CHARS
    between = CHEAP * ((room // 31 - SLICE_CHARS) // len(CHEAP))
    sampled = (DEAR * SLICE_CHARS + between) * 31 + DEAR * SLICE_CHARS
    dear = {"content": DEAR * (EXACT_CHARS // 2)}
    cheap = [{"content": CHEAP * (EXACT_CHARS // 5)}] * 4
    holds("chat", messages=tight([{"content": sampled}]))
    holds("chat", messages=tight([dear, *cheap]))
    # Every second message is selected, of which each is dear.
    holds("chat", messages=tight([{"content": DEAR * 9}, {}] * 40_000))


def test_media_have_no_bound() -> None:
    link = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    fields = {"messages": msgspec.Raw(tight([{"role": "user", "content": [link]}]))}
    assert most_of("chat", fields) is None
    found = measured("chat", fields)
    assert found.total > len(fields["messages"]) + FRAME_TOKENS
    assert found.total <= most_with("chat", fields, found.media)
    assert found.media == Media(1445, 0, 1445 - 255)
    assert most_of("responses", {"input": fields["messages"]}) is None


def test_what_is_beyond_the_limit_is_not_looked_at() -> None:
    fields = {"messages": msgspec.Raw(tight([{"role": "user", "content": "x" * 1000}]))}
    most = most_of("chat", fields)
    assert most == len(fields["messages"]) + FRAME_TOKENS
    assert most_of("chat", fields, most) == most
    assert most_of("chat", fields, most - 1) is None


def test_without_a_prompt_there_is_no_bound() -> None:
    assert most_of("models", {}) is None
    assert most_of("passthrough", {"messages": msgspec.Raw(b"[]")}) is None
    assert most_of("chat", {}) == FRAME_TOKENS
