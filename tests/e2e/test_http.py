"""What goes over the wire: which bytes and headers reach the provider, and which reach the client."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.clear import CLEAR
from tests.e2e.stack import ALONE, ServeProcess, serving
from tests.e2e.upstreams import answering, base_url, http, scripted, sse
from tests.edge.raw import Answer, Wire, eventually
from tests.transport.servers import Peer, Received, Server, refusing

pytestmark = pytest.mark.slow

PROVIDER_KEY = "sk-provider-key-0123456789"
CLIENT_KEY = "sk-client-key-0123456789"
TENANT_KEY = "bw-tenant-key-0123456789"
ADMIN_KEY = "bw-admin-key-0123456789"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
REPLY = json.dumps(
    {
        "id": "c1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
        "usage": USAGE,
    },
    indent=2,  # as some servers write it
).encode()
DELTA = b'{"id":"c1","choices":[{"index":0,"delta":{"content":"hi"}}]}'
USAGE_CHUNK = b'{"id":"c1","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
STREAM = (DELTA, DELTA, b"[DONE]")
CHAT = {"model": "any", "messages": [{"role": "user", "content": "hi"}]}
RAW = json.dumps(CHAT).encode()

Play = Callable[[Peer, Received], Awaitable[None]]


class Upstream:
    """The provider. `answer` is what it says, or how it makes that of the request; `play` replaces all of that."""

    def __init__(self) -> None:
        self.answer: bytes | Callable[[Received], bytes] = b""
        self.play: Play | None = None
        self.server: Server | None = None
        self.reset()

    def reset(self) -> None:
        self.answer, self.play = http(REPLY), None

    async def script(self, peer: Peer) -> None:
        while True:
            received = await peer.request()
            if self.play is not None:
                await self.play(peer, received)
            else:
                await peer.send(self.answer(received) if callable(self.answer) else self.answer)

    @property
    def requests(self) -> list[Received]:
        assert self.server is not None
        return self.server.requests

    @property
    def last(self) -> Received:
        return self.requests[-1]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Upstream, ServeProcess]]:
    upstream = Upstream()
    with scripted(upstream.script) as server:
        upstream.server = server
        to_it = {"kind": "openai", "base_url": base_url(server)}
        config = {
            **ALONE,
            "providers": {
                "up": {**to_it, "api_key": PROVIDER_KEY, "organization": "org-ours", "timeouts": {"idle_ms": 20_000}},
                "callers": {**to_it, "api_key": "client"},
                "nobody": {"kind": "openai", "base_url": f"http://127.0.0.1:{refusing().port}/v1"},
            },
            "models": [
                {"name": "*", "targets": ["up/*"]},
                {"name": "callers/*", "targets": ["callers/*"]},
                {"name": "nobody/*", "targets": ["nobody/*"]},
                {"name": "renamed", "targets": ["up/real-name"]},
            ],
        }
        with serving(config) as process:
            yield upstream, process


@pytest.fixture
def upstream(running: tuple[Upstream, ServeProcess]) -> Upstream:
    running[0].reset()
    return running[0]


@pytest.fixture
def proxy(running: tuple[Upstream, ServeProcess], upstream: Upstream) -> ServeProcess:
    return running[1]


@pytest.fixture
def client(proxy: ServeProcess) -> Iterator[httpx2.Client]:
    with httpx2.Client(
        base_url=proxy.url, timeout=30, headers={"authorization": f"Bearer {CLIENT_KEY}"}, verify=CLEAR
    ) as one:
        yield one


@pytest.fixture(scope="module")
def keyed() -> Iterator[ServeProcess]:
    """With tenants, with an administrator, and with room for one request at a time."""
    config = {
        "listen": {"max_in_flight": 1},
        "providers": {"mock": {"kind": "mock"}, "up": {"kind": "openai", "api_key": PROVIDER_KEY}},
        "tenants": [{"name": "acme", "keys": [TENANT_KEY]}],
        "admin": {"keys": [ADMIN_KEY]},
    }
    with serving(config) as process:
        yield process


def envelope(answer: httpx2.Response | Answer, status: int, code: str) -> dict[str, Any]:
    """The error object of an answer that must have this status and code, our form and our id."""
    body = answer.content if isinstance(answer, httpx2.Response) else answer.body
    assert (answer.status_code if isinstance(answer, httpx2.Response) else answer.status) == status, body
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) - {"breakwater"} == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error


def ask(proxy: ServeProcess, *lines: str, body: bytes = RAW, start: str = "POST /v1/chat/completions") -> Answer:
    """A request with exactly these header lines beside Host and Content-Length."""
    named = [] if any(line.lower().startswith("host:") for line in lines) else [f"Host: 127.0.0.1:{proxy.port}"]
    head = [f"{start} HTTP/1.1", *named, f"Content-Length: {len(body)}", *lines]
    with Wire(proxy.port) as wire:
        wire.send("\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body)
        return wire.answer()


# --- what the client gets -------------------------------------------------------------------------------------------


def test_a_harmless_request_id_is_kept(client: httpx2.Client) -> None:
    for name in ("a", "Req.1_2-3", "x" * 64):
        assert client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": name}).headers[
            "x-request-id"
        ] == (name)


@pytest.mark.parametrize("name", ["x" * 65, "a b", "a/b", 'a"b', "a{b}", "ü", "x" * 10_000])
def test_any_other_request_id_is_replaced(proxy: ServeProcess, name: str) -> None:
    answer = ask(proxy, f"X-Request-Id: {name}")
    assert answer.status == 200
    assert re.fullmatch(r"req_[0-9a-f]{24}", answer.headers["x-request-id"])


def test_a_trace_is_continued(client: httpx2.Client, upstream: Upstream) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    sent = f"00-{trace}-b7ad6b7169203331-00"
    answer = client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": sent})
    ours = answer.headers["traceparent"]
    assert re.fullmatch(rf"00-{trace}-[0-9a-f]{{16}}-00", ours)
    assert ours != sent
    assert upstream.last.header("traceparent") == [ours]
    for bad in ("", "00-zz", f"00-{'0' * 32}-b7ad6b7169203331-01", f"ff-{trace}-b7ad6b7169203331-01"):
        fresh = client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": bad}).headers["traceparent"]
        assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", fresh)
        assert trace not in fresh
        assert upstream.last.header("traceparent") == [fresh]


PROVIDERS_HEADERS = (
    "x-request-id: req_theirs",
    "openai-processing-ms: 7",
    "openai-version: 2020-10-01",
    "openai-organization: org-secret",
    "openai-project: proj-secret",
    "set-cookie: session=1",
    "server: theirs",
    "via: 1.1 theirs",
    "alt-svc: h3",
    "strict-transport-security: max-age=1",
    "access-control-allow-origin: *",
    "x-ratelimit-limit-requests: 10",
    "x-ratelimit-remaining-tokens: 5",
    "x-breakwater-provider: forged",
    "x-whatever: 1",
)
ALWAYS = {"date", "content-type", "x-request-id", "traceparent", "openai-processing-ms", "openai-version"} | {
    f"x-breakwater-{name}" for name in ("provider", "model", "attempts", "upstream-request-id")
}
THEIR_LIMITS = {"x-breakwater-upstream-ratelimit-limit-requests", "x-breakwater-upstream-ratelimit-remaining-tokens"}


def test_the_headers_of_a_plain_answer(client: httpx2.Client, upstream: Upstream) -> None:
    upstream.answer = http(REPLY, *PROVIDERS_HEADERS)
    answer = client.post("/v1/chat/completions", json=CHAT)
    headers = answer.headers
    assert set(headers) == ALWAYS | THEIR_LIMITS | {
        "content-length",
        "x-breakwater-usage-total",
        "x-breakwater-cost-usd",
    }
    assert len(headers.multi_items()) == len(set(headers))
    assert headers["x-breakwater-provider"] == "up"
    assert headers["x-breakwater-model"] == "any"
    assert headers["x-breakwater-attempts"] == "1"
    assert headers["x-breakwater-usage-total"] == "5"
    assert headers["x-breakwater-upstream-request-id"] == "req_theirs"
    assert headers["x-request-id"] != "req_theirs"
    assert headers["x-breakwater-upstream-ratelimit-limit-requests"] == "10"
    assert answer.content == REPLY


def test_the_headers_of_a_stream(client: httpx2.Client, upstream: Upstream) -> None:
    upstream.answer = sse(*STREAM, headers=PROVIDERS_HEADERS)
    headers = client.post("/v1/chat/completions", json={**CHAT, "stream": True}).headers
    own = {"cache-control", "x-accel-buffering", "transfer-encoding"}
    assert set(headers) == ALWAYS | THEIR_LIMITS | own
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"


def test_an_error_has_the_same_ids(client: httpx2.Client) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    sent = {"x-request-id": "mine", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    for method, path, status in (("POST", "/v1/chat/completions", 400), ("GET", "/nothing", 404), ("GET", "/v1", 404)):
        answer = client.request(method, path, headers=sent)
        assert answer.status_code == status
        assert answer.headers["x-request-id"] == "mine"
        assert answer.headers["traceparent"].startswith(f"00-{trace}-")


# --- what the provider gets -----------------------------------------------------------------------------------------

HOSTILE = (
    f"Authorization: Bearer {CLIENT_KEY}",
    "Cookie: session=1",
    "X-Forwarded-For: 10.0.0.1",
    "X-Real-IP: 10.0.0.1",
    "Forwarded: for=10.0.0.1",
    "OpenAI-Organization: org-mine",
    "OpenAI-Project: proj-mine",
    "X-Tenant: acme",
    "X-Breakwater-Tags: a",
    "Proxy-Authorization: Basic eDp5",
    "Keep-Alive: timeout=5",
    "TE: trailers",
    "Accept-Encoding: gzip, br",
    "User-Agent: mine/1",
    "Connection: Authorization, X-Api-Key, Content-Type, Traceparent",
    "Content-Type: application/json; charset=utf-16",
)
KEPT = ("OpenAI-Beta: responses=v1", "Idempotency-Key: once", "X-Client-Request-Id: c-1")
FIXED = {"host", "content-length", "content-type", "accept", "accept-encoding", "user-agent", "traceparent"}


def names_of(received: Received) -> list[str]:
    return sorted(line.partition(":")[0].lower() for line in received.head.decode("latin-1").split("\r\n")[1:-2])


def test_only_known_headers_reach_the_provider(proxy: ServeProcess, upstream: Upstream) -> None:
    assert ask(proxy, *HOSTILE, *KEPT).status == 200
    kept = {"openai-beta", "x-client-request-id"}
    assert names_of(upstream.last) == sorted(FIXED | kept | {"authorization", "openai-organization"})
    assert upstream.last.header("authorization") == [f"Bearer {PROVIDER_KEY}"]
    assert upstream.last.header("openai-organization") == ["org-ours"]
    assert upstream.last.header("content-type") == ["application/json"]
    assert upstream.last.header("accept-encoding") == ["identity"]
    assert CLIENT_KEY.encode() not in upstream.last.head


def test_a_pass_through_adds_what_describes_its_body(proxy: ServeProcess, upstream: Upstream) -> None:
    lines = [line for line in HOSTILE if not line.startswith("Content-Type")]
    more = ("Content-Type: multipart/form-data; boundary=b", "Accept: audio/*", "Range: bytes=0-1")
    body = bytes(range(256))
    answer = ask(proxy, *lines, *KEPT, *more, body=body, start="POST /v1/files/a%20b?x=%2F&y=1")
    assert answer.status == 200
    kept = {"openai-beta", "x-client-request-id", "range"}
    assert names_of(upstream.last) == sorted(FIXED | kept | {"authorization", "openai-organization"})
    assert upstream.last.header("content-type") == ["multipart/form-data; boundary=b"]
    assert upstream.last.head.startswith(b"POST /v1/files/a%20b?x=%2F&y=1 HTTP/1.1\r\n")
    assert upstream.last.body == body


def test_a_body_that_need_not_change_is_forwarded_byte_for_byte(proxy: ServeProcess, upstream: Upstream) -> None:
    odd = (
        '{ "messages" : [ {"role":"user", "content":"\\u00fc \\ud83d\\ude00 ✓ \\/ \\t"} ],\r\n\t"temperature":1.50e0,'
        ' "n":1, "x":{"b":1,"a":[ ],"b":2}, "model":"any", "seed":123456789012345678901234567890 %s}'
    )
    upstream.answer = lambda received: http(REPLY)
    for rest in ("", ', "stream":false'):
        body = (odd % rest).encode()
        assert ask(proxy, body=body).status == 200
        assert upstream.last.body == body
    upstream.answer = sse(DELTA, USAGE_CHUNK, b"[DONE]")
    body = (odd % ', "stream":true, "stream_options" : {"include_usage":true , "x":1}').encode()
    assert ask(proxy, body=body).body == b"".join(b"data: %b\n\n" % data for data in (DELTA, USAGE_CHUNK, b"[DONE]"))
    assert upstream.last.body == body


def members(body: bytes) -> dict[str, str]:
    """The top level of a body, each member as it is written."""
    found: dict[str, str] = {}
    text = body.decode()
    decoder = json.JSONDecoder()
    at = text.index("{") + 1
    while match := re.compile(r'[\s,]*("[^"]*")\s*:\s*').match(text, at):
        _, end = decoder.raw_decode(text, match.end())
        found[json.loads(match[1])] = text[match.end() : end]
        at = end
    return found


def test_else_only_what_must_change_changes(proxy: ServeProcess, upstream: Upstream) -> None:
    prompt = '[ {"role":"user",  "content":"\\u00fc \\/ ✓"} , {"role" : "user"} ]'
    body = f'{{ "messages" : {prompt}, "temperature": 1.50e0, "model" : "renamed", "metadata":{{ }} }}'.encode()
    assert ask(proxy, body=body).status == 200
    sent, got = members(body), members(upstream.last.body)
    assert got == {**sent, "model": '"real-name"'}
    assert got["messages"] == prompt
    upstream.answer = sse(DELTA, USAGE_CHUNK, b"[DONE]")
    for options in ("", ', "stream_options": {"include_usage": false, "x": [1]}', ', "stream_options": null'):
        body = f'{{"model":"any","stream":true,"messages":{prompt}{options}}}'.encode()
        answer = ask(proxy, body=body)
        assert answer.body == b"data: " + DELTA + b"\n\ndata: [DONE]\n\n"
        sent, got = members(body), members(upstream.last.body)
        wanted = json.loads(got.pop("stream_options"))
        assert wanted == {**(json.loads(sent.pop("stream_options", "null")) or {}), "include_usage": True}
        assert got == sent


def test_null_usage_is_cut_from_chunks_and_nothing_else(proxy: ServeProcess, upstream: Upstream) -> None:
    text = b'{"id":"c1", "choices":[{"delta":{"content":"say \\",\\"usage\\":null\\" ","usage":null}}]%b}'
    spaced = b'{"usage" : null , "id":"c1","choices":[{"delta":{"content":"\\u00fc"}}]}'
    upstream.answer = sse(text % b',"usage":null', text % b', "usage": null', spaced, USAGE_CHUNK, b"[DONE]")
    answer = ask(proxy, body=json.dumps({**CHAT, "stream": True}).encode())
    clean = b'{"id":"c1","choices":[{"delta":{"content":"\\u00fc"}}]}'
    assert answer.body == b"".join(b"data: %b\n\n" % data for data in (text % b"", text % b"", clean, b"[DONE]"))
    assert answer.headers["transfer-encoding"] == "chunked"


@pytest.mark.parametrize("status", [401, 402, 403])
def test_the_caller_s_own_key_is_passed_on(client: httpx2.Client, upstream: Upstream, status: int) -> None:
    chat = {**CHAT, "model": "callers/any"}
    assert client.post("/v1/chat/completions", json=chat).status_code == 200
    assert upstream.last.header("authorization") == [f"Bearer {CLIENT_KEY}"]
    assert upstream.last.header("openai-organization") == []
    headers = {"OpenAI-Organization": "org-mine", "OpenAI-Project": "proj-mine"}
    client.post("/v1/chat/completions", json=chat, headers=headers)
    assert upstream.last.header("openai-organization") == ["org-mine"]
    assert upstream.last.header("openai-project") == ["proj-mine"]
    theirs = b'{"error": {"message": "No.", "type": "x", "param": null, "code": "theirs"}}'
    upstream.answer = http(theirs, status=f"{status} No")
    for stream in (False, True):
        answer = client.post("/v1/chat/completions", json={**chat, "stream": stream})
        assert (answer.status_code, answer.content) == (status, theirs)
    assert envelope(client.post("/v1/chat/completions", json=CHAT), 503, "upstream_unavailable")


def test_a_caller_without_a_key_has_none_passed_on(proxy: ServeProcess, upstream: Upstream) -> None:
    body = json.dumps({**CHAT, "model": "callers/any"}).encode()
    assert ask(proxy, body=body).status == 200
    assert upstream.last.header("authorization") == []
    for name in ("Api-Key", "X-Api-Key"):
        ask(proxy, f"{name}: {CLIENT_KEY}", body=body)
        assert upstream.last.header("authorization") == [f"Bearer {CLIENT_KEY}"]
        assert upstream.last.header(name.lower()) == []


# --- doors ----------------------------------------------------------------------------------------------------------

PAGES = (
    ("Origin: https://evil.example",),
    ("Origin: null",),
    ("Origin: http://127.0.0.1:8080",),
    ("Sec-Fetch-Site: cross-site",),
    ("Sec-Fetch-Site: same-site",),
    ("Host: evil.example",),
    ("Host: 127.0.0.1.evil.example",),
    ("Host: 10.0.0.1:80",),
)


@pytest.mark.parametrize("lines", PAGES, ids=lambda lines: lines[0])
def test_pages_of_a_browser_are_refused(proxy: ServeProcess, upstream: Upstream, lines: tuple[str, ...]) -> None:
    before = len(upstream.requests)
    for start in ("POST /v1/chat/completions", "OPTIONS /v1/chat/completions", "GET /v1/models", "GET /metrics"):
        error = envelope(ask(proxy, *lines, start=start), 403, "origin_not_allowed")
        assert error["type"] == "invalid_request_error"
    assert len(upstream.requests) == before


def test_programs_on_this_machine_are_not(proxy: ServeProcess) -> None:
    for line in ("Sec-Fetch-Site: none", "Host: localhost", f"Host: [::1]:{proxy.port}", "Host: 127.9.9.9"):
        assert ask(proxy, line).status == 200


def test_methods(client: httpx2.Client, upstream: Upstream) -> None:
    for path in ("chat/completions", "completions", "embeddings", "responses"):
        for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"):
            answer = client.request(method, f"/v1/{path}")
            assert answer.status_code == 405
            assert answer.headers["allow"] == "POST"
            if method != "HEAD":
                envelope(answer, 405, "method_not_allowed")
    assert client.options("/v1/models").headers["allow"] == "GET, HEAD"
    assert client.options("/v1/files").headers["allow"] == "GET, HEAD, POST, PUT, PATCH, DELETE"
    upstream.answer = http(b'{"object":"list","data":[{"id":"m"}]}')
    listed = client.get("/v1/models")
    assert {model["id"] for model in listed.json()["data"]} == {"m", "callers/m", "renamed"}
    assert listed.headers["x-breakwater-warnings"] == "models of nobody not listed"
    head = client.head("/v1/models")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == listed.headers["content-length"]


def test_a_head_passes_through(client: httpx2.Client, upstream: Upstream) -> None:
    upstream.answer = http(b"", content_type="audio/mpeg", length=1234)
    answer = client.head("/v1/files/f/content")
    assert upstream.last.head.startswith(b"HEAD /v1/files/f/content ")
    assert (answer.status_code, answer.headers["content-length"]) == (200, "1234")
    assert client.head("/v1/files/f/content").status_code == 200  # the connection is still good


def test_health_and_metrics(client: httpx2.Client, proxy: ServeProcess) -> None:
    for path in ("/livez", "/readyz"):
        assert client.get(path).text == "ok"
        assert ask(proxy, "Origin: https://a.example", "Host: probe", start=f"GET {path}").body == b"ok"
        assert client.head(path).content == b""
        assert envelope(client.post(path), 405, "method_not_allowed")
    client.post("/v1/chat/completions", json=CHAT)
    page = client.get("/metrics")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/plain; version=")
    assert re.search(r'^breakwater_requests_total\{(?=[^}]*model="\*")(?=[^}]*provider="up").*\} \d', page.text, re.M)


def test_what_is_not_there(client: httpx2.Client, keyed: ServeProcess) -> None:
    for path in ("/", "/v1", "/favicon.ico", "/admin", "/admin/", "/admin/status", "/dashboard", "/docs", "/v2/models"):
        envelope(client.get(path), 404, "unknown_url")
        envelope(client.post(path), 404, "unknown_url")
    head = {"authorization": f"Bearer {TENANT_KEY}"}
    answer = httpx2.get(f"{keyed.url}/v1/audio/speech", headers=head, verify=CLEAR)
    assert envelope(answer, 404, "unsupported_route")["type"] == "invalid_request_error"


def test_a_percent_encoded_prefix_is_the_same_path(client: httpx2.Client, upstream: Upstream) -> None:
    assert client.get("/%761/files/x").status_code == 200
    assert upstream.last.head.startswith(b"GET /v1/files/x HTTP/1.1\r\n")
    assert client.get("/files/x").status_code == 200
    assert upstream.last.head.startswith(b"GET /v1/files/x HTTP/1.1\r\n")


def test_administration(keyed: ServeProcess) -> None:
    with httpx2.Client(base_url=keyed.url, timeout=30, verify=CLEAR) as client:
        for path in ("/admin", "/admin/status", "/admin/config", "/admin/nothing", "/admin/openapi.json"):
            bodies = {
                client.get(path, headers=headers).content
                for headers in ({}, {"authorization": f"Bearer {TENANT_KEY}"}, {"x-api-key": ADMIN_KEY + "x"})
                if envelope(client.get(path, headers=headers), 401, "invalid_api_key")
            }
            assert len(bodies) == 1
        client.headers["authorization"] = f"Bearer {ADMIN_KEY}"
        status = client.get("/admin/status").json()
        assert status["in_flight"] == 0
        assert status["version"]
        page = client.get("/admin/config")
        assert page.status_code == 200
        for secret in (PROVIDER_KEY, TENANT_KEY, ADMIN_KEY):
            assert secret not in page.text
        assert page.json()["config"]["listen"]["max_in_flight"] == 1
        envelope(client.get("/admin/nothing"), 404, "unknown_url")
        envelope(client.post("/admin/status"), 405, "method_not_allowed")
        assert client.get("/admin/config/").status_code == 404
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 401  # an administrator is no tenant


def test_too_many_in_flight(keyed: ServeProcess) -> None:
    key = {"authorization": f"Bearer {TENANT_KEY}"}
    with httpx2.Client(base_url=keyed.url, timeout=30, headers=key, verify=CLEAR) as client:
        lasting = {**CHAT, "model": "bench-4000-20", "stream": True}  # 4000 tokens, 20 a second
        with client.stream("POST", "/v1/chat/completions", json=lasting) as one:
            assert one.status_code == 200
            for path in ("/v1/chat/completions", "/v1/models", "/v1/files"):
                refused = client.post(path, json=CHAT)
                error = envelope(refused, 503, "overloaded")
                assert error["type"] == "server_error"
                assert refused.headers["retry-after"] == "1"
            assert client.get("/livez").text == "ok"
        eventually(lambda: client.post("/v1/chat/completions", json=CHAT).status_code == 200)


# --- streams --------------------------------------------------------------------------------------------------------


def trailer_of(body: bytes) -> tuple[list[bytes], dict[str, Any], list[bytes]]:
    """(events before the comment, what it says, events after it)."""
    events = body.split(b"\n\n")[:-1]
    (at,) = [number for number, event in enumerate(events) if event.startswith(b": breakwater ")]
    return events[:at], json.loads(events[at].removeprefix(b": breakwater ")), events[at + 1 :]


def test_the_trailer_comes_before_the_terminator(client: httpx2.Client, upstream: Upstream) -> None:
    asked = {"x-breakwater-trailer": "1", "x-request-id": "mine"}
    facts = {"request_id": "mine", "provider": "up", "model": "any", "usage_total": 5, "cost_usd": "unknown"}
    chat = {**CHAT, "stream": True}
    upstream.answer = sse(DELTA, USAGE_CHUNK, b"[DONE]")
    before, said, after = trailer_of(client.post("/v1/chat/completions", json=chat, headers=asked).content)
    assert (before, after) == ([b"data: " + DELTA], [b"data: [DONE]"])
    assert said == facts
    assert b": breakwater" not in client.post("/v1/chat/completions", json=chat).content
    upstream.answer = http(REPLY)  # the provider does not stream
    before, said, after = trailer_of(client.post("/v1/chat/completions", json=chat, headers=asked).content)
    assert (len(before), after, said) == (1, [b"data: [DONE]"], facts)
    done = {"id": "r", "object": "response", "status": "completed", "output": [], "usage": {"input_tokens": 5}}
    upstream.answer = http(json.dumps(done).encode())
    response = {"model": "any", "input": "hi", "stream": True}
    before, said, after = trailer_of(client.post("/v1/responses", json=response, headers=asked).content)
    assert said == facts
    assert (len(before), len(after)) == (1, 1)
    assert after[0].startswith(b"event: response.completed\n")


def test_no_trailer_after_a_broken_stream(client: httpx2.Client, upstream: Upstream) -> None:
    upstream.answer = sse(DELTA)
    chat = {**CHAT, "stream": True}
    body = client.post("/v1/chat/completions", json=chat, headers={"x-breakwater-trailer": "1"}).content
    events = body.split(b"\n\n")
    assert events[0] == b"data: " + DELTA
    assert json.loads(events[1].removeprefix(b"data: "))["error"]["code"] == "stream_interrupted"
    assert events[2:] == [b""]


# --- answers of all kinds -------------------------------------------------------------------------------------------


def test_a_compressed_answer_is_unpacked(client: httpx2.Client, upstream: Upstream) -> None:
    upstream.answer = http(gzip.compress(REPLY), "content-encoding: gzip")
    answer = client.post("/v1/chat/completions", json=CHAT)
    assert answer.content == REPLY
    assert "content-encoding" not in answer.headers
    refusal = b'{"error": {"message": "No.", "type": "x", "param": null, "code": "theirs"}}'
    upstream.answer = http(gzip.compress(refusal), "content-encoding: gzip", status="422 No")
    answer = client.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.content) == (422, refusal)
    packed = gzip.compress(b"sound" * 100)
    upstream.answer = http(packed, "content-encoding: gzip", content_type="audio/mpeg")
    with client.stream("POST", "/v1/audio/speech", json={}) as raw:
        assert b"".join(raw.iter_raw()) == packed  # a pass-through is not touched
        assert raw.headers["content-encoding"] == "gzip"


BROKEN = {
    "damaged gzip": http(gzip.compress(REPLY)[:-9], "content-encoding: gzip"),
    "unknown encoding": http(REPLY, "content-encoding: zstd"),
    "html": http(b"<html>Bad gateway</html>", content_type="text/html"),
    "empty": http(b""),
    "array": http(b"[1]"),
    "half": http(REPLY[: len(REPLY) // 2]),
    "not utf-8 in an error": http(b'{"error": {"message": "\xff"}}'),
    "error": http(b'{"error": {"message": "sorry", "code": 502}}'),
    "error text": http(b'{"error": "sorry"}', content_type="text/plain"),
    "redirect": http(b"", "location: http://127.0.0.1:1/", status="302 Found"),
    "nothing": http(b"", status="204 No Content"),
    "switching": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
    "no http": b"SSH-2.0-OpenSSH\r\n\r\n",
    "a stream": sse(*STREAM),
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize(
    ("path", "ask_for"),
    [("chat/completions", CHAT), ("embeddings", {"model": "any", "input": "a", "encoding_format": "base64"})],
    ids=["chat", "embeddings"],
)
def test_what_is_no_answer_is_our_error(
    client: httpx2.Client, upstream: Upstream, answer: bytes, path: str, ask_for: dict[str, Any]
) -> None:
    async def play(peer: Peer, received: Received) -> None:
        await peer.send(answer)
        peer.fin()

    upstream.play = play
    error = envelope(client.post(f"/v1/{path}", json=ask_for), 503, "upstream_unavailable")
    assert error["type"] == "upstream_error"
    assert [attempt["target"] for attempt in error["breakwater"]["attempts"]] == ["up/any"]
    if answer is not BROKEN["a stream"]:
        streamed = {**CHAT, "stream": True}
        assert envelope(client.post("/v1/chat/completions", json=streamed), 503, "upstream_unavailable")


@pytest.mark.parametrize("vector", [b'["a"]', b"[1e999]", b'[1], "x": "\xff"', b'"AAAA"', b"[[1]]", b"null", b"[1e39]"])
def test_vectors_that_cannot_be_packed_pass_as_they_are(
    client: httpx2.Client, upstream: Upstream, vector: bytes
) -> None:
    reply = b'{"object": "list", "data": [{"embedding": %b}]}' % vector
    upstream.answer = http(reply)
    asked = {"model": "any", "input": "a", "encoding_format": "base64"}
    answer = client.post("/v1/embeddings", json=asked)
    assert (answer.status_code, answer.content) == (200, reply)


@pytest.mark.parametrize("kind", ["text/plain", "text/html; charset=utf-8", "application/octet-stream", ""])
def test_json_is_called_json(client: httpx2.Client, upstream: Upstream, kind: str) -> None:
    upstream.answer = http(REPLY, content_type=kind)
    answer = client.post("/v1/chat/completions", json=CHAT)
    assert answer.content == REPLY
    assert answer.headers["content-type"] == "application/json"  # by it the official client decides what to read


def test_a_list_of_models_that_is_none(client: httpx2.Client, upstream: Upstream) -> None:
    for body in (b'{"data": 1}', b'{"data": [1, {"x": 2}, {"id": 3}]}', b'{"data": [{"id": "\xff"}]}', b"[]", b"{}"):
        upstream.answer = http(body)
        listed = client.get("/v1/models")
        ids = [model["id"] for model in listed.json()["data"]]
        assert listed.status_code == 200
        assert "renamed" in ids  # the exact names are there all the same
        assert not any(name.startswith("callers/") for name in ids)  # of the provider that is asked each time
        one = client.get("/v1/models/callers/x")
        if b"\xff" in body or body == b"[]":
            envelope(one, 503, "upstream_unavailable")
        else:
            envelope(one, 404, "model_not_found")


@pytest.mark.parametrize("stream", [False, True])
def test_nobody_is_there(client: httpx2.Client, stream: bool) -> None:
    answer = client.post("/v1/chat/completions", json={**CHAT, "model": "nobody/any", "stream": stream})
    error = envelope(answer, 503, "upstream_unavailable")
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-breakwater-provider"] == "nobody"
    (attempt,) = error["breakwater"]["attempts"]
    assert (attempt["target"], attempt["reason"], attempt["status"]) == ("nobody/any", "refused", None)


# --- pass-through of what is large ----------------------------------------------------------------------------------

BLOCK = bytes(range(256)) * 4096  # 1 MiB
BLOCKS = 24


def peak_bytes(process: ServeProcess) -> int:
    """The most memory that the process has had at once."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_a_large_answer_is_not_held(
    client: httpx2.Client, proxy: ServeProcess, upstream: Upstream, framing: str
) -> None:
    sent = 0
    gone: list[int] = []

    async def play(peer: Peer, received: Received) -> None:
        nonlocal sent
        sent = 0
        size = {"length": f"content-length: {len(BLOCK) * BLOCKS}\r\n", "chunked": "transfer-encoding: chunked\r\n"}
        await peer.send(f"HTTP/1.1 200 OK\r\ncontent-type: audio/wav\r\n{size.get(framing, '')}\r\n".encode())
        for _ in range(BLOCKS):
            await peer.send(b"%x\r\n%b\r\n" % (len(BLOCK), BLOCK) if framing == "chunked" else BLOCK)
            sent += 1
        if framing == "chunked":
            await peer.send(b"0\r\n\r\n")
        if framing == "close":
            peer.fin()
        gone.append(sent)

    client.post("/v1/audio/speech", json={})
    upstream.play = play
    before = peak_bytes(proxy)
    digest = hashlib.sha256()
    with client.stream("POST", "/v1/audio/speech", json={"input": "x"}) as answer:
        assert answer.headers.get("content-length") == (str(len(BLOCK) * BLOCKS) if framing == "length" else None)
        pieces = answer.iter_raw()
        digest.update(next(pieces))
        assert stands_still(lambda: sent) < BLOCKS  # who does not read stops the provider
        for piece in pieces:
            digest.update(piece)
    assert digest.digest() == hashlib.sha256(BLOCK * BLOCKS).digest()
    assert gone == [BLOCKS]
    assert peak_bytes(proxy) - before < 8 * 1024 * 1024


