"""A prompt measured message by message: the same figures whatever the memo holds, and no more work than is new."""

from __future__ import annotations

import asyncio
import json
import random
import struct
import threading
from base64 import b64encode
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.tokens import walks
from proxy.tokens.count import CROWD_BYTES, INLINE_BYTES, LOOP_BYTES, LOOP_MESSAGES, Counter
from proxy.tokens.media import NONE, media_of
from proxy.tokens.prompts import MANY
from proxy.tokens.recall import Measured
from proxy.tokens.slices import EXACT_CHARS
from proxy.tokens.vocabularies import SHARED
from proxy.types import Dialect

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
O200K, CL100K = "o200k_base", "cl100k_base"
T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def fields(**members: Any) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(json.dumps(value).encode()) for name, value in members.items()}


def measure(
    dialect: Dialect, body: dict[str, msgspec.Raw], counter: Counter | None = None, model: str = "gpt-4o"
) -> Measured:
    return run((counter or Counter()).measure(dialect, body, O200K, model))


def tokens_of(message: Any) -> int:
    """Without memo, slices or hash."""
    extra, texts = walks.message(message)
    return extra + sum(len(SHARED.load(O200K).ids(text)) for text in texts)


def picture(width: int, size: int = 0) -> dict[str, Any]:
    head = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + struct.pack(">II", width, 1024)
    url = "data:image/png;base64," + b64encode(head + b"\0" * size).decode()
    return {
        "role": "user",
        "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": url}}],
    }


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CONVERSATION: list[Any] = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "hi", "name": "bob"},
    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "1", "content": "Sunny, 日本語, <|endoftext|>"},
    {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": "then?"}]},
    {"role": "user", "content": [{"type": "input_file", "file_id": "f"}]},
    picture(1024),
    {},
    None,
    "bare",
]


def test_each_message_has_its_tokens_and_its_bytes() -> None:
    body = fields(messages=CONVERSATION, tools=[WEATHER], tool_choice="none")
    found = measure("chat", body)
    media = [0] * 5 + [0, 765] + [0] * 3  # the file may come to nothing
    assert found.each == [tokens_of(message) + extra for message, extra in zip(CONVERSATION, media, strict=True)]
    assert [bytes(raw) for raw in found.raws] == [json.dumps(message).encode() for message in CONVERSATION]
    alone = measure("chat", fields(messages=[CONVERSATION[0]], tools=[WEATHER], tool_choice="none"))
    assert found.fixed == alone.fixed
    assert found.exact
    assert found.total == found.fixed + sum(found.each) + found.media.guessed
    assert found.media.guessed == 16_384
    assert found.media == media_of("chat", body, "gpt-4o")
    assert found.total == run(Counter().count_prompt("chat", body, O200K)) + found.media.tokens


def test_blanks_between_messages_are_nobodys() -> None:
    body = {"messages": msgspec.Raw(b' [ {"role" : "user"} ,\n\t{"content":"x"}\r\n] ')}
    assert [bytes(raw) for raw in measure("chat", body).raws] == [b'{"role" : "user"}', b'{"content":"x"}']


