"""The end of a process: signals, drain, grace, interruption. Real processes, real signals, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from proxy.edge.head import Limits
from proxy.edge.server import Listener, ListenFailed, Server

from .raw import PATIENCE, Wire, eventually

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("site.py")
FAR = "60000"
"""Milliseconds that no test waits for."""


class Process:
    def __init__(self, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # A process that hangs would leave its reader hanging: then it is killed, and the test fails.
        self._watchdog = threading.Timer(2 * PATIENCE, self._process.kill)
        self._watchdog.start()
        self.ports: list[int] = []

    def listen(self) -> None:
        for _ in range(2):
            word, _, port = self.line().partition(" ")
            assert word == "ready"
            self.ports.append(int(port))

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def wire(self) -> Wire:
        return Wire(self.ports[0])

    def stream(self, path: str) -> Wire:
        """A connection whose stream has begun."""
        wire = self.wire()
        wire.send(b"GET " + path.encode() + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        wire.until(b"data: tick\n\n")
        return wire

    def ready(self, wire: Wire) -> int:
        wire.send(b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n")
        return wire.answer().status

    def accepts(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.ports[0]), timeout=PATIENCE).close()
        except ConnectionRefusedError:
            return False
        return True

    def signal(self, number: int = signal.SIGTERM) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Exit code, the rest of stdout, and stderr, of a process that ends by itself."""
        out, err = self._process.communicate(timeout=PATIENCE)
        return self._process.returncode, out, err

    def running(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        if self.running():
            self._process.kill()
        self._watchdog.cancel()
        self._process.communicate()


@contextlib.contextmanager
def process(*words: str) -> Iterator[Process]:
    started = Process(*words)
    try:
        started.listen()
        yield started
    finally:
        started.close()


def test_drain_then_grace_lets_a_stream_end_whole() -> None:
    with process("1000", FAR) as server, server.stream("/ticks") as stream, server.wire() as idle:
        assert server.ready(idle) == 200
        server.signal()
        assert server.line() == "draining"
        assert server.ready(idle) == 503
        with server.wire() as fresh:  # the listener is still open
            assert server.ready(fresh) == 503
        assert idle.rest() == b""  # closed with the drain
        eventually(lambda: not server.accepts())
        assert server.running()
        rest = stream.rest()
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert server.end() == (0, "served\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stream_that_outlives_grace_is_interrupted_and_the_process_exits_well(number: int) -> None:
    with process("0", "300") as server, server.stream("/endless") as stream:
        server.signal(number)
        rest = stream.rest()
        assert b"data: tick" in rest
        assert rest.endswith(b"data: error\n\n\r\n0\r\n\r\n")
        assert server.end() == (0, "draining\ninterrupting 1\nserved\n", "")


def test_a_second_signal_skips_drain_and_grace() -> None:
    with process(FAR, FAR) as server, server.stream("/endless") as stream:
        server.signal()
        assert server.line() == "draining"
        assert server.accepts()
        server.signal()
        assert stream.rest().endswith(b"data: error\n\n\r\n0\r\n\r\n")
        assert server.end()[0] == 0


def test_a_second_signal_within_grace_skips_the_rest_of_it() -> None:
    with process("0", FAR) as server, server.stream("/endless") as stream:
        server.signal()
        eventually(lambda: not server.accepts())
        server.signal()
        assert stream.rest().endswith(b"data: error\n\n\r\n0\r\n\r\n")
        assert server.end()[0] == 0


def test_with_nothing_in_flight_the_process_ends_with_the_drain() -> None:
    with process("0", FAR) as server, server.wire() as idle, server.wire() as silent:
        assert server.ready(idle) == 200
        server.signal()
        assert server.end() == (0, "draining\nserved\n", "")
        assert idle.rest() == silent.rest() == b""


def test_an_application_that_does_not_let_go_cannot_hold_the_process() -> None:
    with process("0", "0", "--stuck") as server, server.stream("/endless") as stream:
        server.signal()
        assert not stream.rest().endswith(b"0\r\n\r\n")  # cut: nobody can take it for complete
        code, out, _ = server.end()
        assert code == 0
        assert out == "draining\ninterrupting 1\nlet go\nlost gone\nserved\n"


def test_a_client_that_does_not_read_cannot_hold_the_process() -> None:
    with process("0", "200") as server, server.wire() as stalled:
        stalled.send(b"GET /flood HTTP/1.1\r\nHost: a\r\n\r\n")
        stalled.until(b"data: tick\n\n")
        server.signal()
        code, out, _ = server.end()
        assert code == 0
        assert out == "draining\ninterrupting 1\nlost gone\nserved\n"


def test_the_last_bytes_of_an_interrupted_stream_still_leave() -> None:
    with process("0", "0") as server, server.stream("/burst") as stream:
        server.signal()
        assert stream.rest().endswith(b"data: error\n\n\r\n0\r\n\r\n")
        assert server.end() == (0, "draining\ninterrupting 1\nserved\n", "")


def test_each_listener_has_its_port_and_its_headers() -> None:
    with process("0", FAR) as server:
        for port in server.ports:
            with Wire(port) as wire:
                wire.send(b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n")
                answer = wire.answer()
                assert answer.status == 200
                assert answer.headers["date"].endswith(" GMT")
                assert "server" not in answer.headers


def test_the_date_is_kept() -> None:
    with process("0", FAR) as server, server.wire() as wire:

        def date() -> str:
            wire.send(b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n")
            return wire.answer().headers["date"]

        first = date()
        eventually(lambda: date() != first)


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "0", "0", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: cannot listen on 127.0.0.1:{port}: the port is in use\n"


# --- in this process ------------------------------------------------------------------------------------------------


class Quiet:
    """An application for a server that is never asked anything."""

    async def __call__(self, scope: object, receive: object, send: object) -> None:
        raise AssertionError("unreachable")

    def begin_drain(self) -> None:
        pass

    async def interrupt_all(self) -> None:
        pass


def serve(*addresses: tuple[str, int], **callbacks: object) -> None:
    app = Quiet()
    server = Server(
        app,
        [Listener(app, host, port) for host, port in addresses],
        limits=Limits(),
        drain_ms=0,
        grace_ms=0,
        own_signals=False,
        **callbacks,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.serve())


def test_when_one_address_fails_none_stays_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as spare:
        free = spare.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ListenFailed, match="the port is in use"):
            serve(("127.0.0.1", free), ("127.0.0.1", taken.getsockname()[1]))
        socket.create_server(("127.0.0.1", free)).close()


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("host.invalid", "the host name is not known here"),
        ("192.0.2.1", "this machine has no such address"),
        ("2001:db8::1", r"cannot listen on \[2001:db8::1\]:0: "),
    ],
)
def test_an_address_that_cannot_be_bound_says_why(host: str, reason: str) -> None:
    with pytest.raises(ListenFailed, match=reason):
        serve((host, 0))


def test_a_stop_before_it_is_ready_ends_it_at_once() -> None:
    ready: list[int] = []
    app = Quiet()
    server = Server(
        app,
        [Listener(app, "127.0.0.1", 0)],
        limits=Limits(),
        drain_ms=int(FAR),
        grace_ms=int(FAR),
        on_ready=lambda host, port: ready.append(port),
        own_signals=False,
    )
    server.stop()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(server.serve(), PATIENCE))
    assert ready == []


