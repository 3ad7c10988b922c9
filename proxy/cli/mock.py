"""`breakwater mock`: the fault-injecting upstream as a server of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import uvloop

from proxy.providers.mock.counting import real_counts
from proxy.providers.mock.handler import Mock
from proxy.providers.mock.script import Script, ScriptError, read_script
from proxy.providers.mock.server import MockServer


def run(
    host: str,
    port: int,
    seed: int,
    script: Path | None,
    *,
    tokens_per_second: float = 0.0,
    first_token_ms: float = 0.0,
    prompt_cache: bool = False,
) -> None:
    """Serves until SIGINT or SIGTERM. Exits with 1 if the script is wrong or the port is taken.

    The first line on stderr names the base URL, with the port that was taken if `port` is 0.
    """
    steps = _script(script) if script is not None else None
    mock = Mock(
        real_counts(),
        seed=seed,
        tokens_per_second=tokens_per_second,
        first_token_ms=first_token_ms,
        script=steps,
        prompt_cache=prompt_cache,
    )
    uvloop.run(_serve(MockServer(mock), host, port))


async def _serve(server: MockServer, host: str, port: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop.set)
    try:
        taken = await server.start(host, port)
    except OSError:
        sys.exit(f"breakwater mock: cannot listen on {_url(host, port)}")
    base = _url(host, taken)
    print(f"breakwater mock: {base}/v1 (books at {base}/__ledger)", file=sys.stderr, flush=True)
    await stop.wait()
    await server.aclose()


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _script(path: Path) -> Script:
    try:
        return read_script(path)
    except ScriptError as wrong:
        for problem in wrong.problems:
            print(f"{path}:{problem}", file=sys.stderr)
    except OSError:
        print(f"breakwater mock: cannot read {path}", file=sys.stderr)
    sys.exit(1)