@pytest.mark.parametrize(
    ("dialect", "members", "fixed", "total"),
    [
        ("responses", {"input": "hello world"}, 9, 9),
        ("responses", {"input": "hello world", "instructions": "hello"}, 14, 14),
        ("completions", {"prompt": "hello world"}, 2, 2),
        ("completions", {"prompt": "hello world", "suffix": "hello"}, 3, 3),
        ("completions", {"prompt": ["hello", "hello world", ""]}, 2, 3),
        ("completions", {"prompt": ["hello", "hello world"], "suffix": "hello"}, 3, 4),
        ("completions", {"prompt": [1, 2, 3]}, 3, 3),
        ("completions", {"prompt": [[1], [1, 2, 3], "hello world"]}, 3, 6),
        ("completions", {"prompt": []}, 0, 0),
        ("embeddings", {"input": ["hello", "hello world"]}, 2, 3),
        ("models", {"input": "hello"}, 0, 0),
        ("passthrough", {"messages": [{"role": "user"}]}, 0, 0),
        ("chat", {}, 3, 3),
        ("chat", {"messages": "hello"}, 8, 8),
        ("chat", {"messages": {"role": "user", "content": "hello"}}, 8, 8),
        ("chat", {"messages": None}, 3, 3),
        ("chat", {"messages": []}, 3, 3),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_where_there_is_no_list_of_messages_all_is_fixed(
    dialect: Dialect, members: dict[str, Any], fixed: int, total: int
) -> None:
    counter = Counter()
    for _ in range(2):
        assert measure(dialect, fields(**members), counter) == Measured(fixed, [], [], True, NONE, total)


def test_a_prompt_that_will_not_decode_counts_as_it_was_written() -> None:
    body = {"prompt": msgspec.Raw(b'"\\ud800 and more"')}
    assert measure("completions", body).fixed == len(SHARED.load(O200K).ids('"\\ud800 and more"'))


def test_items_of_a_response() -> None:
    items = [{"role": "user", "content": "hello"}, {"type": "function_call_output", "call_id": "c", "output": "hello"}]
    found = measure("responses", fields(input=items, instructions="hello"))
    assert (found.fixed, found.each) == (3 + 5, [5, 4])


MESSAGES = st.one_of(
    st.sampled_from(CONVERSATION),
    st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "tool", "x"]), st.text()),
)


@settings(RELAXED, max_examples=60)
@given(st.lists(st.tuples(st.lists(MESSAGES, max_size=8), st.sampled_from(["gpt-4o", "claude-x", "o3"])), max_size=4))
def test_what_was_measured_before_changes_nothing(conversations: list[tuple[list[Any], str]]) -> None:
    counter = Counter(memo_entries=6)
    for messages, model in conversations:
        body = fields(messages=messages)
        found = measure("chat", body, counter, model)
        fresh = measure("chat", body, None, model)
        assert (found.each, found.fixed, found.total, found.media) == (
            fresh.each,
            fresh.fixed,
            fresh.total,
            fresh.media,
        )
        assert found.media.tokens == media_of("chat", body, model).tokens


@pytest.mark.parametrize("size", [0, 60_000], ids=["counted on the loop", "counted in a thread"])
def test_media_are_remembered_for_each_formula(size: int) -> None:
    counter = Counter()
    body = fields(messages=[picture(1024, size), {"role": "user", "content": 'a text that says "type" and "file"'}])
    text, plain = (tokens_of(json.loads(bytes(body["messages"]))[number]) for number in (0, 1))
    tokens = {"gpt-4o": 85 + 170 * 4, "gpt-4o-mini": 2833 + 5667 * 4, "gemini-9": 1290}
    for _ in range(2):
        for model, media in tokens.items():
            found = measure("chat", body, counter, model)
            assert found.media == media_of("chat", body, model)
            assert found.media.tokens == media
            assert found.each == [text + media, plain]


def long_conversation(turns: int) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"Turn {turn}: " + "so it goes, and on it went. " * 26} for turn in range(turns)
    ]


def test_a_turn_of_a_long_conversation_never_leaves_the_loop() -> None:
    """Also where it holds a large picture, if that is known."""

    async def scenario() -> None:
        with ThreadPoolExecutor(1) as executor:
            counter = Counter(executor=executor)
            messages = [*long_conversation(400), picture(512, 90_000)]
            assert 300_000 < len(json.dumps(messages)) < LOOP_BYTES
            first = await counter.measure("chat", fields(messages=messages), O200K, "gpt-4o")
            calls = counter.encode_calls
            waited = asyncio.Event()
            asyncio.get_running_loop().call_soon(waited.set)
            messages.append({"role": "user", "content": "hello world"})
            found = await counter.measure("chat", fields(messages=messages), O200K, "gpt-4o")
            assert not waited.is_set()
            assert counter.encode_calls == calls + 2
            assert found.each == [*first.each, 3 + 1 + 2]
            assert found.exact

    run(scenario())


class Fields(dict[str, msgspec.Raw]):
    """Remembers which thread took a member out."""

    reader = ""

    def get(self, name: str, default: Any = None) -> Any:
        self.reader = threading.current_thread().name
        return super().get(name, default)


