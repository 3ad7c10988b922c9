"""Bodies that change their shape, and what of them must not."""

from __future__ import annotations

import base64
import struct
import time
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.providers.reshape import (
    chat_to_stream,
    edited,
    floats_to_base64,
    response_to_stream,
    without_null_usage,
)

top_level = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


# --- the request ----------------------------------------------------------------------------------------------------


def test_every_other_member_stays_byte_for_byte_and_in_its_place() -> None:
    body = b'{"a": 1.0e2 ,"model":"x","b":{"k":1,"k":2},"c":"\\u00e9\\/"}'
    assert edited(top_level(body), model="y", with_usage=False) == (
        b'{"a":1.0e2,"model":"y","b":{"k":1,"k":2},"c":"\\u00e9\\/"}'
    )


@pytest.mark.parametrize("model", ['q"uote', "new\nline", "back\\slash", "\u2028", "\U0001f600", "a/b:c"])
def test_any_model_name_stays_one_string(model: str) -> None:
    assert orjson.loads(edited(top_level(b'{"model":"x","n":1}'), model=model, with_usage=False)) == {
        "model": model,
        "n": 1,
    }


# --- usage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "without"),
    [
        (b'{"a":1,"usage":null}', b'{"a":1}'),
        (b'{"usage":null}', b'{"usage":null}'),  # a chunk with nothing else in it: nobody sends that
        (b'{"usage" : null , "a":1}', b'{"a":1}'),
        (b'{"a":"x,\\"usage\\":null","usage":null,"b":1}', b'{"a":"x,\\"usage\\":null","b":1}'),
        (b'{"c":[{"d":1,"usage":null}],"usage":null,"b":1}', b'{"c":[{"d":1,"usage":null}],"b":1}'),
    ],
)
def test_only_the_null_usage_of_the_top_level_goes(payload: bytes, without: bytes) -> None:
    assert without_null_usage(payload) == without


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8) | st.just('","usage":null,"'),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "usage", "b"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), json_values), max_size=3, unique_by=lambda pair: pair[0]),
    st.integers(0, 3),
    st.sampled_from(["", " ", "\n"]),
)
def test_what_is_left_is_the_same_object_without_it(members: list[tuple[str, Any]], place: int, blank: str) -> None:
    written = [f"{orjson.dumps(key).decode()}:{blank}{orjson.dumps(value).decode()}" for key, value in members]
    written.insert(place, f'"usage":{blank}null')
    payload = ("{" + f",{blank}".join(written) + "}").encode()
    cut = without_null_usage(payload)
    if members:
        assert orjson.loads(cut) == dict(members)
    assert len(payload) - len(cut) in (0, len(f'"usage":{blank}null,{blank}'), len(f'"usage":{blank}null,'))


def test_a_hostile_chunk_does_not_hold_up_the_loop() -> None:
    nested = b'{"c":[' + b'{"usage":null,"d":1},' * 100_000 + b'{}],"usage":null,"z":1}'
    started = time.process_time()
    assert without_null_usage(nested) in (nested, nested.replace(b'"usage":null,"z"', b'"z"'))
    assert time.process_time() - started < 2.0  # one look at each candidate would take minutes


# --- embeddings -----------------------------------------------------------------------------------------------------


def packed(*floats: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(floats)}f", *floats)).decode()


def test_float_lists_are_packed_and_nothing_else_changes() -> None:
    reply = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.1, -2, 3e38]},
            {"object": "embedding", "index": 1, "embedding": []},
            {"index": 2, "embedding": packed(1.0)},
            {"index": 3, "embedding": {"int8": [1]}},
            "odd",
        ],
        "usage": {"prompt_tokens": 1},
    }
    found = orjson.loads(floats_to_base64(orjson.dumps(reply)))
    assert [entry["embedding"] for entry in found["data"][:4]] == [
        packed(0.1, -2.0, 3e38),
        "",
        packed(1.0),
        {"int8": [1]},
    ]
    assert (found["usage"], found["data"][4], found["object"]) == (reply["usage"], "odd", "list")


@pytest.mark.parametrize(
    "body",
    [
        b'{"data": [{"embedding": "AAAA"}]}',
        b'{"data": [{"embedding": [1, "x"]}]}',
        b'{"data": [{"embedding": [null]}]}',
        b'{"data": [{"embedding": [1e39]}]}',
        b'{"data": [{"embedding": [%b]}]}' % (b"9" * 400),
        b'{"data": {"embedding": [1]}}',
        b'[{"embedding": [1]}]',
        b'{"data": [{"embedding": [1]}], "x": "\xff"}',
        b'{"data": [{"embedding": [1]',
    ],
)
def test_what_cannot_be_packed_stays_as_it_came(body: bytes) -> None:
    assert floats_to_base64(body) == body


# --- from one body to a stream --------------------------------------------------------------------------------------

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
COMPLETION = {
    "id": "c1",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
            "finish_reason": "x",
        }
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    "new": [1],
}


def data_of(stream: bytes) -> list[Any]:
    """The data of each event, the terminator left out."""
    assert stream.endswith(b"data: [DONE]\n\n")
    return [orjson.loads(event.removeprefix(b"data: ")) for event in stream.split(b"\n\n")[:-2]]


def test_a_completion_becomes_its_chunk_and_the_end() -> None:
    (chunk,) = data_of(chat_to_stream(orjson.dumps(COMPLETION), with_usage=False))
    assert chunk == {
        "id": "c1",
        "object": "chat.completion.chunk",
        "choices": [
            {
                "index": 0,
                "delta": {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"index": 0, **CALL}, {"index": 1, **CALL}],
                },
                "finish_reason": "x",
            }
        ],
        "new": [1],
    }


def test_usage_comes_in_a_chunk_of_its_own_for_who_asked() -> None:
    _, last = data_of(chat_to_stream(orjson.dumps(COMPLETION), with_usage=True))
    assert (last["choices"], last["usage"]) == ([], COMPLETION["usage"])


def test_a_legacy_completion_keeps_its_text() -> None:
    legacy = {"object": "text_completion", "choices": [{"text": "hi", "index": 0}]}
    assert data_of(chat_to_stream(orjson.dumps(legacy), with_usage=True)) == [legacy]


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"choices":{}}', b"{", b'{"choices":[],"x":"\xff"}'])
def test_what_is_no_completion_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        chat_to_stream(body, with_usage=True)


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
def test_a_response_becomes_its_first_and_last_event(status: str) -> None:
    response = {"id": "r", "status": status, "output": []}
    created, last, rest = response_to_stream(orjson.dumps(response)).split(b"\n\n")
    assert rest == b""
    name, data = last.split(b"\n")
    assert name == f"event: response.{status}".encode()
    assert orjson.loads(data[6:]) == {"type": f"response.{status}", "sequence_number": 1, "response": response}
    assert created.startswith(b"event: response.created\ndata: ")


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"status":null}', b'{"status":"queued"}', b'{"status":["x"]}', b"{"])
def test_a_response_that_is_not_over_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        response_to_stream(body)
