"""The meter: the same count however a stream was cut into pieces, in bounded memory, whatever comes."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.tokens.count import Counter
from proxy.tokens.meter import CHANNELS, HELD_BYTES, PLAIN_BYTES, TEXT_CHARS, Meter
from proxy.tokens.vocabularies import SHARED

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

O200K = "o200k_base"
COUNTER = Counter()


def tokens(meter: Meter) -> int:
    return asyncio.run(meter.output_tokens(COUNTER, O200K))


def metered(*pieces: bytes) -> int:
    meter = Meter()
    for piece in pieces:
        meter.see(piece)
    return tokens(meter)


def count(*texts: str) -> int:
    return sum(len(SHARED.load(O200K).ids(text)) for text in texts)


def event(value: Any, eol: str = "\n") -> bytes:
    return f"data: {json.dumps(value)}{eol}{eol}".encode()


def delta(index: int = 0, **members: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": index, "delta": members, "finish_reason": None}], "usage": None}


def call(place: int | None, **function: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"function": function}
    return delta(tool_calls=[entry if place is None else {"index": place, **entry}])


CHAT = [
    delta(role="assistant", content="", refusal=None),
    delta(content="Hel"),
    delta(content="lo wor"),
    delta(1, content="Un"),
    delta(content="ld"),
    delta(1, content="related"),
    delta(reasoning_content="think", reasoning="think"),
    delta(reasoning="ing about lighthouses"),
    call(0, name="get_weather", arguments=""),
    call(1, name="noop", arguments="{"),
    call(0, arguments='{"city":'),
    call(1, arguments="}"),
    call(0, arguments='"Ulm"}'),
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    {"choices": [], "usage": None},
]
CHAT_TEXTS = ("Hello world", "Unrelated", "thinking about lighthouses", "get_weather", '{"city":"Ulm"}', "noop", "{}")

RESPONSES = [
    {"type": "response.created", "response": {"id": "r", "output": []}},
    {"type": "response.output_item.added", "output_index": 0, "item": {"type": "message", "content": []}},
    {"type": "response.output_text.delta", "output_index": 0, "delta": "Hel"},
    {"type": "response.output_text.delta", "output_index": 0, "delta": "lo world"},
    {"type": "response.output_text.done", "output_index": 0, "text": "Hello world"},
    {"type": "response.output_item.added", "output_index": 1, "item": {"type": "function_call", "name": "get_weather"}},
    {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": '{"city"'},
    {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": ':"Ulm"}'},
    {"type": "response.audio.delta", "output_index": 2, "delta": "UklGRg=="},
    {"type": "response.audio.transcript.delta", "output_index": 2, "delta": "spoken"},
]
RESPONSES_TEXTS = ("Hello world", "get_weather", '{"city":"Ulm"}', "spoken")


@pytest.mark.parametrize("eol", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize(
    ("events", "texts"), [(CHAT, CHAT_TEXTS), (RESPONSES, RESPONSES_TEXTS)], ids=["chat", "responses"]
)
@given(data=st.data())
@settings(RELAXED, max_examples=20)
def test_any_grouping_of_events_counts_the_same(
    events: list[dict[str, Any]], texts: tuple[str, ...], eol: str, data: st.DataObject
) -> None:
    wire = [f": ping{eol}{eol}".encode()]
    for value in events:
        name = f"event: {value['type']}{eol}".encode() if "type" in value else b""
        wire.append(name + event(value, eol))
    wire.append(f"data: [DONE]{eol}{eol}".encode())
    cuts = sorted(data.draw(st.sets(st.integers(1, len(wire) - 1))))
    pieces = [b"".join(wire[start:end]) for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    assert metered(*pieces) == count(*texts)


def test_folding_changes_nothing() -> None:
    filler = "x" * (HELD_BYTES // 8)
    wire = [event({**value, "obfuscation": filler}) for value in CHAT]
    assert sum(map(len, wire)) > HELD_BYTES
    assert metered(*wire) == metered(b"".join(wire)) == count(*CHAT_TEXTS)


def test_it_can_be_asked_in_the_middle_and_again() -> None:
    meter = Meter()
    assert tokens(meter) == 0
    meter.see(event(delta(content="Hello")))
    assert tokens(meter) == tokens(meter) == count("Hello")
    meter.see(event(delta(content=" world")))
    assert tokens(meter) == count("Hello world")


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        (
            {
                "choices": [
                    {
                        "index": 0,
                        "message": {
                            "role": "assistant",
                            "content": "Hello world",
                            "refusal": None,
                            "reasoning_content": "thinking",
                            "tool_calls": [
                                {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                                {"id": "b", "type": "function", "function": {"name": "g", "arguments": "[1]"}},
                                {"id": "c", "type": "custom", "custom": {"name": "h", "input": "text"}},
                            ],
                        },
                    },
                    {"index": 1, "message": {"role": "assistant", "refusal": "No."}},
                ],
            },
            ("Hello world", "thinking", "f", "{}", "g", "[1]", "h", "text", "No."),
        ),
        ({"choices": [{"index": 0, "message": {"function_call": {"name": "f", "arguments": "{}"}}}]}, ("f", "{}")),
        (
            {"object": "text_completion", "choices": [{"index": 0, "text": "Hello"}, {"index": 1, "text": "world"}]},
            ("Hello", "world"),
        ),
        (
            {
                "choices": [
                    {"message": {"content": [{"type": "thinking", "thinking": [{"text": "hm"}]}, {"text": "Hi"}]}}
                ]
            },
            ("hmHi",),
        ),
        (
            {
                "object": "response",
                "output": [
                    {
                        "type": "reasoning",
                        "summary": [{"type": "summary_text", "text": "hm"}],
                        "encrypted_content": "xx",
                    },
                    {
                        "type": "message",
                        "content": [{"type": "output_text", "text": "Hello"}, {"type": "refusal", "refusal": "No"}],
                    },
                    {"type": "function_call", "name": "f", "arguments": "{}"},
                    {"type": "custom_tool_call", "name": "g", "input": "text"},
                ],
            },
            ("hm", "HelloNo", "f", "{}", "g", "text"),
        ),
        ({"object": "list", "data": [{"embedding": [0.1, 0.2]}], "model": "e"}, ()),
        ({"error": {"message": "no"}}, ()),
        ([{"error": {"code": 400}}], ()),
    ],
    ids=["chat", "function_call", "completions", "parts", "responses", "embeddings", "error", "array"],
)
def test_plain_bodies(body: Any, texts: tuple[str, ...]) -> None:
    raw = json.dumps(body).encode()
    assert metered(raw) == count(*texts)
    assert metered(b"\n\n \r\n", raw) == count(*texts)  # some providers keep waiting clients awake with blank lines
    assert metered(b"\xef\xbb\xbf" + raw[:7], raw[7:20], raw[20:]) in (count(*texts), 0)
    assert metered(raw[:7], raw[7:20], raw[20:]) == count(*texts)


def test_a_plain_body_cut_short_counts_nothing_and_completed_it_counts() -> None:
    raw = json.dumps({"choices": [{"message": {"content": "Hello world"}}]}).encode()
    meter = Meter()
    meter.see(raw[:30])
    assert tokens(meter) == 0
    meter.see(raw[30:])
    assert tokens(meter) == count("Hello world")


def test_completions_stream() -> None:
    wire = [event({"choices": [{"index": 0, "text": text}]}) for text in ("Hel", "lo", " world")]
    assert metered(*wire) == count("Hello world")


@pytest.mark.parametrize(
    "odd",
    [
        b"data: [DONE]\n\n",
        b"data:\n\n",
        b"data\n\n",
        b"\n\n\n",
        b": comment\n\n",
        b"data: {broken\n\n",
        b"data: \xff\xfe\n\n",
        b"data: null\n\ndata: 7\n\ndata: []\n\n",
        b'data: {"choices":null}\n\ndata: {"choices":[null]}\n\ndata: {"choices":{"a":1}}\n\n',
        b'data: {"choices":[{"delta":"text"}]}\n\ndata: {"choices":[{"delta":{"content":7}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":{"text":"x"}}}]}\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":[null]}}]}\n\ndata: {"choices":[{"delta":{"tool_calls":{}}}]}\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":1,"arguments":{"a":1}}}]}}]}\n\n',
        b'data: {"type":7,"delta":"x"}\n\ndata: {"type":"x.delta","delta":{"a":1}}\n\n',
        b'data: {"type":"response.output_item.added","item":"x"}\n\n',
        b'data: {"output":"text"}\n\ndata: {"output":[1]}\n\n',
        b"data: " + b"[" * 100_000 + b"\n\n",
        b'data: {"error":{"message":"x"}}\n\n',
        bytes(range(256)),
    ],
    ids=lambda odd: ascii(odd[:40]),
)
def test_odd_events_count_nothing_and_harm_nobody(odd: bytes) -> None:
    good = event(delta(content="Hello"))
    assert metered(odd) == 0
    assert metered(good, odd, b"\n\n", good) == count("HelloHello")


def test_multi_line_data_is_one_text() -> None:
    assert metered(b'event: x\ndata: {"choices":[{"delta":\ndata: {"content":"Hello"}}]}\nid: 7\n\n') == count("Hello")


@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"data: ", b"{", b"}", b"[", b"\n\n", b"\r"]), max_size=12))
@settings(RELAXED, max_examples=60)
def test_any_bytes_are_survived(pieces: list[bytes]) -> None:
    assert metered(*pieces) >= 0


def test_an_hour_of_streaming_stays_small_and_counts_about_right() -> None:
    meter = Meter()
    word = event(delta(content=" lighthouse"))
    words = 4 * TEXT_CHARS // len(" lighthouse")
    pieces = [word * 50] * (words // 50)
    for piece in pieces:
        meter.see(piece)
    held = sum(map(sys.getsizeof, meter._held))
    kept = sum(sys.getsizeof(piece) for channel in meter._channels.values() for piece in channel)
    assert held < 3 * HELD_BYTES
    assert kept < 2 * TEXT_CHARS
    assert tokens(meter) == pytest.approx(len(pieces) * 50 * count(" lighthouse"), rel=0.001)


def test_many_channels_share_one_in_the_end() -> None:
    wire = [event(delta(index, content="word ")) for index in range(3 * CHANNELS)]
    meter = Meter()
    for piece in wire:
        meter.see(piece)
    assert tokens(meter) >= 3 * CHANNELS
    assert len(meter._channels) == CHANNELS + 1
    assert tokens(meter) == metered(b"".join(wire))


def test_a_very_long_plain_body_in_pieces_is_not_kept() -> None:
    meter = Meter()
    piece = b'{"choices":' + b" " * (PLAIN_BYTES // 2)
    for _ in range(5):
        meter.see(piece)
    assert sum(map(len, meter._held)) <= PLAIN_BYTES + len(piece)
    assert tokens(meter) == pytest.approx(5 * len(piece) // 4, abs=5)
    whole = json.dumps({"pad": "x" * PLAIN_BYTES, "choices": [{"text": "Hello"}]}).encode()
    assert metered(whole) == count("Hello")
