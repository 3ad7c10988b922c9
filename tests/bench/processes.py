"""The processes of a run: started pinned, ended by their id, and telling what they said when they died.

Each dies with the process that started it (the kernel sees to that), so that not even `kill -9` leaves one behind.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import msgspec

from tests import redis_server
from tests.bench import procfs
from tests.bench.load import Done, Job, Outcome

ROOT: Final = Path(__file__).resolve().parents[2]
READY_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0
POLL_SECONDS: Final = 0.002
TAIL_BYTES: Final = 3000
_PR_SET_PDEATHSIG: Final = 1
_libc: Final = ctypes.CDLL(None, use_errno=True)


class BenchError(Exception):
    """A run that cannot be finished; the message is for the person who started it."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Who runs where. Empty sets: one core only, nothing is pinned."""

    server: frozenset[int]
    rest: frozenset[int]

    @classmethod
    def split(cls) -> Cores:
        """The first core for the server under test, all others for upstream and load."""
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) < 2:
            return cls(frozenset(), frozenset())
        return cls(frozenset(allowed[:1]), frozenset(allowed[1:]))


class Child:
    """A process of ours. Its output goes to a file, which is where its last words are found."""

    def __init__(
        self,
        name: str,
        command: list[str],
        cores: frozenset[int],
        log: Path,
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
    ) -> None:
        self.name = name
        self._log = log
        self.started = time.perf_counter()
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=stdin,
                stdout=out if stdout is None else stdout,
                stderr=out,
                preexec_fn=lambda: _before_exec(cores),
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def rss_bytes(self) -> int:
        return procfs.rss_bytes(self.pid)

    def check(self) -> None:
        """Raises BenchError if the process is gone."""
        if (code := self.process.poll()) is not None:
            raise BenchError(f"{self.name} ended with exit code {code}. Its last words:\n{self.tail()}")

    def tail(self) -> str:
        """The end of what it wrote."""
        return self._log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")

    def wait_ready(self, port: int, path: str = "/livez") -> float:
        """Waits until GET `path` is answered with 200; returns the seconds since the process was started."""
        deadline = time.perf_counter() + READY_SECONDS
        while time.perf_counter() < deadline:
            if _answers(port, path):
                return time.perf_counter() - self.started
            self.check()
            time.sleep(POLL_SECONDS)
        raise BenchError(f"{self.name} was not ready after {READY_SECONDS} s. Its last words:\n{self.tail()}")

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to one that does not go."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Upstream(Child):
    """The upstream, with its ports."""

    def __init__(self, cores: Cores, directory: Path, cert: Path | None) -> None:
        command = [sys.executable, "-m", "tests.bench.upstream", *(["--cert", str(cert)] if cert else [])]
        super().__init__("upstream", command, cores.rest, directory / "upstream.log", stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        ports = json.loads(_line(self, self.process.stdout, READY_SECONDS))
        self.port: int = ports["port"]
        self.tls_port: int = ports["tls_port"] or 0


class LoadWorker(Child):
    """The load. Takes one job after another."""

    def __init__(self, cores: Cores, directory: Path) -> None:
        command = [sys.executable, "-m", "tests.bench.load"]
        log = directory / "load.log"
        super().__init__("load", command, cores.rest, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, job: Job, server: Child) -> Done:
        """Raises BenchError when an answer was wrong, late or missing, and says what became of `server`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(job) + b"\n")
        self.process.stdin.flush()
        line = _line(self, self.process.stdout, job.timeout + READY_SECONDS)
        outcome = msgspec.json.decode(line, type=Outcome)
        if outcome.done is None:
            server.check()
            raise BenchError(f"{server.name}, {job.ask}: {outcome.failed}\nIts last words:\n{server.tail()}")
        return outcome.done


class Redis(Child):
    """A store, on the core of the upstream. Raises `redis_server.Unavailable` where there is no server to run."""

    def __init__(self, cores: Cores, directory: Path) -> None:
        self.port = free_port()
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        super().__init__("redis", [str(redis_server.binary()), *options], cores.rest, directory / "redis.log")
        deadline = time.perf_counter() + READY_SECONDS
        while not self._asked(b"PING").startswith(b"+PONG"):
            if time.perf_counter() > deadline:
                raise BenchError(f"redis said nothing for {READY_SECONDS:.0f} s")
            self.check()
            time.sleep(POLL_SECONDS)

    def reads(self) -> int:
        """Reads from clients so far: what one write of a client brought is one."""
        for line in self._asked(b"INFO stats").splitlines():
            if line.startswith(b"total_reads_processed:"):
                return int(line.partition(b":")[2])
        raise BenchError("this redis-server does not count its reads")

    def _asked(self, command: bytes) -> bytes:
        answer = b""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(command + b"\r\nQUIT\r\n")
                while piece := connection.recv(65_536):
                    answer += piece
        except OSError:
            return b""
        return answer


def free_port() -> int:
    """A port that was free a moment ago, on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _before_exec(cores: frozenset[int]) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if cores:
        os.sched_setaffinity(0, cores)


def _line(child: Child, pipe: IO[bytes], timeout: float) -> bytes:
    """One line from a child, however long it takes up to `timeout` seconds. The child writes whole lines."""
    ready, _, _ = select.select([pipe], [], [], timeout)
    line = pipe.readline() if ready else b""
    if line:
        return line
    child.process.wait(STOP_SECONDS) if ready else None
    child.check()
    raise BenchError(f"{child.name} said nothing for {timeout:.0f} s")


def _answers(port: int, path: str) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"GET %s HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n" % path.encode())
            return connection.recv(64).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False
