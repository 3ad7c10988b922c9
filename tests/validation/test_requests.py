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
from proxy.types import Ask, Call, Objects, Tenant
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


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/compact", "/v1/responses/input_tokens"])
@pytest.mark.parametrize("tenants", [True, False])
def test_the_stored_objects_that_a_body_names(path: str, tenants: bool) -> None:
    for body, refers in [
        ({}, ()),
        ({"previous_response_id": None, "conversation": None}, ()),
        ({"previous_response_id": "resp_1"}, (("previous_response_id", "resp_1"),)),
        ({"conversation": "conv_1"}, (("conversation", "conv_1"),)),
        ({"conversation": {"id": "conv_1"}}, (("conversation", "conv_1"),)),
        (
            {"previous_response_id": "resp_1", "conversation": "conv_1"},
            (("previous_response_id", "resp_1"), ("conversation", "conv_1")),
        ),
        (b'{"model":"m","input":"x","previous\\u005fresponse_id":"resp_1"}', (("previous_response_id", "resp_1"),)),
        (b'{"model":"m","conversation":{"\\u0069d":"conv_\\u0031"}}', (("conversation", "conv_1"),)),
    ]:
        sent = body if isinstance(body, bytes) else {"model": "m", "input": "x", **body}
        objects = ask(sent, path, tenants=tenants).objects
        assert (objects.refers if objects is not None else ()) == refers
    for wrong in (
        {"previous_response_id": 1},
        {"previous_response_id": ["resp_1"]},
        {"conversation": {}},
        {"conversation": {"id": 1}},
        {"conversation": {"id": "conv_1", "x": "y" * 4096}},
        b'{"model":"m","conversation":{"id":"conv_1","id":"conv_2"}}',
        b'{"model":"m","conversation":{"id":"conv_1","\\u0069d":"conv_2"}}',
    ):
        with pytest.raises(InvalidRequest) as caught:
            ask(wrong if isinstance(wrong, bytes) else {"model": "m", "input": "x", **wrong}, path, tenants=tenants)
        assert caught.value.param in ("previous_response_id", "conversation")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/compact", "/v1/responses/input_tokens"])
@pytest.mark.parametrize(
    "body",
    [
        {"input": [{"type": "message", "content": "x"}, {"type": "item_reference", "id": "msg_1"}]},
        {"input": [{"id": "msg_1"}]},
        {"input": [{"id": "msg_1", "type": None}]},
        b'{"model":"m","input":[{"type":"item\\u005freference","id":"msg_1"}]}',
    ],
)
def test_with_tenants_nobody_reaches_items_of_the_account(body: object, path: str) -> None:
    body = body if isinstance(body, bytes) else {"model": "m", **body}  # type: ignore[dict-item]
    with pytest.raises(NotFound) as caught:
        ask(body, path, tenants=True)
    assert (caught.value.status, caught.value.param) == (404, "input")
    ask(body, path)
    messages = [{"role": "user", "content": "x"}, {"id": "msg_1", "role": "assistant", "content": "x"}]
    ask({"model": "m", "input": messages}, path, tenants=True)


def test_only_a_response_that_is_kept_makes_objects() -> None:
    for body, makes in [({}, True), ({"store": None}, True), ({"store": True}, True), ({"store": False}, False)]:
        objects = ask({"model": "m", "input": "x", **body}, "/v1/responses").objects
        assert (objects is not None and objects.makes) is makes
    assert ask({"model": "m", "input": "x"}, "/v1/responses/compact").objects is None
    assert ask(CHAT).objects is None


