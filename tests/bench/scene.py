"""The scene of a run: certificates, upstream, load, reference apps and the proxy, each ready, each ended at the end."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import trustme

from tests import redis_server
from tests.bench.measure import DIRECT, PROXY, REDIS, Server, progress
from tests.bench.payloads import LONG_WINDOWS
from tests.bench.processes import Child, Cores, LoadWorker, Redis, Upstream, free_port

MEASURED_PACKAGES: Final = ("breakwater", "uvicorn", "uvloop", "httptools", "msgspec", "orjson")
CONFIG: Final = """\
listen: {{host: 127.0.0.1, port: {port}, drain_ms: 0, grace_ms: 1000}}
providers:
  up:
    kind: openai
    base_url: "{base_url}"
    api_key: sk-bench-0123456789abcdef
    ca_file: {ca}
"""

PRICE: Final = ", price: {input: 0.15, cached_input: 0.075, output: 0.60}"
WINDOWS: Final = {"*": 2_000_000, **LONG_WINDOWS}
"""By model. Most bodies fit into theirs by their mere size, as they do in service."""
BUDGET: Final = """\
state: redis://127.0.0.1:{port}/0
budget: {{requests_per_minute: 10000000, tokens_per_minute: 2000000000, usd_per_day: 100000}}
"""
"""Limits that nobody meets, in three dimensions and two kinds of window."""


@dataclass(slots=True)
class Scene:
    """What a run needs. Whatever is started on `stack` ends with it, last first."""

    stack: ExitStack
    directory: Path
    cores: Cores
    upstream: Upstream
    load: LoadWorker
    store: Redis | None
    """None: there is no redis-server to run here."""
    ca: Path

    @classmethod
    def set(cls, stack: ExitStack, directory: Path) -> Scene:
        """Makes a CA and a certificate, starts upstream and load."""
        authority = trustme.CA()
        ca, cert = directory / "ca.pem", directory / "cert.pem"
        authority.cert_pem.write_to_path(ca)
        authority.issue_cert("127.0.0.1", "localhost").private_key_and_cert_chain_pem.write_to_path(cert)
        cores = Cores.split()
        upstream = stack.enter_context(Upstream(cores, directory, cert))
        load = stack.enter_context(LoadWorker(cores, directory))
        try:
            store = stack.enter_context(Redis(cores, directory))
        except redis_server.Unavailable as missing:
            progress(f"nothing is measured with Redis: {missing}")
            store = None
        return cls(stack, directory, cores, upstream, load, store, ca)

    def direct(self, *, tls: bool = False) -> Server:
        port = self.upstream.tls_port if tls else self.upstream.port
        return Server(DIRECT, self.upstream, port, ca=str(self.ca) if tls else None)

    def start(self, name: str, *, tls: bool = False, profile: Path | None = None) -> tuple[Server, float]:
        """Starts a server in front of the upstream (its TLS side if `tls`), ready; and the seconds that took."""
        label = f"{name}-tls" if tls else name
        progress(f"starting {label}")
        port = free_port()
        command = self._proxy(label, port, tls) if name in (PROXY, REDIS) else self._app(name, port, tls)
        if profile is not None:
            command = ["-m", "tests.bench.profiled", str(profile), *command[1:]]
        log = self.directory / f"{label}.log"
        child = self.stack.enter_context(Child(label, [sys.executable, *command], self.cores.server, log))
        return Server(name, child, port, store=self.store if name == REDIS else None), child.wait_ready(port)

    def _app(self, name: str, port: int, tls: bool) -> list[str]:
        ca = ["--ca", str(self.ca)] if tls else []
        return ["-m", "tests.bench.apps", name, "--port", str(port), "--upstream", self._origin(tls), *ca]

    def _proxy(self, label: str, port: int, tls: bool) -> list[str]:
        config = self.directory / f"{label}.yaml"
        text = CONFIG.format(port=port, base_url=self._origin(tls) + "/v1", ca=f'"{self.ca}"' if tls else "null")
        text += _models(PRICE if label == REDIS else "")
        if label == REDIS:
            assert self.store is not None
            text += BUDGET.format(port=self.store.port)
        config.write_text(text)
        return ["-m", "proxy", "serve", "-c", str(config)]

    def _origin(self, tls: bool) -> str:
        return f"https://127.0.0.1:{self.upstream.tls_port}" if tls else f"http://127.0.0.1:{self.upstream.port}"

    def facts(self) -> dict[str, Any]:
        """The machine, the versions, and who ran where."""
        return {
            "machine": {
                "cpu": _cpu_model(),
                "cores": os.cpu_count(),
                "kernel": f"{platform.system()} {platform.release()}",
                "python": platform.python_version(),
                "load_average": os.getloadavg()[0],
            },
            "versions": {name: version(name) for name in MEASURED_PACKAGES},
            "pinned": {
                "server_under_test": sorted(self.cores.server),
                "upstream_and_load": sorted(self.cores.rest),
            },
            "logs": "on, as by default, written to a file",
        }


def _models(more: str) -> str:
    lines = [f'      "{name}": {{context_window: {window}{more}}}' for name, window in WINDOWS.items()]
    return "\n".join(["    models:", *lines, ""])


def headline(facts: dict[str, Any]) -> str:
    """The facts as the lines above the table."""
    machine, pinned = facts["machine"], facts["pinned"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    where = (
        f"the server under test on {pinned['server_under_test']}, upstream and load on {pinned['upstream_and_load']}"
        if pinned["server_under_test"]
        else "nothing (one core only): upstream and load compete with the server under test"
    )
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, load average {machine['load_average']:.2f}\n"
        f"Python {machine['python']}, {versions}\n"
        f"Pinned: {where}. Logs: {facts['logs']}.\n"
        f"Median of {facts['rounds']} interleaved rounds; ratios are taken within a round."
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
