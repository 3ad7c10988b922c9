"""Bodies and paths: what is served, what is refused, and that both happen quickly."""

from __future__ import annotations

import contextlib
import json
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import InvalidRequest, MethodNotAllowed, NotFound
from proxy.types import Ask, Call, Tenant
from proxy.validation.requests import decode, parse

ANYONE = Tenant("default", passthrough=None)
ACME = Tenant("acme")


def call(
    path: str = "/v1/chat/completions", body: bytes = b"", method: str = "POST", headers: list | None = None
) -> Call:
    return Call(method, path, path.encode(), b"", headers or [], body, "req_1", "00-0-0-00", "127.0.0.1")


def ask(body: object, path: str = "/v1/chat/completions", **options: bool) -> Ask:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse(call(path, raw), ANYONE, tenants_configured=options.get("tenants", False))


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_reads_what_it_acts_on_and_keeps_the_rest_as_bytes() -> None:
    body = b'{"model":"m","stream":true,"messages":[{"role":"user", "content":"h\\u0069"}],"later":{"a" : 1e5}}'
    asked = ask(body)
    assert (asked.model, asked.stream, asked.dialect, asked.route) == ("m", True, "chat", "/v1/chat/completions")
    assert bytes(asked.fields["messages"]) == b'[{"role":"user", "content":"h\\u0069"}]'
    assert bytes(asked.fields["later"]) == b'{"a" : 1e5}'
    assert asked.replayable


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": 7}, "model"),
        ({"model": "x" * 1_000_000}, "model"),
        ({"model": "a\r\nx-evil: 1"}, "model"),
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -5}, "max_completion_tokens"),
        ({"n": 1_000_000}, "n"),
        ({"n": 0}, "n"),
        ({"stream": True, "stream_options": "all"}, "stream_options"),
    ],
)
def test_refuses_a_member_that_cannot_be_served(change: dict, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask({**CHAT, **change})
    assert (caught.value.status, caught.value.param) == (400, param)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'"text"',
        b"{",
        b'{"model":"m",}',
        b"\xef\xbb\xbf" + json.dumps(CHAT).encode(),
        json.dumps(CHAT).encode("utf-16"),
        b'{"model":"m","messages":[],"x":"\xff"}',
        b'{"model":"m","messages":[],"x":NaN}',
        b'{"model":"m","messages":[],"x":Infinity}',
        b'{"model":"m","model":"n","messages":[]}',
        b'{"model":"m", "model":"m", "messages":[]}',
        b'{"model":"m","mod\\u0065l":"n","messages":[]}',
        b'{"messages":[],"a":{"b":1},"a":[2],"model":"m"}',
        b'{"model":"m","messages":' + b"[" * 100_000,
        b'{"model":"m","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"m","messages":[],"max_tokens":1e999}',
        b'{"model":"\\ud800","messages":[]}',
        b'{"model":"m","messages":[],"n":' + b"9" * 5000 + b"}",
    ],
)
def test_refuses_a_body_that_two_readers_could_read_differently(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","messages":[],"deep":{"a":1,"a":2}}',
        b'{"model":"m","messages":[' + b",".join([b"{}"] * 1_000_000) + b"]}",
        b'{"model":"m","messages":[{"role":"user","content":"' + b" " * 1_000_000 + b'"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"' + b"a" * 1_000_000 + b'"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"<|endoftext|>"}]}',
        b'{"model":"m","messages":[],"stop":[' + b",".join([b'"x"'] * 10_000) + b"]}",
        b'{"model":"m","messages":[],"__proto__":{"a":1},"__class__":2}',
        b' \n{ "model" : "m" ,\n "messages" : [ ] , "caf\xc3\xa9" : 1 }\n ',
    ],
)
def test_serves_odd_but_well_formed_bodies_at_once(body: bytes) -> None:
    started = time.process_time()
    asked = ask(body)
    assert asked.model == "m"
    assert time.process_time() - started < 0.2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(text for item in value.values() for text in _texts(item))]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


@given(st.dictionaries(st.text(), json_values, max_size=6), st.sampled_from([None, 2]))
def test_any_object_decodes_to_its_own_members(value: dict, indent: int | None) -> None:
    for ascii_only in (True, False):
        try:
            body = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()
        except UnicodeEncodeError:
            continue
        try:
            fields = decode(body)
        except InvalidRequest:
            assert any("\\ud" in json.dumps(text) for text in _texts(value))  # a lone surrogate cannot be a key
            continue
        assert list(fields) == list(value)
        for key, raw in fields.items():
            assert json.loads(bytes(raw)) == json.loads(json.dumps(value[key]))


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "é", 'q"', "\\"]), json_values), max_size=5), st.booleans())
def test_a_top_level_key_that_stands_twice_is_always_found(members: list, compact: bool) -> None:
    separators = (",", ":") if compact else (" ,\n", " : ")
    text = separators[0].join(json.dumps(k) + separators[1] + json.dumps(v) for k, v in members)
    keys = [key for key, _ in members]
    try:
        fields = decode(("{" + text + "}").encode())
    except InvalidRequest:
        assert len(set(keys)) < len(keys)
    else:
        assert list(fields) == keys


