"""One request up, one reply down: what the provider gets, and what each of its answers becomes."""

from __future__ import annotations

import asyncio
import base64
import gzip
import struct
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from proxy.errors import (
    ProxyError,
    UpstreamBroken,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.providers.openai import Timeouts, caller_key
from proxy.transport.answer import Answer, End, Outcome
from proxy.types import Headers, Usage
from tests.providers.upstream import HEADERS, MESSAGES, Upstream, ask, body_of, chat, events, whole

pytestmark = pytest.mark.anyio

REPLY = {"id": "1", "object": "chat.completion", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
CHUNK = b'{"choices":[{"index":0,"delta":{"content":"Hi"}}]}'
NO_KEY: Headers = [(b"user-agent", b"breakwater/0"), (b"accept-encoding", b"identity")]


# --- up -------------------------------------------------------------------------------------------------------------


async def test_a_body_that_need_not_change_travels_byte_for_byte() -> None:
    upstream = Upstream(whole(REPLY))
    body = b'{ "messages" : [ {"role":"user", "content":"\\u00e9"} ],  "model":"m", "new": 1e2 }'
    await upstream.provider(api_keys=["sk-ours"]).open(ask(body), "m")
    (asked,) = upstream.asked
    assert (asked.method, asked.target, asked.body) == (b"POST", b"/v1/chat/completions", body)
    assert asked.header(b"authorization") == [b"Bearer sk-ours"]
    assert asked.header(b"content-type") == asked.header(b"accept") == [b"application/json"]
    assert asked.header(b"traceparent") == [b"00-trace-span-01"]


async def test_another_model_name_is_the_only_change() -> None:
    upstream = Upstream(whole(REPLY))
    messages = b'[{"role":"user","content":"a\\/b"}]'
    await upstream.provider().open(ask(b'{"messages":%b,"model":"alias","x":1.50}' % messages), 'real"\u00e9')
    assert upstream.asked[0].body == b'{"messages":%b,"model":"real\\"\xc3\xa9","x":1.50}' % messages


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, {"include_usage": True}),
        ({"stream_options": None}, {"include_usage": True}),
        ({"stream_options": {}}, {"include_usage": True}),
        ({"stream_options": {"include_obfuscation": False}}, {"include_obfuscation": False, "include_usage": True}),
        ({"stream_options": {"include_usage": False}}, {"include_usage": True}),
        ({"stream_options": {"include_usage": True, "x": 1}}, {"include_usage": True, "x": 1}),
    ],
)
async def test_a_stream_is_asked_for_its_usage(options: dict[str, Any], sent: dict[str, Any]) -> None:
    upstream = Upstream(events(CHUNK))
    await body_of(await upstream.provider().open(chat(stream=True, **options), "m"))
    (asked,) = upstream.asked
    assert asked.json["stream_options"] == sent
    assert asked.header(b"accept") == [b"text/event-stream"]


async def test_base_url_query_and_path_make_the_target() -> None:
    upstream = Upstream(whole(REPLY))
    provider = upstream.provider("https://host.test:8443/some/base/")
    await provider.open(ask({"model": "m", "messages": MESSAGES}, query=b"api-version=1&x=%20"), "m")
    assert upstream.asked[0].target == b"/some/base/chat/completions?api-version=1&x=%20"


SENT: Headers = [
    *HEADERS,
    (b"authorization", b"Bearer callers-own"),
    (b"cookie", b"session=1"),
    (b"x-forwarded-for", b"10.0.0.1"),
    (b"openai-beta", b"assistants=v2"),
    (b"openai-organization", b"org-callers"),
    (b"x-stainless-lang", b"python"),
    (b"content-encoding", b"identity"),
    (b"range", b"bytes=0-9"),
    (b"te", b"trailers"),
]


async def test_client_headers_cross_by_allow_list() -> None:
    upstream = Upstream(whole(REPLY))
    await upstream.provider(api_keys=["sk-ours"]).open(chat(headers=SENT), "m")
    names = {name for name, _ in upstream.asked[0].headers}
    assert names == {
        b"openai-beta",
        b"user-agent",
        b"accept-encoding",
        b"authorization",
        b"traceparent",
        b"content-type",
        b"accept",
    }
    assert upstream.asked[0].header(b"authorization") == [b"Bearer sk-ours"]


