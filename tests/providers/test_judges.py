"""What one event of a stream is taken for: for any bytes at all, either a verdict or Interrupted, and no byte changed
but those that our own wish for usage brought."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.providers.reshape import without_null_usage
from proxy.providers.streams import Interrupted, Verdict, judge_chunk, judge_response_event
from proxy.transport.sse import events
from proxy.types import Usage

NAMES = st.sampled_from(["usage", "error", "choices", "type", "response", "delta", "u", ""]) | st.text(max_size=4)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    LEAVES | st.text(max_size=8) | st.just('"usage":null,'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : "), (",\t", ":")])
FRAGMENTS = st.sampled_from(
    b"""{" "} "usage":null "usage":{ "error": "choices":[ "type":"error" [DONE] null 1e999 \\ud800 ] } , {}
    "type":"response.completed" "response": "type":5 : "a" \xc3\xbc \xff""".split()
)
DATA = st.binary(max_size=40) | st.lists(FRAGMENTS, max_size=10).map(b"".join)
JUDGES = {
    "chat": partial(judge_chunk, False),
    "chat, with our wish": partial(judge_chunk, True),
    "responses": judge_response_event,
}


def with_member(value: dict[str, Any], at: int, name: str, member: Any) -> dict[str, Any]:
    """`value` with one more member, at a place among the others."""
    members = [one for one in value.items() if one[0] != name]
    return dict([*members[:at], (name, member), *members[at:]])


@given(st.dictionaries(NAMES, JSON, max_size=4), st.integers(0, 4), SEPARATORS, st.booleans())
@settings(max_examples=300, deadline=None)
def test_only_the_null_usage_of_the_top_level_is_cut(
    value: dict[str, Any], at: int, separators: tuple[str, str], escaped: bool
) -> None:
    value.pop("usage", None)
    chunk = with_member(value, at, "usage", None)
    payload = json.dumps(chunk, separators=separators, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    cut = without_null_usage(payload)
    if len(chunk) == 1:
        assert cut == payload  # nothing but itself: an event with no member would be no event
        return
    length = len(payload) - len(cut)
    start = next((n for n, (a, b) in enumerate(zip(payload, cut, strict=False)) if a != b), len(cut))
    gone = [payload[n : n + length] for n in range(start + 1) if payload[:n] + payload[n + length :] == cut]
    assert any(one.strip(b", \n\t").replace(b" ", b"") == b'"usage":null' for one in gone), gone
    assert repr(json.loads(cut.decode("utf-8", "surrogatepass"))) == repr(
        json.loads(json.dumps(value, ensure_ascii=escaped))
    )


def judged(judge: str, raw: bytes, data: bytes) -> Verdict | Interrupted | None:
    try:
        return JUDGES[judge](raw, data)
    except Interrupted as stop:
        return stop


@pytest.mark.parametrize("judge", JUDGES)
@given(data=DATA | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=300, deadline=None)
def test_a_judge_raises_nothing_but_interrupted(judge: str, data: bytes) -> None:
    for raw, _, told in events(b"event: e\ndata: " + data.replace(b"\r", b"").replace(b"\n", b"") + b"\n\n"):
        assert told is not None
        verdict = judged(judge, raw, told)
        if isinstance(verdict, Interrupted):
            assert verdict.event in (None, raw)
        elif not told.startswith(b"[DONE]"):
            told.decode()  # what passes can be read
            assert verdict is None or judge == "chat, with our wish" or verdict.passed == raw


@given(st.dictionaries(NAMES, JSON, max_size=4))
@settings(max_examples=200, deadline=None)
def test_an_event_without_usage_or_error_passes_as_it_is(value: dict[str, Any]) -> None:
    value.pop("usage", None)
    value.pop("error", None)
    raw = b"data: " + json.dumps(value).encode() + b"\n\n"
    for judge in ("chat", "chat, with our wish"):
        assert JUDGES[judge](raw, raw[6:-2]) is None


@given(st.dictionaries(NAMES, JSON, max_size=3), st.integers(0, 3), st.integers(0, 2**40), st.integers(0, 2**40))
@settings(max_examples=200, deadline=None)
def test_usage_is_told_and_left_out_only_where_it_stands_alone(
    value: dict[str, Any], at: int, up: int, down: int
) -> None:
    for name in ("usage", "error", "choices"):
        value.pop(name, None)
    usage = {"prompt_tokens": up, "completion_tokens": down}
    for choices in ([], [{"index": 0}]):
        chunk = with_member({**value, "choices": choices}, at, "usage", usage)
        raw = b"data: " + json.dumps(chunk).encode() + b"\n\n"
        for judge, asked in (("chat", False), ("chat, with our wish", True)):
            verdict = JUDGES[judge](raw, raw[6:-2])
            assert verdict is not None
            assert verdict.usage == Usage(up, down)
            assert verdict.passed == (b"" if asked and not choices else raw)
            assert not verdict.last


@pytest.mark.parametrize("half", [rb"\ud83d", rb"\uDE00", rb"\uD83Dx"])
def test_half_a_surrogate_pair_is_a_provider_s_way_to_cut_an_emoji_and_passes(half: bytes) -> None:
    data = b'{"id":"x","choices":[{"index":0,"delta":{"content":"' + half + b'"}}],"usage":null}'
    raw = b"data: " + data + b"\n\n"
    assert judge_chunk(False, raw, data) is None
    verdict = judge_chunk(True, raw, data)
    assert verdict is not None
    assert verdict.passed == raw.replace(b',"usage":null', b"")
    event = b'{"type":"response.output_text.delta","delta":"' + half + b'"}'
    assert judge_response_event(b"data: " + event + b"\n\n", event) is None
