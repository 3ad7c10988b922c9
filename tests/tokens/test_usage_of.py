"""Every provider's usage object, and every way to get one wrong."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.tokens.usage import LARGEST, usage_of
from proxy.types import Usage

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

CHAT = {
    "prompt_tokens": 100,
    "completion_tokens": 20,
    "total_tokens": 120,
    "prompt_tokens_details": {"cached_tokens": 64, "cache_write_tokens": 16, "audio_tokens": 0, "text_tokens": 100},
    "completion_tokens_details": {"reasoning_tokens": 8, "audio_tokens": 0, "rejected_prediction_tokens": 0},
}
RESPONSES = {
    "input_tokens": 100,
    "input_tokens_details": {"cached_tokens": 64, "cache_write_tokens": 16},
    "output_tokens": 20,
    "output_tokens_details": {"reasoning_tokens": 8},
    "total_tokens": 120,
}
FULL = Usage(100, 20, cache_read=64, cache_write=16, reasoning=8)


@pytest.mark.parametrize(
    ("wire", "usage"),
    [
        pytest.param(CHAT, FULL, id="chat"),
        pytest.param(RESPONSES, FULL, id="responses"),
        pytest.param({"prompt_tokens": 8, "total_tokens": 8}, Usage(8), id="embeddings"),
        pytest.param({"total_tokens": 8}, Usage(8), id="embeddings, total only"),
        pytest.param({"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}, Usage(9, 5), id="no details"),
        pytest.param(
            {
                "prompt_tokens": 9,
                "completion_tokens": 5,
                "prompt_tokens_details": None,
                "completion_tokens_details": None,
            },
            Usage(9, 5),
            id="null details",
        ),
        pytest.param(
            {
                "prompt_tokens": 90,
                "completion_tokens": 5,
                "total_tokens": 95,
                "prompt_cache_hit_tokens": 64,
                "prompt_cache_miss_tokens": 26,
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
            Usage(90, 5, cache_read=64, reasoning=3),
            id="deepseek",
        ),
        pytest.param(
            {"prompt_tokens": 90, "completion_tokens": 5, "total_tokens": 95, "cached_tokens": 80},
            Usage(90, 5, cache_read=80),
            id="moonshot",
        ),
        pytest.param(
            {
                "id": "req_1",
                "usage": {
                    "queue_time": 0.01,
                    "prompt_tokens": 24,
                    "prompt_time": 0.002,
                    "completion_tokens": 7,
                    "completion_time": 0.03,
                    "total_tokens": 31,
                    "total_time": 0.05,
                },
            },
            Usage(24, 7),
            id="groq, x_groq",
        ),
        pytest.param(
            {
                "input_tokens": 5,
                "cache_creation_input_tokens": 10,
                "cache_read_input_tokens": 100,
                "cache_creation": {"ephemeral_5m_input_tokens": 10},
                "output_tokens": 9,
                "server_tool_use": None,
                "service_tier": "standard",
            },
            Usage(115, 9, cache_read=100, cache_write=10),
            id="anthropic",
        ),
        pytest.param({**RESPONSES, "cache_read_input_tokens": 64}, FULL, id="responses with both kinds of details"),
        pytest.param(
            {
                "prompt_tokens": 30,
                "completion_tokens": 10,
                "total_tokens": 340,
                "completion_tokens_details": {"reasoning_tokens": 300},
            },
            Usage(30, 310, reasoning=300),
            id="xai: reasoning beside the output",
        ),
        pytest.param(
            {"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 340}, Usage(30, 310), id="gemini: total says"
        ),
        pytest.param({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, Usage(), id="zeros are said"),
        pytest.param({"completion_tokens": 5}, Usage(0, 5), id="output only"),
        pytest.param({"completion_tokens": 5, "total_tokens": 25}, Usage(20, 5), id="output and total"),
        pytest.param(
            {"prompt_tokens": 9, "completion_tokens": 5, "cost": 0.1, "cost_details": {"x": [1]}},
            Usage(9, 5),
            id="more",
        ),
    ],
)
def test_every_providers_shape(wire: dict[str, Any], usage: Usage) -> None:
    raw = json.dumps(wire).encode()
    assert usage_of(raw) == usage
    assert usage_of(msgspec.Raw(raw)) == usage
    assert usage_of(json.dumps(wire, indent=2).encode()) == usage
    # The path for wrong types gives the same where the types are right.
    assert usage_of(json.dumps({"cached_tokens": "odd", **wire}).encode()) == usage


@pytest.mark.parametrize(
    "raw",
    [
        b"null",
        b"{}",
        b"[]",
        b"0",
        b"true",
        b'"usage"',
        b"",
        b"{",
        b"\xff",
        b'{"prompt_tokens":null,"completion_tokens":null,"total_tokens":null}',
        b'{"prompt_tokens":-1,"completion_tokens":-1}',
        b'{"prompt_tokens":"12","completion_tokens":"3"}',
        b'{"prompt_tokens":true,"completion_tokens":false}',
        b'{"prompt_tokens":1.5}',
        b'{"prompt_tokens":9007199254740993}',
        b'{"prompt_tokens":' + b"9" * 5000 + b"}",
        b'{"prompt_tokens":1e999}',
        b'{"prompt_tokens":NaN}',
        b'{"usage":null}',
        b'{"usage":{"usage":{"prompt_tokens":1}}}',
        b'{"prompt_tokens":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda raw: ascii(raw[:50]),
)
def test_what_states_nothing_is_none(raw: bytes) -> None:
    assert usage_of(raw) is None


@pytest.mark.parametrize(
    ("raw", "usage"),
    [
        (b'{"prompt_tokens":12.0,"completion_tokens":3.0}', Usage(12, 3)),
        (b'{"prompt_tokens":12,"completion_tokens":"3"}', Usage(12, 0)),
        (b'{"prompt_tokens":12,"completion_tokens":"3","total_tokens":15}', Usage(12, 3)),
        (b'{"prompt_tokens":12,"completion_tokens":-3}', Usage(12, 0)),
        (b'{"prompt_tokens":12,"completion_tokens":3,"total_tokens":-1}', Usage(12, 3)),
        (b'{"prompt_tokens":12,"completion_tokens":3,"total_tokens":"15"}', Usage(12, 3)),
        (b'{"prompt_tokens":12,"completion_tokens":3,"prompt_tokens_details":[]}', Usage(12, 3)),
        (b'{"prompt_tokens":12,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":"8"}}', Usage(12, 3)),
        (
            b'{"prompt_tokens":12,"completion_tokens":3.0,"prompt_tokens_details":{"cached_tokens":8}}',
            Usage(12, 3, cache_read=8),
        ),
        (b'{"prompt_tokens":12,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":99}}', Usage(12, 3, 12)),
        (
            b'{"prompt_tokens":12,"prompt_tokens_details":{"cached_tokens":10,"cache_write_tokens":9}}',
            Usage(12, 0, cache_read=10, cache_write=2),
        ),
        (
            b'{"prompt_tokens":1,"completion_tokens":2,"completion_tokens_details":{"reasoning_tokens":9}}',
            Usage(1, 2, 0, 0, 2),
        ),
        (b'{"prompt_tokens":9007199254740992}', Usage(2**53)),
    ],
    ids=lambda value: ascii(value)[:70],
)
def test_what_is_partly_wrong_keeps_what_is_right(raw: bytes, usage: Usage) -> None:
    assert usage_of(raw) == usage


DETAILS = ["cached_tokens", "reasoning_tokens", "cache_write_tokens"]
OTHERS = ["usage", "cache_read_input_tokens", "cache_creation_input_tokens", "prompt_cache_hit_tokens"]
NAMES = st.sampled_from([*CHAT, *RESPONSES, *DETAILS, *OTHERS])
NUMBERS = st.integers() | st.integers(0, 1000) | st.floats() | st.floats(0, 1000).map(float) | st.integers(2**52, 2**54)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=8),
    max_leaves=25,
)


@settings(RELAXED)
@given(JSON)
def test_any_json_gives_counts_that_make_sense_or_none(value: Any) -> None:
    usage = usage_of(json.dumps(value).encode())
    if usage is None:
        return
    assert all(type(getattr(usage, name)) is int for name in ("input", "output", "cache_read", "cache_write"))
    assert 0 <= usage.cache_read + usage.cache_write <= usage.input <= 3 * LARGEST
    assert 0 <= usage.reasoning <= usage.output <= LARGEST
    assert usage.estimated is False


@settings(RELAXED)
@given(st.binary(max_size=60))
def test_any_bytes_are_survived(data: bytes) -> None:
    usage_of(data)


def test_audio_is_part_of_what_holds_it() -> None:
    told = (
        b'{"prompt_tokens": 50, "completion_tokens": 20, "prompt_tokens_details": {"audio_tokens": 30, "x": 1},'
        b' "completion_tokens_details": {"audio_tokens": 90}}'
    )
    assert usage_of(told) == Usage(50, 20, input_audio=30, output_audio=20)