async def test_the_caller_s_own_key_brings_its_account_along() -> None:
    upstream = Upstream(whole(REPLY))
    await upstream.provider(callers_key=True).open(chat(headers=SENT), "m")
    assert upstream.asked[0].header(b"authorization") == [b"Bearer callers-own"]
    assert upstream.asked[0].header(b"openai-organization") == [b"org-callers"]


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([(b"authorization", b"Bearer k")], b"k"),
        ([(b"authorization", b"bearer k")], b"k"),
        ([(b"authorization", b"Basic k")], b""),
        ([(b"api-key", b"k")], b"k"),
        ([(b"x-api-key", b"k")], b"k"),
        ([], b""),
    ],
)
async def test_the_key_that_a_caller_presents(headers: Headers, key: bytes) -> None:
    assert caller_key(headers) == key
    upstream = Upstream(whole(REPLY))
    await upstream.provider(callers_key=True).open(chat(headers=[*HEADERS, *headers]), "m")
    assert upstream.asked[0].header(b"authorization") == ([b"Bearer " + key] if key else [])


async def test_a_pass_through_keeps_what_describes_its_body() -> None:
    upstream = Upstream(whole(b"sound", kind=b"audio/mpeg"))
    packed = gzip.compress(b"text")
    headers: Headers = [*SENT[:-3], (b"content-encoding", b"gzip"), (b"content-type", b"text/plain")]
    passing = ask(packed, "/v1/audio/speech", headers=headers, query=b"a=b")
    reply = await upstream.provider(api_keys=["sk-ours"]).open(passing, "")
    (asked,) = upstream.asked
    assert (asked.method, asked.target, asked.body) == (b"POST", b"/v1/audio/speech?a=b", packed)
    assert asked.header(b"content-encoding") == [b"gzip"]
    assert asked.header(b"content-type") == [b"text/plain"]
    assert asked.header(b"authorization") == [b"Bearer sk-ours"]
    assert await body_of(reply) == b"sound"


# --- down -----------------------------------------------------------------------------------------------------------


async def test_a_plain_reply_is_one_event_and_frees_its_connection() -> None:
    upstream = Upstream(whole(REPLY, 200, (b"set-cookie", b"a"), (b"x-ratelimit-limit-tokens", b"9")))
    reply = await upstream.provider().open(chat(), "m")
    assert upstream.ended == [Outcome.FINISHED]
    assert reply.headers == [
        (b"content-type", b"application/json"),
        (b"x-breakwater-upstream-ratelimit-limit-tokens", b"9"),
    ]
    (event,) = [event async for event in reply.events]
    assert (event.data, event.usage) == (orjson.dumps(REPLY), Usage(3, 2))
    assert (reply.length, reply.stream, reply.upstream_request_id) == (len(event.data), False, "their-id")


@pytest.mark.parametrize("status", [400, 404, 408, 409, 413, 415, 422, 451, 499])
async def test_a_refusal_that_is_the_client_s_own_fault_passes_unchanged(status: int) -> None:
    body = b'{"error": {"message": "no"}, "odd":  1}'
    upstream = Upstream(whole(body, status, (b"retry-after", b"1"), (b"x-should-retry", b"false")))
    reply = await upstream.provider().open(chat(), "m")
    assert (reply.status, await body_of(reply)) == (status, body)
    assert (b"x-should-retry", b"false") in reply.headers
    assert reply.upstream_request_id == "their-id"


async def test_known_secrets_are_taken_out_of_a_refusal() -> None:
    upstream = Upstream(whole(b'{"error": {"message": "bad key sk-ours"}}', 400))
    reply = await upstream.provider(scrub=lambda body: body.replace(b"sk-ours", b"[redacted]")).open(chat(), "m")
    assert await body_of(reply) == b'{"error": {"message": "bad key [redacted]"}}'


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, UpstreamUnavailable),
        (402, UpstreamUnavailable),
        (403, UpstreamUnavailable),
        (429, UpstreamRateLimited),
        (301, UpstreamUnavailable),
        (304, UpstreamUnavailable),
        (500, UpstreamUnavailable),
        (503, UpstreamUnavailable),
        (504, UpstreamTimeout),
        (529, UpstreamUnavailable),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_any_other_status_is_our_error(status: int, error: type[ProxyError], stream: bool) -> None:
    upstream = Upstream(whole(b'{"error": {"message": "secret"}}', status, (b"location", b"http://elsewhere/")))
    with pytest.raises(error) as raised:
        await upstream.provider().open(chat(stream=stream), "m")
    assert type(raised.value) is error
    assert raised.value.details == {"upstream_status": status, "upstream_request_id": "their-id"}
    assert "secret" not in raised.value.message
    assert upstream.ended == [Outcome.FINISHED]  # read to its end: the connection can serve again
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("status", [401, 402, 403])
async def test_with_the_caller_s_own_key_its_refusal_is_the_caller_s(status: int) -> None:
    upstream = Upstream(whole(b'{"error": {}}', status))
    reply = await upstream.provider(callers_key=True).open(chat(), "m")
    assert (reply.status, await body_of(reply)) == (status, b'{"error": {}}')


