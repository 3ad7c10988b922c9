"""The mock on a real socket: every fault as a client meets it, framing, limits, and books that are true to the wire."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from mock_wire import Running, answer, dechunk, exchange, read_all, request, words

from proxy.errors import UpstreamBroken
from proxy.providers.mock.handler import Mock
from proxy.providers.mock.script import parse_script
from proxy.transport.base import Origin, Request
from proxy.transport.scripted import ScriptedTransport

Start = Callable[..., Running]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(running: Start) -> Running:
    return running(slow_ms=150)


def asked(model: str, stream: bool = False, said: str = "one two three") -> dict[str, Any]:
    return {"model": model, "stream": stream, "messages": [{"role": "user", "content": said}]}


def read_until_error(line: socket.socket) -> tuple[bytes, type[Exception] | None]:
    """(what came, the error that ended it; None for a clean end)."""
    out = b""
    try:
        while data := line.recv(65536):
            out += data
    except (ConnectionResetError, TimeoutError) as error:
        return out, type(error)
    return out, None


def broken(server: Running, model: str, stream: bool) -> tuple[bytes, type[Exception] | None]:
    with server.connect() as line:
        line.sendall(request(b"POST", CHAT, asked(model, stream)))
        return read_until_error(line)


def test_requests_share_a_connection_in_order(server: Running) -> None:
    with server.connect() as line:
        sent = [request(b"POST", CHAT, asked("echo", said=f"marker-{i}"), b"x-request-id: r%d" % i) for i in range(200)]
        sent.append(request(b"POST", CHAT, asked("echo", said="last"), b"connection: close"))
        line.sendall(b"".join(sent))
        raw = read_all(line)
    for i in range(200):
        head, _, rest = raw.partition(b"\r\n\r\n")
        status, headers, _ = answer(head)
        size = int(headers["content-length"])
        assert (status, headers["x-request-id"]) == (200, f"r{i}")
        assert json.loads(rest[:size])["choices"][0]["message"]["content"] == f"marker-{i}"
        raw = rest[size:]
    status, headers, body = answer(raw)
    assert headers["connection"] == "close"
    assert json.loads(body)["choices"][0]["message"]["content"] == "last"


@pytest.mark.parametrize("step", [1, 7, 64])
def test_a_request_split_anywhere_is_read_the_same(server: Running, step: int) -> None:
    raw = request(b"POST", CHAT, asked("echo", stream=True), b"connection: close", b"expect: 100-continue")
    with server.connect() as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(0, len(raw), step):
            line.sendall(raw[i : i + step])
        split = read_all(line)
    with server.connect() as line:
        line.sendall(raw)
        assert read_all(line) == split
    assert dechunk(split.partition(b"\r\n\r\n")[2]).endswith(b"data: [DONE]\n\n")


def test_a_chunked_request_an_old_client_and_a_head(server: Running) -> None:
    body = json.dumps(asked("echo", True)).encode()
    with server.connect() as line:
        line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: m\r\ntransfer-encoding: chunked\r\n")
        line.sendall(b"connection: close\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        status, _, new = answer(read_all(line))
    with server.connect() as line:
        line.sendall(b"POST /v1/chat/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        old_status, headers, old = answer(read_all(line))
    assert (status, old_status) == (200, 200)
    assert "transfer-encoding" not in headers
    assert old == new
    status, headers, body = exchange(server, b"HEAD", "/v1/models")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) == len(exchange(server, b"GET", "/v1/models")[2])
    with server.connect() as line:
        line.sendall(request(b"HEAD", CHAT, asked("echo", True), b"connection: close"))
        assert read_all(line).endswith(b"\r\n\r\n")


# -- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_is_a_reset_after_everything_before_it(server: Running, stream: bool) -> None:
    raw, error = broken(server, "cut", stream)
    assert error is ConnectionResetError
    headers, _, body = raw.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200 ")
    assert not body.endswith(b"0\r\n\r\n")
    entry = server.last()
    assert (entry["cut"], entry["finished"], entry["client_gone"]) == (True, False, False)
    if stream:
        assert body.count(b"data: ") == entry["chunks_sent"] > 5
        assert body.endswith(b"\n\n\r\n")  # the last chunk before the reset came whole
    else:
        length = int(headers.split(b"content-length: ")[1].split(b"\r\n")[0])
        assert 0 < len(body) < length


@pytest.mark.parametrize("stream", [False, True])
def test_an_early_close_is_a_clean_close_of_an_unfinished_body(server: Running, stream: bool) -> None:
    raw, error = broken(server, "early-close", stream)
    assert error is None
    head, _, body = raw.partition(b"\r\n\r\n")
    if stream:
        assert b"transfer-encoding: chunked" in head
        assert not body.endswith(b"0\r\n\r\n")
        assert body.count(b"data: ") == server.last()["chunks_sent"] > 5
    else:
        assert 0 < len(body) < int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    assert server.last()["cut"]


def test_a_stall_lasts_until_the_client_leaves(server: Running) -> None:
    for stream, expected in ((True, 1), (False, 0)):
        with server.connect() as line:
            line.sendall(request(b"POST", CHAT, asked("stall", stream)))
            if stream:
                first = b""
                while not first.endswith(b"\n\n\r\n"):
                    first += line.recv(65536)
                assert first.count(b"data: ") == 1
            line.settimeout(0.1)
            with pytest.raises(TimeoutError):
                line.recv(1)
            assert server.ledger()["totals"]["in_flight"] == 1
        entry = server.last()
        assert (entry["client_gone"], entry["chunks_sent"]) == (True, expected)
        assert entry["completion_tokens"] == 0


def test_faults_that_end_cleanly_leave_a_usable_connection(server: Running) -> None:
    with server.connect() as line:
        for model in ("no-done", "garbage", "error-event", "error-late", "plain", "429", "500"):
            line.sendall(request(b"POST", CHAT, asked(model, True)))
            raw = b""
            while not raw.endswith((b"0\r\n\r\n", b"}")):
                data = line.recv(65536)
                assert data
                raw += data
            status, headers, body = answer(raw)
            assert status == (int(model) if model.isdigit() else 200)
            assert headers.get("retry-after") == ("1" if model == "429" else None)
            assert (b"[DONE]" in body) == (model == "garbage")


def test_slow_sends_the_head_at_once_and_the_first_piece_late(server: Running, running: Start) -> None:
    begun = time.monotonic()
    assert closed(server, "slow", True).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert time.monotonic() - begun >= 0.149
    never = running(slow_ms=600_000)
    with never.connect() as line:
        line.sendall(request(b"POST", CHAT, asked("slow", True)))
        assert line.recv(65536).endswith(b"\r\n\r\n")
    assert (never.last()["client_gone"], never.last()["chunks_sent"]) == (True, 0)


def test_requests_wait_behind_a_slow_one_and_keep_their_order(server: Running) -> None:
    sent = [request(b"POST", CHAT, asked("slow"))]
    sent += [request(b"POST", CHAT, asked("echo", True, f"marker-{i}")) for i in range(300)]
    sent += [request(b"POST", CHAT, asked("echo", said="last"), b"connection: close")]
    with server.connect() as line:
        line.sendall(b"".join(sent))
        raw = read_all(line)
    heads = raw.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert len(heads) == 302
    assert b"content-length" in heads[0]
    for i in range(300):
        assert b'"marker-%d"' % i in heads[1 + i]
    assert b"connection: close" in heads[-1]


def test_nonsense_behind_a_request_that_is_under_way_resets_the_connection(server: Running) -> None:
    with server.connect() as line:
        line.sendall(request(b"POST", CHAT, asked("stall")) + b"nonsense\r\n\r\n")
        assert read_until_error(line) == (b"", ConnectionResetError)
    assert server.last()["client_gone"]


@pytest.mark.parametrize("model", ["any", "cut", "early-close", "no-done", "garbage", "error-late", "plain", "429"])
def test_the_same_mock_says_the_same_in_process(server: Running, model: str) -> None:
    body = json.dumps(asked(model, True)).encode()

    async def in_process() -> tuple[int, bytes, type[Exception] | None]:
        transport = ScriptedTransport(Mock(words))
        call = Request(Origin("http", "mock", 80), b"POST", CHAT.encode(), [], body)
        response = await transport.send(call, math.inf)
        out = b""
        try:
            while data := await response.read(math.inf):
                out += data
        except UpstreamBroken as error:
            return response.status, out, {"reset": ConnectionResetError}.get(error.reason)
        return response.status, out, None

    raw, error = broken(server, model, True) if model in ("cut", "early-close") else (closed(server, model, True), None)
    head, _, wire = raw.partition(b"\r\n\r\n")
    unended = not wire.endswith(b"0\r\n\r\n") and b"chunked" in head
    status, _, said = answer(raw + b"0\r\n\r\n" if unended else raw)
    assert asyncio.run(in_process()) == (status, said, error)


def closed(server: Running, model: str, stream: bool = False) -> bytes:
    """The whole answer, on a connection that is closed after it."""
    with server.connect() as line:
        line.sendall(request(b"POST", CHAT, asked(model, stream), b"connection: close"))
        return read_all(line)


# -- the books -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [1, 5, 17])
@pytest.mark.parametrize("reset", [False, True])
def test_the_books_hold_what_was_sent_before_a_hang_up(server: Running, wanted: int, reset: bool) -> None:
    with server.connect() as line:
        if reset:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line.sendall(request(b"POST", CHAT, asked("bench-50-20", True), b"authorization: Bearer sk-canary"))
        raw = b""
        while raw.count(b"data: ") < wanted:
            raw += line.recv(65536)
    entry = server.last()
    received = raw.count(b"data: ")
    assert entry["client_gone"]
    assert received <= entry["chunks_sent"] <= received + 1
    body = dechunk(raw.partition(b"\r\n\r\n")[2] + b"0\r\n\r\n")
    chunks = [json.loads(data[6:]) for data in body.split(b"\n\n") if data]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert len(text.split()) <= entry["completion_tokens"] <= len(text.split()) + 1
    assert entry["authorization_seen"] not in (None, "sk-canary")


def test_a_client_that_does_not_read_is_waited_for(running: Start) -> None:
    server = running()
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", server.port))
        line.sendall(request(b"POST", CHAT, asked("bench-60000", True)))
        line.recv(4096)
        time.sleep(0.05)
        assert server.ledger()["totals"]["in_flight"] == 1
    assert server.last()["client_gone"]


def test_the_books_over_http(running: Start) -> None:
    server = running()
    exchange(server, b"POST", CHAT, asked("echo"))
    exchange(server, b"POST", CHAT, asked("500"))
    books = server.ledger("?since=1")
    assert [(entry["id"], entry["status"]) for entry in books["entries"]] == [(2, 500)]
    assert books["totals"]["requests"] == 2
    assert exchange(server, b"GET", "/__ledger?since=x")[0] == 400
    assert exchange(server, b"GET", "/__health")[2] == b'{"status":"ok"}'
    assert json.loads(exchange(server, b"DELETE", "/__ledger")[2]) == {"dropped": 2}
    assert server.ledger()["totals"]["requests"] == 0
    assert server.ledger()["last_id"] == 2


# -- what is no request ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 202, 431),
        (b"GET /" + b"a" * 70_000, 431),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000, 431),
    ],
)
def test_what_is_no_request_gets_an_envelope_and_a_close(server: Running, raw: bytes, status: int) -> None:
    with server.connect() as line:
        line.sendall(raw)
        got, error = read_until_error(line)
    assert error is None
    found, headers, body = answer(got)
    assert (found, headers["connection"]) == (status, "close")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_a_body_beyond_the_limit_is_refused_while_it_is_sent(server: Running) -> None:
    with server.connect() as line:
        line.sendall(b"POST /v1/files HTTP/1.1\r\nhost: m\r\ncontent-length: %d\r\n\r\n" % (1 << 40))
        piece = b"x" * (1 << 20)
        for _ in range(65):
            line.sendall(piece)
        raw, error = read_until_error(line)
    assert (answer(raw)[0], error) == (413, None)


def test_connections_are_forgotten_when_they_end(running: Start) -> None:
    server = running()
    lines = [server.connect() for _ in range(20)]
    for line in lines:
        line.sendall(request(b"POST", CHAT, asked("stall", True)))
        line.recv(65536)
    assert server.connections == 20
    for line in lines:
        line.close()
    server.wait_for(lambda: {"open": server.connections}, "open", 0)
    assert server.wait_for(lambda: server.ledger()["totals"], "in_flight", 0)["client_gone"] == 20


# -- scripts on the wire ---------------------------------------------------------------------------------------------


def test_a_body_cut_at_every_byte(running: Start) -> None:
    whole = exchange(running(), b"POST", CHAT, asked("echo"))[2]
    ends = ("reset", "close", "complete")
    steps = [f"- {{cut_at: {k}, then: {ends[k % 3]}}}" for k in range(0, len(whole), 7)]
    server = running(script=parse_script("\n".join(steps)))
    for k in range(0, len(whole), 7):
        raw, error = broken(server, "echo", False) if ends[k % 3] != "complete" else (closed(server, "echo"), None)
        head, _, body = raw.partition(b"\r\n\r\n")
        assert body == whole[:k]
        assert error is (ConnectionResetError if ends[k % 3] == "reset" else None)
        declared = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        assert declared == (k if ends[k % 3] == "complete" else len(whole))


def test_a_reset_after_a_whole_answer(running: Start) -> None:
    server = running(script=parse_script("- {json: {a: 1}, then: reset}\n- {json: {a: 1}, then: stall}"))
    raw, error = broken(server, "m", False)
    assert (answer(raw)[2], error) == (b'{"a":1}', ConnectionResetError)
    assert server.last()["finished"]


def test_a_reset_takes_nothing_back_from_a_client_that_reads_slowly(running: Start) -> None:
    text = "x" * 1_500_000
    server = running(script=parse_script(json.dumps([{"body": text, "cut_at": 1_000_000, "then": "reset"}])))
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        line.settimeout(20)
        line.connect(("127.0.0.1", server.port))
        line.sendall(request(b"POST", CHAT, asked("m")))
        line.recv(1)
        time.sleep(0.05)
        raw, error = read_until_error(line)
    assert len(raw.partition(b"\r\n\r\n")[2]) == 1_000_000
    assert error is ConnectionResetError
    assert server.last()["cut"]


def test_split_pieces_are_chunks_of_their_own(running: Start) -> None:
    server = running(script=parse_script("- {split: 3, gap_ms: 1}"))
    body = closed(server, "echo", True).partition(b"\r\n\r\n")[2]
    assert body.startswith(b"3\r\ndat\r\n3\r\na: \r\n")
    assert dechunk(body).endswith(b"data: [DONE]\n\n")
