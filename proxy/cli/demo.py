"""`breakwater demo`: the proxy with no key, no file and no Redis, and what to type at it.

It serves the built-in mock provider; with `OPENAI_API_KEY` in the environment, OpenAI itself.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

from proxy.cli.serve import read, refuse_open_door, serve
from proxy.observability.logs import FriendlyLog, setup_logging, wants_colour
from proxy.observability.scrub import Scrubber

_MOCK: Final = """\
providers:
  mock: {kind: mock, tokens_per_second: 60, first_token_ms: 150}
models:
  - {name: "mock/*", targets: ["mock/*"]}
  - {name: "*", targets: ["mock/*"]}
"""
_OPENAI: Final = """\
providers:
  openai: {kind: openai, api_key: "${OPENAI_API_KEY}"}
  mock: {kind: mock, tokens_per_second: 60, first_token_ms: 150}
models:
  - {name: "mock/*", targets: ["mock/*"]}
  - {name: "*", targets: ["openai/*"]}
"""
_DRAIN_MS: Final = 0
_GRACE_MS: Final = 2000


def run(host: str, port: int) -> None:
    """Serves until interrupted. Exits with 1 when it cannot listen."""
    real = bool(os.environ.get("OPENAI_API_KEY"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "demo.yaml"
        file.write_text(_OPENAI if real else _MOCK)
        flags = {"listen.host": host, "listen.port": port, "listen.drain_ms": _DRAIN_MS, "listen.grace_ms": _GRACE_MS}
        loaded = read(file, os.environ, flags)
    refuse_open_door(loaded, insecure=False)
    scrubber = Scrubber(loaded.settings.secrets(), texts=loaded.settings.observability.scrub_secrets)
    logging = setup_logging(sys.stderr, scrubber, "warning", plain=True)
    log = FriendlyLog(logging.writer, scrubber, colour=wants_colour(sys.stderr, dict(os.environ)))
    serve(loaded, scrubber, logging, log, on_listening=lambda at, on: print(_welcome(at, on, real), flush=True))


def _welcome(host: str, port: int, real: bool) -> str:
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    model = "gpt-4o-mini"
    what = (
        "OpenAI, with OPENAI_API_KEY from the environment; models mock/* are answered by the built-in mock"
        if real
        else "the built-in mock provider: no key, no cost, no network (set OPENAI_API_KEY to reach OpenAI)"
    )
    needs = "" if importlib.util.find_spec("openai") else ", after: pip install openai"
    return f"""\
Breakwater listens on {url} and serves {what}.

Try it with curl:

curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\
  -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'

Point any OpenAI SDK at it:

export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=anything

Or paste this into {_python()}{needs}:

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="anything")
ask = {{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}
print(client.chat.completions.create(**ask).choices[0].message.content)
print(*(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)), sep="")

Faults to try as the model: mock/slow, mock/429, mock/500, mock/cut, mock/stall. Metrics: {url}/metrics

Requests appear below; Ctrl-C ends it.
"""


def _python() -> str:
    """The interpreter that has the packages, as short as it can be typed from here."""
    here = Path(sys.executable)
    try:
        return str(here.relative_to(Path.cwd()))
    except ValueError:
        return str(here)