async def test_a_rate_limit_says_when_to_come_back() -> None:
    upstream = Upstream(
        whole(
            b"{}",
            429,
            (b"retry-after", b"7"),
            (b"retry-after-ms", b"6500"),
            (b"x-should-retry", b"false"),
            (b"x-ratelimit-reset-tokens", b"6m0s"),
            (b"openai-organization", b"ours"),
        )
    )
    with pytest.raises(UpstreamRateLimited) as raised:
        await upstream.provider().open(chat(), "m")
    assert raised.value.headers == [
        (b"retry-after", b"7"),
        (b"retry-after-ms", b"6500"),
        (b"x-should-retry", b"false"),
        (b"x-breakwater-upstream-ratelimit-reset-tokens", b"6m0s"),
    ]


async def test_an_error_s_body_that_stalls_does_not_hold_the_error_up() -> None:
    upstream = Upstream(Answer(500, [], [(0.0, b"{")], end=End.STALL, length=2))
    started = asyncio.get_running_loop().time()
    with pytest.raises(UpstreamUnavailable):
        await upstream.provider().open(chat(), "m")
    assert asyncio.get_running_loop().time() - started < 15  # of the 20 that a reply may take


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[1]", b'"text"', b"null", b'{"a":', b'{"usage": {}', b"[" * 100_000], ids=repr
)
async def test_a_success_that_is_no_object_is_none(body: bytes) -> None:
    upstream = Upstream(whole(body))
    with pytest.raises(UpstreamBroken):
        await upstream.provider().open(chat(), "m")


@pytest.mark.parametrize("error", [b'{"code":502}', b'"sorry"', b"[1]", b"true", b"1"])
async def test_a_success_that_is_an_error_is_one(error: bytes) -> None:
    upstream = Upstream(whole(b'{"error":%b}' % error))
    with pytest.raises(UpstreamUnavailable):
        await upstream.provider().open(chat(), "m")
    whole_reply = b'{"choices":[{}],"error":%b}' % error
    reply = await Upstream(whole(whole_reply)).provider().open(chat(), "m")
    assert await body_of(reply) == whole_reply


@pytest.mark.parametrize("none", [b"null", b"{}", b'""', b"false"])
async def test_an_error_member_that_says_nothing_is_no_error(none: bytes) -> None:
    body = b'{"choices":[],"error":%b}' % none
    assert await body_of(await Upstream(whole(body)).provider().open(chat(), "m")) == body
    chunk = b'{"choices":[],"error":%b}' % none
    streamed = await Upstream(events(chunk)).provider().open(chat(stream=True), "m")
    assert await body_of(streamed) == b"data: %b\n\ndata: [DONE]\n\n" % chunk


@pytest.mark.parametrize("coding", [b"gzip", b"x-gzip", b"deflate", b"GZIP "])
async def test_a_compressed_reply_is_unpacked(coding: bytes) -> None:
    import zlib

    plain = orjson.dumps(REPLY)
    packed = zlib.compress(plain) if coding == b"deflate" else gzip.compress(plain)
    reply = await Upstream(whole(packed, 200, (b"content-encoding", coding))).provider().open(chat(), "m")
    assert reply.length == len(plain)
    assert b"content-encoding" not in dict(reply.headers)
    assert await body_of(reply) == plain


@pytest.mark.parametrize(
    ("made", "coding", "reason"),
    [
        (lambda: gzip.compress(b"{}")[:-4], b"gzip", "encoding"),
        (lambda: b"{}", b"br", "encoding"),
        (lambda: b"{}", b"gzip", "encoding"),
        (lambda: gzip.compress(b" " * (129 * 1024 * 1024), 9), b"gzip", "too_large"),
    ],
    ids=["cut", "unknown", "not at all", "bomb"],
)
async def test_what_cannot_be_unpacked_is_broken(made: Callable[[], bytes], coding: bytes, reason: str) -> None:
    """`made` here, since the last of them takes most of a second."""
    with pytest.raises(UpstreamBroken) as raised:
        await Upstream(whole(made(), 200, (b"content-encoding", coding))).provider().open(chat(), "m")
    assert raised.value.reason == reason