def test_a_fault_while_starting_closes_the_listeners() -> None:
    ports: list[int] = []

    def fail(host: str, port: int) -> None:
        ports.append(port)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        serve(("127.0.0.1", 0), on_ready=fail)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[0]), timeout=PATIENCE)


def test_a_fault_of_the_interruption_comes_after_the_sockets_are_cut() -> None:
    class Faulty(Quiet):
        async def __call__(self, scope: object, receive: object, send: object) -> None:
            server.stop()
            lost = asyncio.Event()
            scope["extensions"]["breakwater"].on_lost(lambda reason: lost.set())  # type: ignore[index]
            await lost.wait()

        async def interrupt_all(self) -> None:
            raise ValueError("no")

    async def main() -> None:
        task = asyncio.create_task(server.serve())
        reader, writer = await asyncio.open_connection("127.0.0.1", await ready)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        with pytest.raises(ValueError, match="no"):
            await task

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        app = Faulty()
        ready: asyncio.Future[int] = runner.get_loop().create_future()
        server = Server(
            app,
            [Listener(app, "127.0.0.1", 0)],
            limits=Limits(),
            drain_ms=0,
            grace_ms=0,
            on_ready=lambda host, port: ready.set_result(port),
            own_signals=False,
        )
        started = time.monotonic()
        runner.run(main())
        assert time.monotonic() - started < PATIENCE
