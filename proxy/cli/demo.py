"""`breakwater demo`: the proxy with no key, no file and no Redis, and what to type at it.

It serves the built-in mock provider; with `OPENAI_API_KEY` in the environment, OpenAI itself.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Final

from proxy.cli.serve import read, refuse_open_door, serve
from proxy.observability.logs import FriendlyLog, setup_logging, wants_colour
from proxy.observability.scrub import Scrubber

_FAULTS: Final = ("mock/slow", "mock/429", "mock/500", "mock/cut", "mock/stall")
"""Models that fail; each is an entry of its own, so that it opens no circuit but its own."""
_MODELS: Final = "".join(f"  - {{name: {name}, targets: [{name}]}}\n" for name in _FAULTS)
_MOCK: Final = f"""\
providers:
  mock: {{kind: mock, tokens_per_second: 60, first_token_ms: 150}}
  backup: {{kind: mock, seed: 1, tokens_per_second: 60, first_token_ms: 150}}
models:
{_MODELS}\
  - {{name: "mock/*", targets: ["mock/*"]}}
  - {{name: "*", targets: ["mock/*", "backup/*"]}}
fault_tolerance: {{circuit_breaker: {{recovery_timeout_ms: 10000}}}}
"""
_OPENAI: Final = f"""\
providers:
  openai: {{kind: openai, api_key: "${{OPENAI_API_KEY}}"}}
  mock: {{kind: mock, tokens_per_second: 60, first_token_ms: 150}}
models:
{_MODELS}\
  - {{name: "mock/*", targets: ["mock/*"]}}
  - {{name: "*", targets: ["openai/*"]}}
"""
_ADMIN_KEYS: Final = "BREAKWATER_ADMIN__KEYS"
_DRAIN_MS: Final = 0
_GRACE_MS: Final = 2000


def run(host: str, port: int) -> None:
    """Serves until interrupted. Exits with 1 when it cannot listen."""
    real = bool(os.environ.get("OPENAI_API_KEY"))
    admin_key = f"demo-{secrets.token_hex(8)}"  # a page that a browser shows must not know it
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "demo.yaml"
        file.write_text(_OPENAI if real else _MOCK)
        flags = {"listen.host": host, "listen.port": port, "listen.drain_ms": _DRAIN_MS, "listen.grace_ms": _GRACE_MS}
        loaded = read(file, {_ADMIN_KEYS: admin_key, **os.environ}, flags)
    refuse_open_door(loaded, insecure=False)
    shown = f"${_ADMIN_KEYS}" if _ADMIN_KEYS in os.environ else admin_key
    scrubber = Scrubber(loaded.settings.secrets(), texts=loaded.settings.observability.scrub_secrets)
    logging = setup_logging(sys.stderr, scrubber, "warning", plain=True)
    log = FriendlyLog(logging.writer, scrubber, colour=wants_colour(sys.stderr, dict(os.environ)))
    serve(loaded, scrubber, logging, log, on_listening=lambda at, on: print(_welcome(at, on, real, shown), flush=True))


def _welcome(host: str, port: int, real: bool, admin_key: str) -> str:
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

Faults to try as the model: {", ".join(_FAULTS)}. Metrics: {url}/metrics
{"" if real else _outage(url, admin_key)}
Requests appear below; Ctrl-C ends it.
"""


def _outage(url: str, admin_key: str) -> str:
    return f"""
Rehearse an outage: the first line makes the provider mock answer 503 to everything, and the next answers come from
backup. After five failures the circuit of mock is open: it is asked no more, but for a probe about every ten seconds.
The last line ends the outage.

curl -s -X POST {url}/v1/__outage
for i in 1 2 3 4 5 6 7; do curl -s -o /dev/null -D - {url}/v1/chat/completions -H 'content-type: application/json' \\
  -d '{{"model": "any", "messages": [{{"role": "user", "content": "Hello!"}}]}}' | grep -i x-breakwater-provider; done
curl -s {url}/metrics | grep ^breakwater_circuit
curl -s {url}/admin/circuits -H "authorization: Bearer {admin_key}"
curl -s -X DELETE {url}/v1/__outage
"""


def _python() -> str:
    """The interpreter that has the packages, as short as it can be typed from here."""
    here = Path(sys.executable)
    try:
        return str(here.relative_to(Path.cwd()))
    except ValueError:
        return str(here)