async def test_silence_ends_a_plain_reply_at_its_total_and_a_stream_at_its_first_event() -> None:
    stalled = Answer(200, [(b"content-type", b"text/event-stream")], [(0.0, b": wait\n\n")], end=End.STALL)
    for stream, timeouts in ((False, Timeouts(20, 20, 0.05)), (True, Timeouts(0.05, 20, 20))):
        upstream = Upstream(stalled)
        with pytest.raises(UpstreamTimeout):
            await upstream.provider(timeouts=timeouts).open(chat(stream=stream), "m")
        assert upstream.ended == [Outcome.GONE]


async def test_who_is_cancelled_while_it_waits_leaves_nothing_open() -> None:
    for stream in (False, True):
        upstream = Upstream(Answer(200, [(b"content-type", b"text/event-stream")], [(0.0, b":\n\n")], end=End.STALL))
        task = asyncio.create_task(upstream.provider().open(chat(stream=stream), "m"))  # type: ignore[arg-type]
        while not upstream.asked:
            await asyncio.sleep(0)
        task.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert upstream.ended == [Outcome.GONE]


# --- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [b"text/event-stream", b"TEXT/Event-Stream; charset=utf-8", b"text/plain", b""])
async def test_a_stream_is_one_whatever_it_is_called(kind: bytes) -> None:
    upstream = Upstream(events(CHUNK, kind=kind))
    reply = await upstream.provider().open(chat(stream=True), "m")
    assert reply.stream
    assert await body_of(reply) == b"data: %b\n\ndata: [DONE]\n\n" % CHUNK


@pytest.mark.parametrize("kind", [b"application/json", b"text/plain", b""])
@pytest.mark.parametrize("blanks", [b"", b"\n \r\n"])
async def test_json_instead_of_a_stream_becomes_one(kind: bytes, blanks: bytes) -> None:
    answer = Answer(
        200, [(b"content-type", kind)] if kind else [], [(0.0, b) for b in (blanks, b"{", orjson.dumps(REPLY)[1:]) if b]
    )
    reply = await Upstream(answer).provider().open(chat(stream=True), "m")
    (event,) = [event async for event in reply.events]
    assert event.data.startswith(b'data: {"id":"1","object":"chat.completion.chunk"')
    assert event.data[-event.terminator :] == b"data: [DONE]\n\n"
    assert event.usage == Usage(3, 2)
    assert b"usage" not in event.data


async def test_a_page_instead_of_a_stream_is_no_answer() -> None:
    with pytest.raises(UpstreamBroken):
        await Upstream(whole(b"<html>\n\n</html>", kind=b"text/html")).provider().open(chat(stream=True), "m")


async def test_our_wish_for_usage_leaves_no_trace() -> None:
    chunk = CHUNK[:-1] + b',"usage":null}'
    usage = b'{"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":1}}'
    reply = await Upstream(events(chunk, usage)).provider().open(chat(stream=True), "m")
    found = [event async for event in reply.events]
    assert b"".join(event.data for event in found) == b"data: %b\n\ndata: [DONE]\n\n" % CHUNK
    assert [event.usage for event in found if event.usage] == [Usage(4, 1)]


async def test_a_client_s_own_wish_for_usage_is_served_as_it_came() -> None:
    chunk, usage = CHUNK[:-1] + b',"usage":null}', b'{"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":1}}'
    asking = chat(stream=True, stream_options={"include_usage": True})
    reply = await Upstream(events(chunk, usage)).provider().open(asking, "m")
    assert await body_of(reply) == b"data: %b\n\ndata: %b\n\ndata: [DONE]\n\n" % (chunk, usage)


@pytest.mark.parametrize("status", [400, 422])
async def test_a_server_that_refuses_our_wish_is_asked_without_and_remembered(status: int) -> None:
    refusal = whole(b'{"detail":[{"loc":["body","stream_options"],"msg":"extra fields not permitted"}]}', status)
    upstream = Upstream(refusal, events(CHUNK))
    provider = upstream.provider()
    assert b"Hi" in await body_of(await provider.open(chat(stream=True), "m"))
    assert b"Hi" in await body_of(await provider.open(chat(stream=True), "m"))
    assert ["stream_options" in asked.json for asked in upstream.asked] == [True, False, False]
    await body_of(await provider.open(chat(stream=True), "another"))
    assert "stream_options" in upstream.asked[-1].json  # of this model nothing is known