@pytest.mark.parametrize("tenants", [True, False])
@pytest.mark.parametrize(
    ("method", "path", "object_id"),
    [
        ("GET", "/v1/responses/resp_1", "resp_1"),
        ("HEAD", "/v1/responses/resp_1", "resp_1"),
        ("DELETE", "/v1/responses/resp_1", "resp_1"),
        ("POST", "/v1/responses/resp_1/cancel", "resp_1"),
        ("GET", "/v1/responses/resp_1/input_items", "resp_1"),
        ("GET", "/v1/responses/compact", "compact"),
    ],
)
def test_a_stored_response_is_named_by_its_path(method: str, path: str, object_id: str, tenants: bool) -> None:
    nothing_allowed = Tenant("acme")  # nor needed: these are routes of our own
    found = parse(call(path, b"", method=method), nothing_allowed, tenants_configured=tenants)
    assert (found.dialect, found.route, found.objects) == (
        "passthrough",
        "/v1/responses/{id}",
        Objects((("", object_id),), free=True),
    )
    assert found.replayable is (method in ("GET", "HEAD"))
    unsafe = call(path, b"", method=method)
    unsafe.raw_path = path.encode() + b"%2f..%2fother"
    with pytest.raises(InvalidRequest):
        parse(unsafe, nothing_allowed, tenants_configured=tenants)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/responses/resp_1"),
        ("POST", "/v1/responses/resp_1"),
        ("GET", "/v1/responses/resp_1/cancel"),
        ("POST", "/v1/responses/resp_1/new"),
        ("GET", "/v1/responses/resp_1/input_items/x"),
    ],
)
def test_with_tenants_a_response_has_no_parts_that_are_not_known(method: str, path: str) -> None:
    with pytest.raises(NotFound) as caught:
        parse(call(path, b"{}", method=method), Tenant("acme", passthrough=("/v1/*",)), tenants_configured=True)
    assert caught.value.code == "unsupported_route"
    assert parse(call(path, b"{}", method=method), ANYONE, tenants_configured=False).route == "passthrough"


def test_conversations_need_permission_and_an_owner() -> None:
    allowed = Tenant("acme", passthrough=("/v1/conversations*",))
    for method, path, body, objects in [
        ("POST", "/v1/conversations", b"{}", Objects(makes=True, free=True)),
        ("POST", "/v1/conversations", b"", Objects(makes=True, free=True)),
        ("GET", "/v1/conversations/c_1", b"", Objects((("", "c_1"),), free=True)),
        ("POST", "/v1/conversations/c_1/items", b'{"items":[]}', Objects((("", "c_1"),), free=True)),
        ("DELETE", "/v1/conversations/c_1/items/i", b"", Objects((("", "c_1"),), free=True)),
    ]:
        sent = call(path, body, method=method)
        assert parse(sent, allowed, tenants_configured=True).objects == objects
        with pytest.raises(NotFound):
            parse(sent, Tenant("acme"), tenants_configured=True)
    with pytest.raises(NotFound):
        parse(call("/v1/conversations", method="GET"), allowed, tenants_configured=True)
    taking = call("/v1/conversations", b'{"items":[{"type":"item_reference","id":"msg_of_another"}]}')
    with pytest.raises(NotFound):
        parse(taking, allowed, tenants_configured=True)


def test_counting_needs_no_model_and_is_routed_by_the_one_it_names() -> None:
    counted = ask({"input": "x"}, "/v1/responses/input_tokens", tenants=True)
    assert (counted.dialect, counted.model, counted.replayable) == ("passthrough", "", True)
    assert counted.objects == Objects(free=True)
    assert ask({"model": "m", "input": "x"}, "/v1/responses/input_tokens").model == "m"
    compacted = ask({"model": "m", "input": "x"}, "/v1/responses/compact", tenants=True)
    assert (compacted.dialect, compacted.model, compacted.route) == ("responses", "m", "/v1/responses/compact")
    for body in ({"input": "x"}, {"model": "m", "input": "x", "stream": True}):
        with pytest.raises(InvalidRequest):
            ask(body, "/v1/responses/compact")


@pytest.mark.parametrize(
    ("body", "kind", "model"),
    [
        (b'{"model":"m","input":"x"}', b"application/json", "m"),
        (b'{"model":"m"}', b"application/json; charset=utf-8", "m"),
        (b'{"model":"m"}', b"text/plain", ""),
        (b'{"model":7}', b"application/json", ""),
        (b'{"model":', b"application/json", ""),
        (b'{"model":"' + b"m" * 300 + b'"}', b"application/json", ""),
        (b'{"model":"a\\nb"}', b"application/json", ""),
        (b"[" * 100_000, b"application/json", ""),
        (b"\xff", b"application/json", ""),
    ],
)
def test_the_model_of_a_pass_through_is_what_its_body_names(body: bytes, kind: bytes, model: str) -> None:
    sent = call("/v1/images/generations", body, headers=[(b"content-type", kind)])
    passed = parse(sent, ANYONE, tenants_configured=False)
    assert (passed.dialect, passed.model, passed.fields) == ("passthrough", model, {})


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