@pytest.mark.parametrize(
    ("raw", "reader"),
    [
        (b"[" + b"1," * (CROWD_BYTES // 2 - 10) + b"1]", "MainThread"),
        (b"[" + b"1," * (CROWD_BYTES // 2) + b"1]", "counter_0"),
        (b"[" + b'"' + b"x" * (LOOP_BYTES - 100) + b'"]', "MainThread"),
        (b"[" + b'"' + b"x" * LOOP_BYTES + b'"]', "counter_0"),
    ],
    ids=["few bytes", "a crowd", "one text", "a long one"],
)
def test_what_is_much_to_take_apart_is_left_to_the_thread(raw: bytes, reader: str) -> None:
    body = Fields({"messages": msgspec.Raw(raw)})
    with ThreadPoolExecutor(1, thread_name_prefix="counter") as executor:
        found = run(Counter(executor=executor).measure("chat", body, O200K, "gpt-4o"))
    assert body.reader == reader
    assert len(found.each) == len(found.raws)


@pytest.mark.parametrize("count", [LOOP_MESSAGES, LOOP_MESSAGES + 1])
def test_many_short_messages_are_looked_up_in_the_thread(count: int) -> None:
    async def scenario() -> None:
        with ThreadPoolExecutor(1) as executor:
            counter = Counter(executor=executor)
            body = {"messages": msgspec.Raw(b"[" + b",".join([b"{}"] * count) + b"]")}
            assert len(body["messages"]) < INLINE_BYTES
            await counter.count_text("load", O200K)
            waited = asyncio.Event()
            asyncio.get_running_loop().call_soon(waited.set)
            found = await counter.measure("chat", body, O200K, "gpt-4o")
            assert waited.is_set() == (count > LOOP_MESSAGES)
            assert found.each == [3] * count

    run(scenario())


def test_of_too_many_messages_all_are_estimated() -> None:
    rng = random.Random(5)
    texts = ["a", "hello world", "日本語", "so it goes, and on it went"]
    messages = [{"role": "user", "content": rng.choice(texts)} for _ in range(MANY)]
    found = measure("chat", fields(messages=messages))
    assert len(found.each) == len(found.raws) == MANY
    last = fields(messages=[*messages, picture(1024)])
    more = measure("chat", last)
    assert (more.each, more.raws, more.exact) == ([], [], False)
    assert more.media == media_of("chat", last, "gpt-4o") != NONE
    assert more.fixed == more.total == pytest.approx(found.total + 765, rel=0.02)


def test_texts_beyond_the_cap_make_it_inexact_until_they_are_known() -> None:
    counter = Counter()
    words = (" one two", " three", " fo", " sixty")
    body = fields(messages=[{"role": "user", "content": word * (EXACT_CHARS // 20)} for word in words])
    first = measure("chat", body, counter)
    assert not first.exact
    assert len(first.each) == 4
    again = measure("chat", body, counter)
    assert again.exact
    assert again.each != first.each
    assert measure("chat", body, counter) == again


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "content", "image_url", "url", "file", "output", "role", "text", "tool_calls"])
            | st.text(max_size=5),
            inner | st.sampled_from(["image_url", "input_file", "input_audio"]),
            max_size=4,
        )
    ),
    max_leaves=20,
)
NAMES = st.sampled_from(
    [
        "messages",
        "input",
        "prompt",
        "tools",
        "functions",
        "instructions",
        "suffix",
        "tool_choice",
        "response_format",
        "text",
    ]
)
DIALECTS = st.sampled_from(["chat", "completions", "embeddings", "responses", "models", "passthrough"])


@settings(RELAXED, max_examples=150)
@given(body=st.dictionaries(NAMES, JSON), dialect=DIALECTS, encoding=st.sampled_from([O200K, CL100K]))
def test_any_body_is_measured(body: dict[str, Any], dialect: Dialect, encoding: str) -> None:
    raw = fields(**body)
    counter = Counter()
    found = run(counter.measure(dialect, raw, encoding, "gpt-4o"))
    assert len(found.each) == len(found.raws)
    assert all(tokens >= 0 for tokens in found.each)
    assert found.total >= max(found.fixed + sum(found.each), 0)
    assert run(counter.measure(dialect, raw, encoding, "gpt-4o")) == found
    assert run(counter.count_prompt(dialect, raw, encoding)) == found.total - found.media.tokens