async def test_nobody_s_odd_request_switches_usage_off_for_all() -> None:
    refusal = whole(b'{"error":{"message":"Unrecognized request argument supplied: stream_options_x"}}', 400)
    upstream = Upstream(refusal, refusal, events(CHUNK))
    provider = upstream.provider()
    reply = await provider.open(chat(stream=True, stream_options_x=1), "m")
    assert reply.status == 400
    await body_of(await provider.open(chat(stream=True), "m"))
    assert ["stream_options" in asked.json for asked in upstream.asked] == [True, False, True]


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (b'{"error":{"type":"invalid_request_error","message":"too long","code":"context_length_exceeded"}}', 400),
        (b'{"error":{"type":"server_error","message":"down"}}', None),
        (b'{"error":"down"}', None),
        (b"{", None),
    ],
)
async def test_an_error_before_anything_else_is_a_status(event: bytes, status: int | None) -> None:
    opening = Upstream(events(event, done=False)).provider().open(chat(stream=True), "m")
    if status is None:
        with pytest.raises(UpstreamUnavailable):
            await opening
    else:
        reply = await opening
        assert (reply.status, reply.stream) == (status, False)
        assert await body_of(reply) == event


# --- embeddings, models, pass-through -------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["base64", "float", None])
async def test_floats_are_packed_for_who_asked_for_base64(wanted: str | None) -> None:
    answer = {"data": [{"embedding": [0.5, -1.25]}], "usage": {"prompt_tokens": 3, "total_tokens": 3}}
    body = {"model": "m", "input": "a"} | ({"encoding_format": wanted} if wanted else {})
    reply = await Upstream(whole(answer)).provider().open(ask(body, "/v1/embeddings"), "m")
    vector = orjson.loads(await body_of(reply))["data"][0]["embedding"]
    packed = base64.b64encode(struct.pack("<2f", 0.5, -1.25)).decode()
    assert vector == (packed if wanted == "base64" else [0.5, -1.25])


async def test_models_are_asked_for_without_body_or_query() -> None:
    upstream = Upstream(whole({"data": []}))
    listing = ask(b"", "/v1/models", method="GET", query=b"x=1")
    await upstream.provider("http://host.test/base", api_keys=["k"]).open(listing, "")
    assert (upstream.asked[0].method, upstream.asked[0].target, upstream.asked[0].body) == (
        b"GET",
        b"/base/models",
        b"",
    )


PASSED = ask(b"", "/v1/files/f/content", method="GET")


async def test_a_pass_through_is_any_body_in_pieces_with_its_length() -> None:
    answer = Answer(200, [(b"content-type", b"x/y"), (b"etag", b"e")], [(0.0, b"ab"), (0.0, b"\xff")], length=3)
    reply = await Upstream(answer).provider().open(PASSED, "")
    assert (reply.length, reply.stream) == (3, False)
    assert dict(reply.headers) == {b"content-type": b"x/y", b"etag": b"e"}
    assert [event.data async for event in reply.events] == [b"ab", b"\xff"]


async def test_not_modified_passes_for_who_asked() -> None:
    answer = Answer(304, [(b"etag", b'"e"')], length=0)
    reply = await Upstream(answer).provider().open(PASSED, "")
    assert (reply.status, reply.headers, reply.length) == (304, [(b"etag", b'"e"')], None)
    assert await body_of(reply) == b""


async def test_a_compressed_stream_passes_through_as_bytes() -> None:
    packed = gzip.compress(b"data: 1\n\n")
    answer = Answer(200, [(b"content-type", b"text/event-stream"), (b"content-encoding", b"gzip")], [(0.0, packed)])
    reply = await Upstream(answer).provider().open(PASSED, "")
    assert (b"content-encoding", b"gzip") in reply.headers
    assert await body_of(reply) == packed


@pytest.mark.parametrize("pieces", [[b"data: 1\n\nevent: x\ndata: 2"], [b"data: 2\n"], [b"data: 1\n\n", b"da", b"ta"]])
async def test_a_stream_without_a_dialect_ends_as_it_is_framed(pieces: list[bytes]) -> None:
    answer = Answer(200, [(b"content-type", b"text/event-stream")], [(0.0, piece) for piece in pieces])
    reply = await Upstream(answer).provider().open(PASSED, "")
    assert reply.stream
    assert await body_of(reply) == b"".join(pieces)
