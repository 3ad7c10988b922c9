"""Counts that are known, remembered, and made without holding up the loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.tokens.count import INLINE_BYTES, LOOP_BYTES, Counter
from proxy.tokens.slices import EXACT_CHARS
from proxy.tokens.vocabularies import SHARED, Vocabularies, VocabularyError
from proxy.types import Dialect

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

O200K, CL100K = "o200k_base", "cl100k_base"
BOB = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "hi", "name": "bob"}]

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def fields(**members: Any) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(json.dumps(value).encode()) for name, value in members.items()}


def chat(messages: Any, encoding: str = O200K, counter: Counter | None = None, **members: Any) -> int:
    return run((counter or Counter()).count_prompt("chat", fields(messages=messages, **members), encoding))


def test_known_counts() -> None:
    counter = Counter()
    assert run(counter.count_text("hello world", O200K)) == 2
    assert run(counter.count_text("", O200K)) == 0
    assert run(counter.count_texts(["hello world", "", "hello"], O200K)) == 3
    assert run(counter.count_messages(BOB, O200K)) == 18
    assert chat(BOB) == 18
    assert run(counter.count_messages([], O200K)) == 3
    assert run(counter.count_prompt("completions", fields(prompt="hello world"), CL100K)) == 2
    assert run(counter.count_prompt("completions", fields(prompt=[1, 2, 3]), CL100K)) == 3
    assert run(counter.count_prompt("embeddings", fields(input=["hello", "world"]), CL100K)) == 2
    assert run(counter.count_prompt("responses", fields(input="hi"), O200K)) == chat(
        [{"role": "user", "content": "hi"}]
    )
    assert run(counter.count_prompt("responses", fields(input="hi", instructions="hi"), O200K)) == 3 + 5 + 5
    assert run(counter.count_prompt("models", {}, O200K)) == 0


@pytest.mark.parametrize(
    ("function", "tokens"),
    [
        ({"name": "foo", "parameters": {"type": "object", "properties": {}}}, 31),
        ({"name": "foo", "description": "Do a foo", "parameters": {"type": "object", "properties": {}}}, 36),
        (
            {
                "name": "bing_bong",
                "description": "Do a bing bong",
                "parameters": {"type": "object", "properties": {"foo": {"type": "string"}}},
            },
            49,
        ),
        (
            {
                "name": "bing_bong",
                "description": "Do a bing bong",
                "parameters": {
                    "type": "object",
                    "properties": {"foo": {"type": "string"}, "bar": {"type": "number", "description": "A number"}},
                },
            },
            57,
        ),
    ],
)
def test_tools_cost_what_has_been_billed_for_them(function: dict[str, Any], tokens: int) -> None:
    """Published figures for these definitions beside one user message `hello`."""
    for given_as in ({"functions": [function]}, {"tools": [{"type": "function", "function": function}]}):
        assert chat([{"role": "user", "content": "hello"}], CL100K, **given_as) == pytest.approx(tokens, rel=0.1)


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|im_start|>system", "<|return|>", "<|fim_prefix|><|endofprompt|>"])
@pytest.mark.parametrize("encoding", [O200K, CL100K, "o200k_harmony"])
def test_special_tokens_are_plain_text(text: str, encoding: str) -> None:
    assert run(Counter().count_text(text, encoding)) >= 3


def test_lone_surrogates_are_counted() -> None:
    counter = Counter()
    assert run(counter.count_text("a\ud800b", O200K)) > 0
    assert run(counter.count_messages([{"role": "user", "content": "\udc00"}], O200K)) > 7
    assert chat([{"role": "user", "content": "\ud800"}]) > 0


def conversation(turns: int) -> list[dict[str, Any]]:
    return [
        {"role": ("user", "assistant")[turn % 2], "content": f"Turn {turn}: " + "so it goes, and on it went. " * 30}
        for turn in range(turns)
    ]


@pytest.mark.parametrize("turns", [4, 40, 1000], ids=["inline", "hashed inline", "in the thread"])
def test_a_turn_costs_its_new_message_only(turns: int) -> None:
    counter = Counter()
    messages = conversation(turns)
    size = len(json.dumps(messages))
    assert (size <= INLINE_BYTES) == (turns == 4)
    assert (size > LOOP_BYTES) == (turns == 1000)
    assert run(Counter().count_messages(messages, O200K)) == chat(messages)
    first = chat(messages, counter=counter)
    calls = counter.encode_calls
    assert calls == 2 * turns  # role and content
    assert chat(messages, counter=counter) == first
    assert counter.encode_calls == calls
    more = chat([*messages, {"role": "user", "content": "hello world"}], counter=counter)
    assert more == first + 3 + 1 + 2
    assert counter.encode_calls == calls + 2


def test_the_memo_keeps_encodings_and_kinds_apart() -> None:
    counter = Counter()
    text = "日本語のテキスト"
    for _ in range(2):
        as_prompt = run(counter.count_prompt("completions", fields(prompt=text), O200K))
        assert as_prompt == len(SHARED.load(O200K).ids(text))
        assert run(counter.count_prompt("completions", fields(prompt=text), CL100K)) == len(
            SHARED.load(CL100K).ids(text)
        )
        assert run(counter.count_prompt("responses", fields(input=text), O200K)) == as_prompt + 7


def test_the_memo_is_bounded() -> None:
    counter = Counter(memo_entries=8)
    messages = conversation(20)
    chat(messages, counter=counter)
    calls = counter.encode_calls
    chat(messages[-2:], counter=counter)
    assert counter.encode_calls == calls
    chat(messages[:2], counter=counter)
    assert counter.encode_calls > calls


def test_a_text_beyond_the_cap_is_extrapolated() -> None:
    line = "The quick brown fox jumps over the lazy dog, 12 times.\n"
    lines = 4 * EXACT_CHARS // len(line)
    counter = Counter()
    assert run(counter.count_text(line * lines, O200K)) == pytest.approx(
        lines * len(SHARED.load(O200K).ids(line)), rel=0.01
    )
    assert counter.encode_calls < 100


def test_guessed_counts_are_not_remembered() -> None:
    counter = Counter()
    big = [{"role": "user", "content": word * (EXACT_CHARS // 20)} for word in (" one two", " three", " fo", " sixty")]
    exact = 3 + sum(4 + len(SHARED.load(O200K).ids(message["content"])) for message in big)
    first = chat(big, counter=counter)
    calls = counter.encode_calls
    assert first != exact
    assert first == pytest.approx(exact, rel=0.2)
    assert chat(big, counter=counter) == pytest.approx(exact, abs=8)  # what was guessed is counted now
    assert counter.encode_calls > calls


def test_a_damaged_installation_is_told() -> None:
    counter = Counter(vocabularies=Vocabularies(lambda file: b""))
    with pytest.raises(VocabularyError):
        run(counter.count_text("a", O200K))
    with pytest.raises(VocabularyError):
        run(counter.count_prompt("chat", {}, O200K))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)
NAMES = st.sampled_from(["messages", "input", "prompt", "tools", "functions", "instructions", "suffix", "tool_choice"])


@settings(RELAXED, max_examples=60)
@given(body=st.dictionaries(NAMES, JSON), dialect=st.sampled_from(["chat", "completions", "embeddings", "responses"]))
def test_any_body_gets_a_count(body: dict[str, Any], dialect: Dialect) -> None:
    raw = {name: msgspec.Raw(json.dumps(value).encode()) for name, value in body.items()}
    assert run(Counter().count_prompt(dialect, raw, CL100K)) >= 0


@settings(RELAXED, max_examples=30)
@given(
    st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=50)}))
)
def test_decoded_and_raw_messages_count_the_same(messages: list[dict[str, Any]]) -> None:
    raw = {"messages": msgspec.Raw(json.dumps(messages, ensure_ascii=False).encode())}
    counter = Counter()
    assert run(counter.count_messages(messages, O200K)) == run(counter.count_prompt("chat", raw, O200K))
