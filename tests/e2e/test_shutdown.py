"""How `breakwater serve` starts and ends: real processes, real signals, and what their clients and their log see."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy import __version__
from proxy.observability.events import RequestFinished
from tests.e2e.corpus import read_events
from tests.e2e.scene import SSE, chunk, piece_of, playing, request, scene, until
from tests.e2e.stack import ServeProcess, serving
from tests.edge.raw import PATIENCE, Answer, Wire, eventually

pytestmark = pytest.mark.slow

FAR = 60_000
"""Milliseconds that no test waits for."""


ENDLESS = "bench-9999-1"
"""A stream that has begun, and goes on for hours."""


def config(drain_ms: int, grace_ms: int, **mock: Any) -> dict[str, Any]:
    return {
        "providers": {"mock": {"kind": "mock", **mock}},
        "models": [{"name": "*", "targets": ["mock/*"]}],
        "listen": {"drain_ms": drain_ms, "grace_ms": grace_ms},
    }


@contextlib.contextmanager
def asked(process: ServeProcess, model: str, **body: Any) -> Iterator[Wire]:
    """A connection with a request under way."""
    with Wire(process.port) as wire:
        wire.send(request(model, **body))
        yield wire


@contextlib.contextmanager
def streaming(process: ServeProcess, model: str) -> Iterator[Wire]:
    """A connection whose stream has begun."""
    with asked(process, model, stream=True) as wire:
        assert wire.head()[0] == 200
        yield wire


def ready(wire: Wire) -> int:
    wire.send(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n")
    return wire.answer().status


def rest(wire: Wire) -> bytes:
    """The chunked body up to its end; nothing follows it but the end of the connection."""
    body = b""
    while size := int(wire.until(b"\r\n"), 16):
        body += wire.exactly(size + 2)[:-2]
    wire.exactly(2)
    assert wire.rest() == b""
    return body


def ended(process: ServeProcess) -> list[dict[str, Any]]:
    """The log of a process that has ended well by itself."""
    assert process.process.wait(PATIENCE) == 0
    text = process.text()
    assert text.endswith("\n")
    assert "Traceback" not in text
    lines = [dict(json.loads(line)) for line in text.splitlines()]
    assert (lines[0]["event"], lines[-1]["event"]) == ("server.started", "server.stopped")
    return lines


def finished(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] in ("request.finished", "request.refused")]


# --- the start ------------------------------------------------------------------------------------------------------


def test_it_says_once_that_it_listens_and_is_ready_then() -> None:
    with serving(config(0, 0)) as process:
        (line,) = process.lines()
        assert {name: line[name] for name in ("event", "version", "listen")} == {
            "event": "server.started",
            "version": __version__,
            "listen": f"127.0.0.1:{process.port}",
        }
        assert line["config_hash"]
        with Wire(process.port) as wire:
            assert ready(wire) == 200
        assert cpu_seconds(process) < 4.0  # about one; unlike the time by the clock, a busy machine hardly adds to it
        process.stop()
        ended(process)


def cpu_seconds(process: ServeProcess) -> float:
    stat = Path(f"/proc/{process.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = ServeProcess(config(0, 0), arguments=("--port", str(port)))
        try:
            assert process.process.wait(PATIENCE) == 1
            assert process.text() == f"cannot listen on 127.0.0.1:{port}: the port is in use\n"
        finally:
            process.close()


# --- the end --------------------------------------------------------------------------------------------------------


def test_while_it_drains_everything_is_served_and_streams_end_whole() -> None:
    with serving(config(2000, FAR)) as process:
        with (
            streaming(process, "bench-100-30") as stream,  # three seconds
            Wire(process.port) as probe,
            Wire(process.port) as kept,
        ):
            assert ready(probe) == 200
            kept.send(request("echo"))
            assert kept.answer().status == 200
            signalled = time.monotonic()
            process.process.send_signal(signal.SIGTERM)
            while ready(probe) == 200:
                assert time.monotonic() - signalled < 0.5
            kept.send(request("echo"))
            assert kept.answer().status == 200
            with asked(process, "echo") as fresh:
                assert fresh.answer().status == 200
            with streaming(process, "bench-10-10") as late:  # a second
                assert rest(late).endswith(b"data: [DONE]\n\n")
            eventually(lambda: not accepts(process))
            assert time.monotonic() - signalled >= 2.0
            assert probe.rest() == kept.rest() == b""
            body = rest(stream)
        events = read_events(body)
        assert events[-1][1] == b"[DONE]"
        assert len(events) > 100
        lines = ended(process)
        assert [line["status"] for line in finished(lines)] == [200] * 5
        assert lines[-1].get("cut", 0) == 0


def accepts(process: ServeProcess) -> bool:
    try:
        socket.create_connection(("127.0.0.1", process.port), timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_outlives_the_grace_is_told_so(number: int) -> None:
    """A stream by one error event, a plain request by a 503; each has its line in the log."""
    with serving(config(0, 500)) as process:
        with streaming(process, ENDLESS) as stream, asked(process, "stall") as plain, Wire(process.port) as probe:
            eventually(lambda: in_flight(probe) == 2)
            process.process.send_signal(number)
            first, *_, last = read_events(rest(stream))
            assert json.loads(first[1])["choices"]
            assert json.loads(last[1])["error"]["code"] == "stream_interrupted"
            refusal: Answer = plain.answer()
            assert (refusal.status, refusal.error["code"], refusal.headers["retry-after"]) == (503, "overloaded", "1")
        lines = ended(process)
        told = sorted((line["status"], line["error_code"]) for line in finished(lines))
        assert told == [(200, "stream_interrupted"), (503, "overloaded")]
        assert lines[-1]["cut"] == 2


def in_flight(wire: Wire) -> int:
    wire.send(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n")
    page = wire.answer().body.decode().splitlines()
    (line,) = [line for line in page if line.startswith("breakwater_in_flight_requests ")]
    return int(float(line.split()[1]))


def test_a_plain_request_that_ends_within_the_grace_is_answered() -> None:
    with serving(config(0, FAR, first_token_ms=700)) as process:
        with asked(process, "any") as wire, Wire(process.port) as probe:
            eventually(lambda: in_flight(probe) == 1)
            process.process.send_signal(signal.SIGTERM)
            answer = wire.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert [line["status"] for line in finished(ended(process))] == [200]


def test_a_second_signal_hurries() -> None:
    with serving(config(FAR, FAR)) as process:
        with streaming(process, ENDLESS) as stream, Wire(process.port) as probe:
            process.process.send_signal(signal.SIGTERM)
            eventually(lambda: ready(probe) == 503)
            process.process.send_signal(signal.SIGTERM)
            *_, last = read_events(rest(stream))
            assert json.loads(last[1])["error"]["code"] == "stream_interrupted"
        assert [line["error_code"] for line in finished(ended(process))] == ["stream_interrupted"]


def test_with_nothing_in_flight_it_ends_with_the_drain() -> None:
    with serving(config(400, FAR)) as process, Wire(process.port) as idle:
        assert ready(idle) == 200
        signalled = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        assert finished(ended(process)) == []
        assert 0.4 <= time.monotonic() - signalled < PATIENCE
        assert idle.rest() == b""


def test_a_client_that_reads_nothing_does_not_hold_up_the_end() -> None:
    with (
        serving(config(0, 200)) as process,
        asked(process, "bench-99999", stream=True),  # more than the kernel takes
        Wire(process.port) as probe,
    ):
        eventually(lambda: in_flight(probe) == 1)
        process.process.send_signal(signal.SIGTERM)
        lines = ended(process)
        assert [line["stream"] for line in finished(lines)] == [True]
        assert lines[-1]["cut"] == 1


def test_clients_that_leave_during_the_drain_are_counted_as_such() -> None:
    with serving(config(FAR, FAR)) as process:
        with streaming(process, ENDLESS) as stream, Wire(process.port) as probe:
            process.process.send_signal(signal.SIGTERM)
            eventually(lambda: ready(probe) == 503)
            stream.reset()
            eventually(lambda: in_flight(probe) == 0)
            process.process.send_signal(signal.SIGTERM)
        assert [line["status"] for line in finished(ended(process))] == [499]


@pytest.mark.anyio
@pytest.mark.parametrize("head", [b"", SSE])
async def test_a_stream_of_keep_alives_alone_is_told_what_the_status_would_have_been(head: bytes) -> None:
    """Nothing of an answer was forwarded, so it is not one that was interrupted."""

    async def part(peer: Any) -> None:
        if head:
            await peer.send(head)
        await peer.gone()

    async with scene(playing({"any": part}), silence=0.05) as on_stage:
        client = await on_stage.client()
        client.ask(stream=True)
        await client.head()
        await client.read_until(b": keep-alive\n\n")
        await on_stage.stack.running.gateway.interrupt_all()
        (event,) = read_events(await client.rest())
        assert json.loads(event[1])["error"]["code"] == "overloaded"
        client.close()
        (outcome,) = await on_stage.over()
        assert isinstance(outcome, RequestFinished)
        assert (outcome.status, outcome.error_code, outcome.interrupted) == (503, "overloaded", False)


@pytest.mark.anyio
async def test_an_interruption_ends_all_at_once_and_leaves_nothing() -> None:
    async def part(peer: Any) -> None:
        await peer.send(SSE + chunk(piece_of("Hello")))
        await peer.gone()

    async with scene(playing({"any": part}), max_connections=20) as on_stage:
        clients = [await on_stage.client() for _ in range(20)]
        for client in clients:
            client.ask(stream=True)
            await client.head()
            await client.read_until(b"Hello")
        await on_stage.stack.running.gateway.interrupt_all()
        assert on_stage.slots.in_use == 0
        for client in clients:
            _, last = read_events(await client.rest())
            assert json.loads(last[1])["error"]["code"] == "stream_interrupted"
            client.close()
        assert {event.status for event in await on_stage.over(20)} == {200}
        await until(lambda: on_stage.upstream.closed == 20, "the provider's sockets to close")
