"""`breakwater serve`: one process, one event loop, until a signal says otherwise."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from proxy import __version__
from proxy.app import create_app, refused_into
from proxy.config.loader import Loaded, load
from proxy.config.problems import ConfigErrors
from proxy.edge.auth import is_loopback
from proxy.edge.server import Listener, ListenFailed, Server
from proxy.edge.server import run as run_loop
from proxy.observability.events import Bus, ServerStarted, ServerStopped, Subscriber
from proxy.observability.logs import JsonLog, Logging, setup_logging
from proxy.observability.scrub import Scrubber
from proxy.observability.stdlib import log_loop_error
from proxy.providers.mock.script import ScriptError


def run(config: Path, host: str | None, port: int | None, insecure: bool) -> None:
    """Serves the configuration at `config`. Exits with 1 when it cannot, after saying why in one line a problem."""
    loaded = read(config, os.environ, {"listen.host": host, "listen.port": port})
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    refuse_open_door(loaded, insecure)
    scrubber = Scrubber(loaded.settings.secrets(), texts=loaded.settings.observability.scrub_secrets)
    logging = setup_logging(sys.stderr, scrubber)
    serve(loaded, scrubber, logging, JsonLog(logging.writer, scrubber), insecure=insecure)


def read(config: Path | None, env: Mapping[str, str], flags: Mapping[str, object]) -> Loaded:
    """The configuration, or exit 1 with every problem on stderr."""
    try:
        return load(config, env, flags)
    except ConfigErrors as errors:
        for problem in errors.problems:
            print(problem, file=sys.stderr)
        sys.exit(1)


def refuse_open_door(loaded: Loaded, insecure: bool) -> None:
    """Without tenants anyone who can connect may spend: that is for loopback only."""
    host = loaded.settings.listen.host
    if not loaded.settings.tenants and not is_loopback(host) and not insecure:
        print(
            f"refusing to listen on {host} without tenants: anyone who can reach it could use the providers' keys. "
            "Configure tenants with keys, listen on 127.0.0.1, or pass --insecure.",
            file=sys.stderr,
        )
        sys.exit(1)


def serve(
    loaded: Loaded,
    scrubber: Scrubber,
    logging: Logging,
    log: Subscriber,
    *,
    insecure: bool = False,
    on_listening: Callable[[str, int], None] = lambda host, port: None,
) -> None:
    """Runs until stopped. `on_listening(host, port)` is called once with the API's real port."""
    try:
        run_loop(_serve(loaded, scrubber, logging, log, insecure, on_listening))
    except (ListenFailed, ScriptError) as failure:
        print(failure, file=sys.stderr)
        sys.exit(1)
    finally:
        logging.close()


async def _serve(
    loaded: Loaded,
    scrubber: Scrubber,
    logging: Logging,
    log: Subscriber,
    insecure: bool,
    on_listening: Callable[[str, int], None],
) -> None:
    settings = loaded.settings
    asyncio.get_running_loop().set_exception_handler(log_loop_error)
    started = time.monotonic()
    bus = Bus()
    bus.subscribe(log)
    running = create_app(loaded, bus, scrubber, lines_dropped=lambda: logging.writer.dropped, insecure=insecure)
    listen = settings.listen
    listeners = [Listener(running.gateway, listen.host, listen.port)]
    if listen.admin_port is not None:
        listeners.append(Listener(running.side, listen.host, listen.admin_port))
    ready: list[tuple[str, int]] = []

    def on_ready(host: str, port: int) -> None:
        ready.append((host, port))
        bus.emit(ServerStarted(version=__version__, listen=_address(host, port), config_hash=loaded.hash))
        if len(ready) == len(listeners):
            running.side.readiness = "ok"
            on_listening(*ready[0])

    server = Server(
        running.gateway,
        listeners,
        limits=running.limits,
        drain_ms=listen.drain_ms,
        grace_ms=listen.grace_ms,
        on_ready=on_ready,
        on_refused=refused_into(bus),
    )
    gc.collect()
    gc.freeze()  # what start-up made lives as long as the process: no collection need look at it again
    try:
        await running.start()
        await server.serve()
    finally:
        await running.aclose()
        if ready:
            bus.emit(ServerStopped(uptime=time.monotonic() - started, cut=running.gateway.interrupted))


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
