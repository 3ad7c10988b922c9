"""Hostile and huge bodies over the wire: each has its status, and none keeps the event loop from the others.

The provider says nothing of usage, so that every accepted body is counted too: the harshest case.

How long the loop stood still is asked of the process from outside, by a request for `/livez` after the other. What such
a request took is an upper bound; so is the processor time that the process used meanwhile, which does not grow while
the machine is busy with something else. The smaller of the two counts.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.stack import ServeProcess, serving
from tests.e2e.upstreams import answering, base_url, http, scripted
from tests.edge.raw import Answer, Wire, eventually
from tests.transport.servers import Server

MOST = 20_971_520
STALL_SECONDS = 0.1
"""What is promised is half of it; the bound that is measured counts what other threads of the process do, too."""
TRIES = 4
REPLY = b'{"id":"c","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"hi"}}]}'
_numbers = itertools.count()
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def upstream() -> Iterator[Server]:
    with scripted(answering(lambda received: http(REPLY))) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(upstream: Server) -> Iterator[ServeProcess]:
    config = {"providers": {"up": {"kind": "openai", "base_url": base_url(upstream)}}}
    with serving(config) as process:
        send(process, CHAT, chat('"hi"'))  # loads the vocabulary
        yield process


def send(proxy: ServeProcess, path: str, body: bytes, lines: tuple[str, ...] = ()) -> Answer:
    """The answer, once the request is over: a reply is out before its tokens are counted."""
    ident = f"body-{next(_numbers)}"
    head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", f"X-Request-Id: {ident}"]
    with Wire(proxy.port) as wire:
        if wire.offer("\r\n".join([*head, *lines]).encode() + b"\r\n\r\n"):
            wire.offer(body)
        answer = wire.answer()
    if answer.status != 413:  # that one is refused before it is a request
        eventually(lambda: f'"request_id":"{ident}"' in proxy.text())
    return answer


class Watch:
    """Asks for `/livez` again and again; `longest` is the longest stall of the loop in seconds."""

    def __init__(self, proxy: ServeProcess) -> None:
        self._port = proxy.port
        self._clock = (~proxy.process.pid << 3) | 2  # the processor time of that process: clock_getcpuclockid(3)
        self._over = threading.Event()
        self.longest = 0.0
        self.asked = 0

    def _used(self) -> tuple[float, float]:
        return time.monotonic(), time.clock_gettime(self._clock)

    def _run(self) -> None:
        with Wire(self._port) as wire:
            while not self._over.is_set():
                began = self._used()
                wire.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
                wire.answer()
                ended = self._used()
                self.longest = max(self.longest, min(ended[0] - began[0], ended[1] - began[1]))
                self.asked += 1
                time.sleep(0.001)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()


@dataclass(frozen=True)
class Case:
    name: str
    body: Callable[[], bytes]
    status: int
    code: str = ""
    path: str = CHAT
    lines: tuple[str, ...] = ()


def chat(content: str, **more: Any) -> bytes:
    """A chat whose one message has this content, as JSON."""
    rest = "".join(f",{json.dumps(name)}:{json.dumps(value)}" for name, value in more.items())
    return f'{{"model":"any","messages":[{{"role":"user","content":{content}}}]{rest}}}'.encode()


def with_member(text: str) -> bytes:
    return b'{"model":"any","messages":[{"role":"user","content":"hi"}],' + text.encode() + b"}"


def said(text: str) -> Callable[[], bytes]:
    return lambda: chat(json.dumps(text, ensure_ascii=False))


def keys(count: int) -> str:
    return ",".join(f'"k{number}":0' for number in range(count))


def filled(size: int) -> bytes:
    """A chat with an image in it, as large as this."""
    frame = b'{"model":"any","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"%b"}}]}]}'
    url = b"data:image/png;base64,"
    return frame % (url + b"A" * (size - len(frame) + 2 - len(url)))


def form() -> bytes:
    part = b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n'
    return b"".join(part % number for number in range(10_000)) + b"--b--\r\n"


def tool(parameters: dict[str, Any]) -> Callable[[], bytes]:
    return lambda: chat('"hi"', tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}])


RECURSIVE = {"type": "object", "properties": {"x": {"$ref": "#"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}
WIDE = {"type": "object", "properties": {f"property_{number}": {"type": "string"} for number in range(10_000)}}
JSON, BAD = "invalid_json", "invalid_request"

CASES = [
    Case("deep array", lambda: b'{"model":"any","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, JSON),
    Case("deep object", lambda: with_member('"x":' + '{"a":' * 100_000 + "1" + "}" * 100_000), 400, JSON),
    Case("deep and open", lambda: b"[" * 100_000, 400, JSON),
    Case("6 MB of {}", lambda: b'{"model":"any","messages":[' + b"{}," * 2_000_000 + b"{}]}", 200),
    Case("NaN", lambda: with_member('"temperature":NaN'), 400, JSON),
    Case("Infinity", lambda: with_member('"temperature":-Infinity'), 400, JSON),
    Case("1e999 that we read", lambda: with_member('"max_tokens":1e999'), 400, BAD),
    Case("1e999 that we do not", lambda: with_member('"temperature":1e999'), 200),
    Case("5000 digits that we read", lambda: with_member('"max_tokens":' + "9" * 5000), 400, BAD),
    Case("5000 digits that we do not", lambda: with_member('"seed":' + "9" * 5000), 200),
    Case("lone surrogate", lambda: chat('"\\ud800"'), 400, JSON),
    Case("lone surrogate in the model", lambda: b'{"model":"\\udfff","messages":[]}', 400, JSON),
    Case("model twice", lambda: with_member('"model":"other"'), 400, JSON),
    Case("model twice, escaped", lambda: with_member('"\\u006dodel":"other"'), 400, JSON),
    Case("stream twice", lambda: with_member('"stream":true, "stream":false'), 400, JSON),
    Case("byte order mark", lambda: b"\xef\xbb\xbf" + chat('"hi"'), 400, JSON),
    Case("utf-16", lambda: chat('"hi"').decode().encode("utf-16"), 400, JSON),
    Case("utf-32", lambda: chat('"hi"').decode().encode("utf-32-le"), 400, JSON),
    Case("invalid utf-8", lambda: chat('"hi"').replace(b"hi", b"\xc3\x28"), 400, JSON),
    Case("overlong utf-8", lambda: chat('"hi"').replace(b"hi", b"\xc0\xaf"), 400, JSON),
    Case("gzip bomb", lambda: gzip.compress(bytes(50_000_000)), 400, BAD, lines=("Content-Encoding: gzip",)),
    Case("brotli", lambda: b"\x8b\x02\x80", 400, BAD, lines=("Content-Encoding: br",)),
    Case("form", form, 200, path="/v1/files", lines=("Content-Type: multipart/form-data; boundary=b",)),
    Case("a million messages", lambda: b'{"model":"any","messages":[' + b'{"role":"user"},' * 1_000_000 + b"1]}", 200),
    Case("max_tokens -1", lambda: with_member('"max_tokens":-1'), 400, BAD),
    Case("max_tokens 0", lambda: with_member('"max_tokens":0'), 400, BAD),
    Case("max_tokens 2^63", lambda: with_member(f'"max_completion_tokens":{2**63}'), 400, BAD),
    Case("max_tokens true", lambda: with_member('"max_tokens":true'), 400, BAD),
    Case("max_tokens text", lambda: with_member('"max_tokens":"10"'), 400, BAD),
    Case("max_tokens 1.5", lambda: with_member('"max_tokens":1.5'), 400, BAD),
    Case("a million choices", lambda: with_member('"n":1000000'), 400, BAD),
    Case("1 MB of model", lambda: b'{"model":"%b","messages":[]}' % (b"m" * 1_000_000), 400, BAD),
    Case("line end in the model", lambda: b'{"model":"a\\r\\nx-evil: 1","messages":[]}', 400, BAD),
    Case("blanks", said(" " * 1_000_000), 200),
    Case("tabs", said("\t" * 1_000_000), 200),
    Case("a million a", said("a" * 1_000_000), 200),
    Case("zero width", said("\u200b" * 300_000), 200),
    Case("right to left", said("\u202e\u05d0" * 150_000), 200),
    Case("combining", said("e" + "\u0301" * 300_000), 200),
    Case("emoji", said("👩‍👩‍👧‍👦" * 30_000), 200),
    Case("special tokens", said("<|endoftext|><|im_start|>" * 20_000), 200),
    Case("recursive schema", tool(RECURSIVE), 200),
    Case("wide schema", tool(WIDE), 200),
    Case("20 MB of image", lambda: filled(MOST), 200),
    Case("one byte too much", lambda: filled(MOST + 1), 413, "request_too_large"),
    Case("stream text", lambda: with_member('"stream":"true"'), 400, BAD),
    Case("stream 1", lambda: with_member('"stream":1'), 400, BAD),
    Case("10000 stops", lambda: chat('"hi"', stop=["x"] * 10_000), 200),
    Case("1000 keys", lambda: with_member(keys(1000)), 200),
    Case("2000 keys", lambda: with_member(keys(2000)), 400, BAD),
    Case("a million keys", lambda: with_member(keys(1_000_000)), 400, BAD),
    Case("a million keys in a message", lambda: chat(f"{{{keys(1_000_000)}}}"), 200),
    Case("two million times one key", lambda: with_member(",".join(['"k":0'] * 2_000_000)), 400, BAD),
    Case("python's names", lambda: with_member('"__proto__":{"a":1},"__class__":"x","constructor":{}'), 200),
    Case("no body", lambda: b"", 400, JSON),
    Case("null", lambda: b"null", 400, JSON),
    Case("array", lambda: b"[]", 400, JSON),
    Case("two values", lambda: chat('"hi"') * 2, 400, JSON),
    Case("trailing text", lambda: chat('"hi"') + b" x", 400, JSON),
    Case("messages null", lambda: b'{"model":"any","messages":null}', 400, BAD),
    Case("messages object", lambda: b'{"model":"any","messages":{}}', 400, BAD),
    Case("no model", lambda: b'{"messages":[]}', 400, BAD),
    Case("model number", lambda: b'{"model":4,"messages":[]}', 400, BAD),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_body(proxy: ServeProcess, upstream: Server, case: Case) -> None:
    body = case.body()
    stalls = []
    for _ in range(TRIES):
        before = len(upstream.requests)
        watch = Watch(proxy)
        with watch.running():
            answer = send(proxy, case.path, body, case.lines)
        assert answer.status == case.status, answer.body[:500]
        if case.status == 200:
            assert answer.body == REPLY
            assert upstream.requests[-1].body == body
            upstream.requests[-1].body = b""
        else:
            assert answer.error["code"] == case.code
            assert answer.error["type"] == "invalid_request_error"
            assert len(answer.body) < 1000
            assert len(upstream.requests) == before
        stalls.append(watch.longest)
        if watch.longest < STALL_SECONDS:
            break
    assert min(stalls) < STALL_SECONDS, stalls


def test_the_process_is_none_the_worse(proxy: ServeProcess) -> None:
    assert send(proxy, CHAT, chat('"hi"')).status == 200
    assert [line for line in proxy.lines() if line["event"] == "internal.error"] == []
