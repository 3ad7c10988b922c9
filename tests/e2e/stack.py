"""The program under test, in two forms.

`ServeProcess` is `breakwater serve` as a process of its own: for signals, start-up, and what a user sees.
`stack()` is the same application on the test's own event loop: for tests that look inside (live exchanges, pool slots,
events). Both read a real configuration through the real loader.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from proxy.app import Running, create_app, refused_into
from proxy.config.loader import load
from proxy.edge.server import Listener, Server
from proxy.observability.events import Bus, Notice, RequestFinished, RequestRefused
from proxy.observability.scrub import Scrubber

Config = Mapping[str, Any]
ALONE: dict[str, Any] = {"fault_tolerance": {"mode": "off"}}
"""For tests of one attempt: what is broken on purpose is not tried again, and leaves nothing behind for the next."""
BREAKWATER = Path(sys.executable).parent / "breakwater"
START_SECONDS = 30.0


class ServeProcess:
    """`breakwater serve` on a free port. Its log is collected whole."""

    def __init__(
        self,
        config: Config | Path,
        *,
        env: Mapping[str, str] | None = None,
        arguments: tuple[str, ...] = (),
        program: tuple[str | Path, ...] = (BREAKWATER,),
    ) -> None:
        """`program` may stand in for the command: one with a fault planted in it."""
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        if isinstance(config, Path):
            file = config
        else:
            file = Path(self._folder.name) / "config.yaml"
            file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*program, "serve", "-c", file, "--port", "0", *arguments],
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        self.port = 0

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.port:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"serve did not start:\n{self.text()}")
            started = [line for line in self.lines() if line.get("event") == "server.started"]
            if started:
                self.port = int(started[0]["listen"].rpartition(":")[2])
                return
            time.sleep(0.02)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def text(self) -> str:
        """Everything logged so far."""
        return self._log.read_text(errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines logged so far; a line that is none is an error of the program."""
        text = self.text()
        try:
            whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
            return [json.loads(line) for line in whole if not line.startswith("warning: ")]
        except ValueError:
            raise AssertionError(f"a line of the log is not JSON:\n{text}") from None

    def wait_for(self, event: str, count: int = 1, seconds: float = 10.0) -> list[dict[str, Any]]:
        """The lines of an event, once there are `count` of them. The log is written up to 50 ms late."""
        deadline = time.monotonic() + seconds
        while len(found := [line for line in self.lines() if line.get("event") == event]) < count:
            assert time.monotonic() < deadline, f"{count} x {event} did not come:\n{self.text()}"
            time.sleep(0.02)
        return found

    def stop(self, sig: int = signal.SIGTERM, seconds: float = 20.0) -> int:
        """The exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._folder.cleanup()


@contextlib.contextmanager
def serving(
    config: Config | Path,
    *,
    env: Mapping[str, str] | None = None,
    arguments: tuple[str, ...] = (),
    program: tuple[str | Path, ...] = (BREAKWATER,),
) -> Iterator[ServeProcess]:
    """A ready `breakwater serve`, killed at the end if it still runs."""
    process = ServeProcess(config, env=env, arguments=arguments, program=program)
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.close()


@dataclass
class Stack:
    """A running application on the current loop. `events` are all that it emitted."""

    running: Running
    server: Server
    port: int
    events: list[Notice] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def outcomes(self) -> list[RequestFinished | RequestRefused]:
        """The one event of each request, in order of their ends."""
        return [event for event in self.events if isinstance(event, RequestFinished | RequestRefused)]

    async def quiet(self, seconds: float = 5.0) -> None:
        """Waits until nothing is in flight."""
        async with asyncio.timeout(seconds):
            while self.running.gateway.in_flight:
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def stack(config: Config, *, silence: float | None = None) -> AsyncIterator[Stack]:
    """The application with `config`, listening on a free port. `silence` replaces the seconds before a keep-alive."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        loaded = load(file, {}, {})
    events: list[Notice] = []
    bus = Bus()
    bus.subscribe(events.append)
    running = create_app(loaded, bus, Scrubber(loaded.settings.secrets()), lines_dropped=lambda: 0)
    if silence is not None:
        running.gateway.service.silence = silence
    listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    listen = loaded.settings.listen
    server = Server(
        running.gateway,
        [Listener(running.gateway, "127.0.0.1", 0)],
        limits=running.limits,
        drain_ms=listen.drain_ms,
        grace_ms=listen.grace_ms,
        on_ready=lambda _, port: listening.set_result(port),
        on_refused=refused_into(bus),
        own_signals=False,
    )
    await running.start()
    task = asyncio.create_task(server.serve())
    try:
        running.side.readiness = "ok"
        yield Stack(running, server, await listening, events)
    finally:
        server.stop()
        server.stop()
        await task
        await running.aclose()