@given(st.binary(max_size=200))
def test_any_bytes_are_an_ask_or_a_400(body: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        assert ask(body).model


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_a_known_route_with_another_method_is_405(method: str) -> None:
    with pytest.raises(MethodNotAllowed) as caught:
        parse(call(method=method), ANYONE, tenants_configured=False)
    assert (b"allow", b"POST") in caught.value.headers


def test_a_compressed_body_is_refused_before_it_is_looked_at() -> None:
    with pytest.raises(InvalidRequest, match="Compressed"):
        parse(call(body=b"\x1f\x8b", headers=[(b"content-encoding", b"gzip")]), ANYONE, tenants_configured=False)


@pytest.mark.parametrize(
    ("body", "replayable"),
    [
        ({"store": False}, True),
        ({}, False),
        ({"store": False, "background": True}, False),
        ({"store": False, "tools": [{"type": "web_search"}]}, False),
        ({"store": False, "tools": [{"type": "function", "name": "f"}]}, True),
        ({"store": False, "previous_response_id": "resp_1"}, False),
    ],
)
def test_only_a_response_without_effects_may_be_sent_twice(body: dict, replayable: bool) -> None:
    assert ask({"model": "m", "input": "hi", **body}, "/v1/responses").replayable is replayable


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        (b'{"model":"m","previous\\u005fresponse_id":"resp_1"}', "previous_response_id"),
        (b'{"model":"m","input":[{"type":"item\\u005freference","id":"msg_1"}]}', "input"),
    ],
)
def test_with_tenants_nobody_reaches_stored_objects_of_the_account(body: object, param: str) -> None:
    body = body if isinstance(body, bytes) else {"model": "m", **body}  # type: ignore[dict-item]
    with pytest.raises(NotFound) as caught:
        ask(body, "/v1/responses", tenants=True)
    assert (caught.value.status, caught.value.param) == (404, param)
    assert ask(body, "/v1/responses").dialect == "responses"


def test_stored_responses_pass_without_tenants_only() -> None:
    stored = call("/v1/responses/resp_1", method="GET")
    assert parse(stored, ANYONE, tenants_configured=False).dialect == "passthrough"
    with pytest.raises(NotFound):
        parse(stored, Tenant("acme", passthrough=("/v1/*",)), tenants_configured=True)


@pytest.mark.parametrize(
    ("allowed", "path", "served"),
    [
        ((), "/v1/files", False),
        (("/v1/files",), "/v1/files", True),
        (("/v1/files",), "/v1/files/file-1", False),
        (("/v1/audio/*",), "/v1/audio/speech", True),
        (("/v1/audio/*",), "/v1/audiobooks", False),
        (None, "/v1/anything/at/all", True),
    ],
)
def test_pass_through_needs_permission(allowed: tuple | None, path: str, served: bool) -> None:
    tenant = Tenant("acme", passthrough=allowed)
    if served:
        assert parse(call(path), tenant, tenants_configured=True).dialect == "passthrough"
    else:
        with pytest.raises(NotFound) as caught:
            parse(call(path), tenant, tenants_configured=True)
        assert caught.value.code == "unsupported_route"


@pytest.mark.parametrize(
    "raw",
    [
        b"/v1/%2e%2e/admin",
        b"/v1/..;/admin",
        b"/v1/x%00",
        b"/v1/x%2fy",
        b"/v1/x%252fy",
        b"/v1//evil",
        b"/v1/a\\b",
        b"/\xc3",
    ],
)
def test_pass_through_takes_no_path_that_a_server_could_read_differently(raw: bytes) -> None:
    unsafe = call("/v1/x")
    unsafe.raw_path = raw
    with pytest.raises(InvalidRequest):
        parse(unsafe, ANYONE, tenants_configured=False)


def test_model_ids_may_hold_slashes() -> None:
    asked = parse(call("/v1/models/org/model:7b", method="GET"), ANYONE, tenants_configured=False)
    assert asked.model == "org/model:7b"


def test_embeddings_know_what_the_client_decodes() -> None:
    assert ask({"model": "e", "input": "x", "encoding_format": "base64"}, "/v1/embeddings").wants_base64
    assert not ask({"model": "e", "input": "x"}, "/v1/embeddings").wants_base64
    with pytest.raises(InvalidRequest):
        ask({"model": "e", "input": "x", "stream": True}, "/v1/embeddings")


def test_include_usage_counts_only_where_the_client_set_it() -> None:
    for options, wanted in [({"include_usage": True}, True), ({"include_usage": False}, False), ({}, False)]:
        body = orjson.dumps({**CHAT, "stream": True, "stream_options": options})
        assert ask(body).wants_usage is wanted
