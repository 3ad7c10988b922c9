"""Canaries on every path: no key of the configuration, no credential of a client, and no text of a failed exchange
comes out in a log line, in the metrics or in the body of an error.

A secret counts as leaked when eight of its characters in a row can be read, raw or through any depth of URL and JSON
escapes, or when its base64 can, at any alignment.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import pytest

from tests.e2e.stack import ALONE, ServeProcess, serving
from tests.e2e.upstreams import base_url, http, scripted
from tests.edge.raw import Answer, Wire, eventually
from tests.observability.canaries import leaks
from tests.transport.servers import Peer, Server, refusing

FAULTY = (sys.executable, "-m", "tests.e2e.faulty")


def made(prefix: str = "", length: int = 32) -> str:
    """A secret of no known form, unless the prefix gives it one."""
    return prefix + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(length))


CONFIGURED = {
    "provider key": made("sk-proj-", 48),
    "provider key of no form": made('q/+=%"\\&'),
    "egress password": made(),
    "tenant key": made(),
    "tenant key of ours": made("bw-"),
    "admin key": made(),
}
CLIENTS = {
    "authorization": made(),
    "api key header": made(),
    "cookie": made(),
    "query": made(),
    "path": made(),
    "body": made(),
    "message": made(),
    "tool arguments": made(),
    "request id": made("sk-", 40),
    "run id": made("sk-", 40),
    "trace": made(),
    "header name": made().lower(),
}
THEIRS = {"their words": made(), "their content": made(), "their header": made()}
SECRETS = {**CONFIGURED, **CLIENTS, **THEIRS}
PATH = f"/v1/files/{CLIENTS['path']}"
QUERY = f"?api_key={CLIENTS['query']}"


def base64_cores(secret: str) -> Iterator[str]:
    """What base64 makes of the secret wherever it stands in a longer text, without the digits that its neighbours
    have a part in."""
    for shift in range(3):
        raw = b"\0" * shift + secret.encode()
        raw = raw[: len(raw) // 3 * 3]
        for encoded in (base64.b64encode(raw), base64.urlsafe_b64encode(raw)):
            yield encoded.decode()[4 if shift else 0 :]


def found(output: str) -> list[str]:
    """The names of the secrets that can be read in `output`."""
    return [
        name
        for name, secret in SECRETS.items()
        if leaks(secret, output) or any(core in output for core in base64_cores(secret))
    ]


def written(secret: str) -> str:
    """A secret in every way in which a provider might quote it, as the inside of a JSON text."""
    ways = [secret, quote(secret, safe=""), "".join(f"%{byte:02X}" for byte in secret.encode())]
    ways += [base64.b64encode(b"user:" + secret.encode()).decode(), json.dumps(secret), json.dumps(json.dumps(secret))]
    return json.dumps(" ".join(ways))[1:-1] + "".join(f"\\u{ord(c):04x}" for c in secret)


# --- the provider ---------------------------------------------------------------------------------------------------


def error_body(text: str) -> bytes:
    return b'{"error": {"message": "%b", "type": "x", "param": null, "code": "y"}}' % text.encode()


KEYS = " ".join(written(CONFIGURED[name]) for name in ("provider key", "provider key of no form"))
QUOTING = f"{KEYS} {THEIRS['their words']}"
HEADERS = (
    "connection: close",  # each answer ends its connection, and a provider that does not say so is raced
    f"x-debug: {THEIRS['their header']}",
    "set-cookie: k=" + CONFIGURED["provider key"],
)
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": THEIRS["their content"]}}
SUCCESS = json.dumps(
    {
        "id": "c1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "tool_calls": [CALL]}, "finish_reason": "stop"}],
    }
).encode()
DELTA = b"data: " + json.dumps({"id": "c1", "choices": [{"index": 0, "delta": {"content": "hi"}}]}).encode() + b"\n\n"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"  # delimited by its close


async def provider(peer: Peer) -> None:
    """Does what the name of the model says."""
    while True:
        received = await peer.request()
        try:
            body = json.loads(received.body or b"{}")
        except ValueError:
            body = {}
        name, stream = str(body.get("model", "ok")), body.get("stream") is True
        if name.isdigit():
            # What a refusal says reaches the client; what a failure says does not.
            text = KEYS if name in ("400", "422") else QUOTING
            await peer.send(http(error_body(text), *HEADERS, status=f"{name} No"))
        elif name == "stall":
            await peer.send(STREAM + DELTA if stream else b"")
            await peer.gone()
        elif name == "garbage":
            await peer.send(
                STREAM + DELTA + b"data: " + QUOTING.encode() + b"\n\n"
                if stream
                else b"HTTP/9 " + QUOTING.encode() + b"\r\n\r\n"
            )
        elif name == "cut":
            await peer.send(STREAM + DELTA if stream else http(SUCCESS[:50], length=500))
        elif name == "event":
            await peer.send(STREAM + b"data: " + error_body(QUOTING) + b"\n\n")
        elif name == "event-late":
            await peer.send(STREAM + DELTA + b"data: " + error_body(KEYS) + b"\n\n")
        elif not received.body:
            await peer.send(http(b'{"object": "list", "data": [{"id": "ok"}]}', *HEADERS))
        elif stream:
            await peer.send(STREAM + DELTA + b"data: [DONE]\n\n")
        else:
            await peer.send(http(SUCCESS, *HEADERS))
        peer.fin()
        return


# --- the scene ------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """A process, and the bodies of all the errors that it has answered with."""

    process: ServeProcess
    credentials: tuple[str, ...]
    errors: list[str] = field(default_factory=list)

    def send(self, head: str, *lines: str, body: bytes = b"", host: str = "Host: localhost") -> Answer:
        """One request with all the canaries that a client can have."""
        named = [f"{head} HTTP/1.1", *([host] if host else []), f"Content-Length: {len(body)}", *self.credentials]
        named += [
            f"Cookie: session={CLIENTS['cookie']}",
            f"X-Request-Id: {CLIENTS['request id']}",
            f"X-Breakwater-Run-Id: {CLIENTS['run id']}",
            f"Traceparent: 00-{CLIENTS['trace']}-01",
            f"X-{CLIENTS['header name']}: 1",
            *lines,
        ]
        with Wire(self.process.port) as wire:
            if wire.offer("\r\n".join(named).encode() + b"\r\n\r\n"):
                wire.offer(body)
            answer = wire.answer()
        if answer.status >= 400 or b'"error"' in answer.body:
            self.errors.append(answer.body.decode())
        return answer

    def chat(self, model: str, *lines: str, **more: Any) -> Answer:
        return self.send(f"POST /v1/chat/completions{QUERY}", *lines, body=conversation(model, **more))

    def code(self, answer: Answer) -> str:
        """Of the error in a plain answer, or of the one that ends a stream."""
        text = answer.body.decode()
        if "text/event-stream" in answer.headers.get("content-type", ""):
            text = text.rstrip().rpartition("data: ")[2]
        return str(json.loads(text)["error"]["code"])


def conversation(model: str, **more: Any) -> bytes:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": CLIENTS["tool arguments"]}}
    messages = [
        {"role": "user", "content": CLIENTS["message"]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": CLIENTS["message"]},
    ]
    return json.dumps({"model": model, "messages": messages, "user": CLIENTS["body"], **more}).encode()


@pytest.fixture(scope="module")
def upstream() -> Iterator[Server]:
    with scripted(provider) as server:
        yield server


@contextlib.contextmanager
def scene(upstream: Server, *credentials: str, **config: Any) -> Iterator[Scene]:
    to_it = {"kind": "openai", "base_url": base_url(upstream)}
    nowhere = {"kind": "openai", "api_key": CONFIGURED["provider key"]}
    impatient = {"timeouts": {"connect_ms": 400, "total_ms": 400, "idle_ms": 400}}
    closed = f"127.0.0.1:{refusing().port}"
    password = f"http://user:{CONFIGURED['egress password']}@{closed}"
    providers = {
        "up": {**to_it, "api_key": CONFIGURED["provider key"]},
        "formless": {**to_it, "api_key": CONFIGURED["provider key of no form"]},
        "quick": {**to_it, "api_key": CONFIGURED["provider key"], **impatient},
        "h2": {**to_it, "api_key": CONFIGURED["provider key"], "transport": "httpx"},
        "refused": {**nowhere, "base_url": f"http://{closed}/v1"},
        "unknown": {**nowhere, "base_url": "https://no-such-host.invalid/v1"},
        "tls": {**nowhere, **impatient, "base_url": f"https://127.0.0.1:{upstream.port}/v1"},
        "egress": {**nowhere, "base_url": "https://192.0.2.1/v1", "transport": "httpx", "egress_proxy": password},
    }
    models = [{"name": "*", "targets": ["up/*"]}]
    models += [{"name": f"{name}/*", "targets": [f"{name}/*"]} for name in providers]
    listen = {"max_body_bytes": 100_000, "drain_ms": 0, "grace_ms": 100}
    full = {"listen": listen, "providers": providers, "models": models, "admin": {"keys": [CONFIGURED["admin key"]]}}
    with serving({**ALONE, **full, **config}, program=FAULTY) as process:
        one = Scene(process, credentials)
        yield one
        metrics = one.send("GET /metrics")
        assert metrics.status == 200
        stop_with_a_stream_under_way(one)
        log = process.text()
        assert found(log) == [], context(log)
        assert found(metrics.body.decode()) == []
        for error in one.errors:
            assert found(error) == [], error
        assert len(one.errors) > 3


def stop_with_a_stream_under_way(one: Scene) -> None:
    body = conversation("stall", stream=True)
    with Wire(one.process.port) as wire:
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        wire.send("\r\n".join([*lines, *one.credentials]).encode() + b"\r\n\r\n" + body)
        wire.until(DELTA)
        assert one.process.stop() == 0
        one.errors.append(wire.rest().decode())


def context(log: str) -> list[str]:
    return [line for line in log.splitlines() if found(line)]


def keyless(upstream: Server) -> Any:
    return scene(upstream, f"Authorization: Bearer {CLIENTS['authorization']}")


# --- the paths ------------------------------------------------------------------------------------------------------

FAILURES = {
    "400": (400, "y"),
    "422": (422, "y"),
    "401": (503, "upstream_unavailable"),
    "403": (503, "upstream_unavailable"),
    "429": (429, "upstream_rate_limited"),
    "500": (503, "upstream_unavailable"),
    "504": (504, "upstream_timeout"),
    "301": (503, "upstream_unavailable"),
    "formless/400": (400, "y"),
    "formless/500": (503, "upstream_unavailable"),
    "h2/400": (400, "y"),
    "h2/500": (503, "upstream_unavailable"),
    "refused/x": (503, "upstream_unavailable"),
    "unknown/x": (503, "upstream_unavailable"),
    "tls/x": (503, "upstream_unavailable"),
    "egress/x": (503, "upstream_unavailable"),
    "event": (503, "upstream_unavailable"),
    "fault": (500, "internal_error"),
}
"""The same for a stream: nothing was forwarded yet."""
PLAIN = {
    "quick/stall": (504, "upstream_timeout"),
    "cut": (503, "upstream_unavailable"),
    "garbage": (503, "upstream_unavailable"),
    "h2/cut": (503, "upstream_unavailable"),
    "h2/garbage": (503, "upstream_unavailable"),
}
STREAMED = {
    "quick/stall": "stream_interrupted",
    "cut": "stream_interrupted",
    "garbage": "stream_interrupted",
    "h2/garbage": "stream_interrupted",
    "event-late": "y",
    "formless/event-late": "y",
    "fault-late": "internal_error",
}


def test_what_goes_wrong_upstream(upstream: Server) -> None:
    with keyless(upstream) as one:
        for stream in (False, True):
            for model, expected in FAILURES.items():
                answer = one.chat(model, stream=stream)
                assert (answer.status, one.code(answer)) == expected, model
        for model, expected in PLAIN.items():
            answer = one.chat(model)
            assert (answer.status, one.code(answer)) == expected, model
        for model, code in STREAMED.items():
            answer = one.chat(model, stream=True)
            assert (answer.status, one.code(answer)) == (200, code), (model, answer.body)
        faults = one.process.wait_for("internal.error", 3)
        assert all("RuntimeError" in line["traceback"] for line in faults)


def test_what_goes_well(upstream: Server) -> None:
    with keyless(upstream) as one:
        for stream in (False, True):
            assert one.chat("ok", stream=stream).status == 200
            assert one.chat("fault-task", stream=stream).status == 200
            assert one.chat("fault-log", stream=stream).status == 200
        assert one.send(f"GET {PATH}{QUERY}").status == 200
        assert one.send(f"POST {PATH}{QUERY}", body=CLIENTS["body"].encode()).status == 200
        assert one.send(f"GET /v1/models{QUERY}").status == 200
        eventually(lambda: one.process.text().count("it failed") >= 4)
        eventually(lambda: "never retrieved" in one.process.text())
        hang_up(one)
        refused_by_us(one)


def hang_up(one: Scene) -> None:
    body = conversation("ok", stream=True)
    with Wire(one.process.port) as wire:
        head = f"POST /v1/chat/completions{QUERY} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        wire.send(head.encode() + body[:-1])
        wire.reset()
    with Wire(one.process.port) as wire:
        body = conversation("stall", stream=True)
        head = f"POST /v1/chat/completions{QUERY} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        wire.send(head.encode() + body)
        wire.until(DELTA)
        wire.reset()
    eventually(lambda: any(line.get("status") == 499 for line in one.process.lines()))


def refused_by_us(one: Scene) -> None:
    """By the pipeline, and by the guard in front of it."""
    chat = f"POST /v1/chat/completions{QUERY}"
    secret = CLIENTS["path"]
    bodies = [
        b"{" + CLIENTS["body"].encode(),
        json.dumps({CLIENTS["body"]: 1}).encode(),
        b'{"model":"ok","messages":[],"%b":1,"%b":2 }' % (CLIENTS["body"].encode(), CLIENTS["body"].encode()),
        json.dumps({"model": "ok", "messages": CLIENTS["body"]}).encode(),
        json.dumps({"model": "ok", "messages": [], "stream": CLIENTS["body"]}).encode(),
        json.dumps({"model": "ok", "messages": [], "max_tokens": CLIENTS["body"]}).encode(),
        json.dumps({"model": [CLIENTS["body"]], "messages": []}).encode(),
        json.dumps({"model": "ok", "messages": []}).encode() + b" " + CLIENTS["body"].encode(),
    ]
    for body in bodies:
        assert one.send(chat, body=body).status == 400, body
    cases = [
        (404, one.send(f"GET /{secret}{QUERY}")),
        (503, one.send(f"GET /v1/models/refused%2F{secret}")),
        (404, one.send(f"GET /v1/models/{secret}")),
        (405, one.send(f"PURGE {PATH}")),
        (405, one.send(f"GET /v1/chat/completions{QUERY}")),
        (400, one.send(f"GET {PATH}%2e%2e/{secret}")),
        (400, one.send(f"GET {PATH}//{secret}")),
        (400, one.send(f"GET {PATH}/%00")),
        (400, one.send(f"GET {PATH}/%zz")),
        (400, one.send(f"GET http://{secret}/v1/models")),
        (400, one.send(chat, host="")),
        (400, one.send(chat, f"Host: {secret}")),
        (400, one.send(chat, f"Content-Length: {secret}")),
        (400, one.send(chat, f"Transfer-Encoding: {secret}")),
        (400, one.send(chat, f"Upgrade: {secret}")),
        (400, one.send(chat, f"Content-Encoding: {secret}", body=b"{}")),
        (400, one.send(chat, f"X-A: {secret * 2000}")),
        (400, one.send(f"GET {PATH}?{secret * 400}")),
        (403, one.send(chat, f"Origin: https://{secret}.example")),
        (403, one.send(chat, host=f"Host: {secret}.example")),
        (403, one.send("GET /metrics", host=f"Host: {secret}.example")),
        (413, one.send(chat, body=CLIENTS["body"].encode() * 5000)),
        (401, one.send(f"GET /admin/{secret}{QUERY}")),
    ]
    for expected, answer in cases:
        assert answer.status == expected, (expected, answer.status, answer.body)


def test_with_tenants(upstream: Server) -> None:
    tenants = [
        {
            "name": "acme",
            "keys": [CONFIGURED["tenant key"], CONFIGURED["tenant key of ours"]],
            "models": ["4*", "stall"],
        }
    ]
    secret = CLIENTS["path"]
    with scene(upstream, tenants=tenants) as one:
        wrong = [
            (),
            (f"Authorization: Bearer {CLIENTS['authorization']}",),
            (f"X-Api-Key: {CLIENTS['api key header']}",),
        ]
        wrong += [(f"Authorization: Basic {CLIENTS['authorization']}",), (f"Api-Key: {CONFIGURED['tenant key'][:-1]}",)]
        for lines in wrong:
            assert one.chat("400", *lines).status == 401
            assert one.send(f"GET {PATH}", *lines).status == 401
            assert one.send("GET /admin/config", *lines).status == 401
        for name in ("tenant key", "tenant key of ours"):
            one.credentials = (f"Authorization: Bearer {CONFIGURED[name]}",)
            assert one.chat("400").status == 400
            assert one.chat("401").status == 503
            assert one.chat("not-mine").status == 404
            assert one.send(f"GET {PATH}").status == 404
            assert one.send(f"GET /v1/responses/{secret}").status == 404
            assert one.send(f"GET /v1/models/{secret}").status == 404
            body = json.dumps({"model": "400", "input": "x", "previous_response_id": CLIENTS["body"]}).encode()
            assert one.send("POST /v1/responses", body=body).status == 404
            assert one.send("GET /admin/config").status == 401
        administrator = f"X-Api-Key: {CONFIGURED['admin key']}"
        one.credentials = ()
        shown = one.send("GET /admin/config", administrator)
        assert shown.status == 200
        assert found(shown.body.decode()) == []
        assert one.send(f"GET /admin/{secret}", administrator).status == 404
        one.credentials = (f"Authorization: Bearer {CONFIGURED['tenant key']}",)


def test_a_leak_would_be_seen() -> None:
    assert found("nothing of that kind, just a line of some length") == []
    for name, secret in SECRETS.items():
        for form in (
            f"x{secret}y",
            secret[3:15],
            json.dumps(json.dumps({"a": secret})),
            quote(quote(secret, safe=""), safe=""),
            base64.b64encode(f"user:{secret}".encode()).decode(),
            base64.urlsafe_b64encode(f"ab{secret}|rest".encode()).decode(),
            written(secret),
        ):
            assert name in found(form), form