def stands_still(value: Callable[[], int]) -> int:
    """The value, once it has not changed for a while."""
    seen, times = value(), 0

    def still() -> bool:
        nonlocal seen, times
        now = value()
        times = times + 1 if now == seen else 0
        seen = now
        return times > 60

    eventually(still)
    return seen


@pytest.mark.parametrize("framing", ["content-length: 1000", "transfer-encoding: chunked"])
@pytest.mark.parametrize("by", ["fin", "reset"])
def test_a_cut_reaches_the_client_as_a_cut(client: httpx2.Client, upstream: Upstream, framing: str, by: str) -> None:
    body = b"x" * 500

    async def play(peer: Peer, received: Received) -> None:
        piece = body if "length" in framing else b"%x\r\n%b\r\n" % (len(body), body)
        await peer.send(f"HTTP/1.1 200 OK\r\ncontent-type: audio/wav\r\n{framing}\r\n\r\n".encode() + piece)
        while peer.writer.transport.get_write_buffer_size():
            await asyncio.sleep(0.001)
        await taken.wait()  # a reset would take back what has not been read
        getattr(peer, by)()

    taken = asyncio.Event()
    loop: list[asyncio.AbstractEventLoop] = []

    async def noting(peer: Peer, received: Received) -> None:
        loop.append(asyncio.get_running_loop())
        await play(peer, received)

    upstream.play = noting
    got = b""
    with client.stream("GET", "/v1/files/f/content") as answer:
        assert answer.status_code == 200
        pieces = answer.iter_raw()
        while len(got) < len(body):
            got += next(pieces)
        loop[0].call_soon_threadsafe(taken.set)
        with pytest.raises(httpx2.TransportError):
            next(pieces)
    assert got == body
    envelope(client.get("/nothing"), 404, "unknown_url")


def test_answering_helpers_are_what_they_say() -> None:
    """The scripts of these tests are themselves HTTP: a wrong one would test nothing."""
    with scripted(answering(lambda received: http(received.body))) as server:
        assert httpx2.post(f"{base_url(server)}/x", content=b"abc", verify=CLEAR).content == b"abc"
    with scripted(answering(lambda received: sse(*STREAM))) as server:
        assert httpx2.get(f"{base_url(server)}/x", verify=CLEAR).text.count("\n\n") == len(STREAM)
