"""`breakwater usage` against a running process and a real Redis, and what it says when nobody can answer."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from tests.clear import CLEAR
from tests.cli.inside import inside
from tests.e2e.stack import ServeProcess, serving
from tests.redis_server import RedisServer, redis_binary, redis_server, running

__all__ = ["redis_binary", "redis_server"]  # fixtures, found here by pytest
pytestmark = pytest.mark.slow

SCRIPT = Path(sys.executable).parent / "breakwater"
ADMIN, ACME, BETA = "bw-admin-0123456789abcdef", "bw-acme-0123456789abcdef", "bw-beta-0123456789abcdef"
ASK = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 20}
CONFIG: dict[str, Any] = {
    "providers": {"mock": {"kind": "mock", "models": {"*": {"price": {"input": 1000, "output": 2000}}}}},
    "tenants": [{"name": "acme", "keys": [ACME]}, {"name": "beta", "keys": [BETA]}],
    "listen": {"drain_ms": 0, "grace_ms": 1000},
    "admin": {"keys": [ADMIN]},
}


def usage(file: Path, *arguments: str | int) -> subprocess.CompletedProcess[str]:
    command = [SCRIPT, "usage", "-c", file, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def written(folder: Path, **sections: Any) -> Path:
    file = folder / "breakwater.yaml"
    file.write_text(yaml.safe_dump({**CONFIG, **sections}, sort_keys=False))
    return file


def ask(process: ServeProcess, key: str, **headers: str) -> float:
    """What it cost."""
    answer = httpx2.post(
        f"{process.url}/v1/chat/completions",
        json=ASK,
        headers={"authorization": f"Bearer {key}", **headers},
        timeout=20,
        verify=CLEAR,
    )
    assert answer.status_code == 200
    return float(answer.headers["x-breakwater-cost-usd"])


def test_a_running_process_tells_what_was_used(tmp_path: Path) -> None:
    file = written(tmp_path)
    with serving(file) as process:
        cost = [ask(process, ACME, **{"x-breakwater-tags": "=team"}), ask(process, ACME), ask(process, BETA)]
        process.wait_for("request.finished", 3)
        told = json.loads(usage(file, "--json", "--port", process.port).stdout)
        assert [(row["tenant"], row["model"], row["requests"]) for row in told["rows"]] == [
            ("acme", "*", 2),
            ("beta", "*", 1),
        ]
        assert float(told["total"]["cost_usd"]) == pytest.approx(sum(cost), abs=1e-12)
        done = usage(file, "--csv", "--by", "tags,quality", "--since", "1h", "--port", process.port)
        head, *rows = csv.reader(done.stdout.splitlines())
        assert head[:3] == ["tags", "quality", "requests"]
        assert sorted(row[:3] for row in rows) == [["", "true", "2"], ["'=team", "true", "1"]]
        table = usage(file, "--port", process.port)
        assert (table.returncode, table.stderr) == (0, "")
        assert table.stdout.splitlines()[-1].split()[:2] == ["total", "3"]
        answer = httpx2.get(
            f"{process.url}/admin/usage",
            params={"format": "csv", "by": "tenant"},
            headers={"authorization": f"Bearer {ADMIN}"},
            verify=CLEAR,
        )
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        assert answer.text.splitlines()[1].startswith("acme,2,")
        wrong = written(tmp_path, admin={"keys": ["bw-another-0123456789abcdef"]})
        done = usage(wrong, "--port", process.port)
        assert (done.returncode, done.stdout) == (1, "")
        assert "does not take the first of admin.keys" in done.stderr


def test_a_redis_is_read_whether_or_not_anybody_runs(tmp_path: Path, redis_server: RedisServer) -> None:
    file = written(tmp_path, state=redis_server.url, state_namespace=f"usage-{os.getpid()}", admin={"keys": []})
    empty = usage(file)
    assert (empty.returncode, empty.stderr) == (0, "")
    assert empty.stdout.splitlines()[-1].split()[:2] == ["total", "0"]
    with serving(file) as one, serving(file) as two:
        cost = ask(one, ACME) + ask(two, ACME)
        for process in (one, two):
            process.wait_for("request.finished")
            assert process.stop() == 0
    told = json.loads(usage(file, "--json", "--by", "tenant").stdout)
    (row,) = told["rows"]
    assert (row["tenant"], row["requests"]) == ("acme", 2)
    assert float(row["cost_usd"]) == pytest.approx(cost, abs=1e-12)


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = taken.getsockname()[1]  # bound, and nobody listens
        cases: list[tuple[Path, tuple[str | int, ...], int, str]] = []
        for name, sections, arguments, code, words in (
            ("a", {}, ("--port", nobody), 1, f"usage: nobody listens at 127.0.0.1:{nobody}"),
            ("b", {"admin": {"keys": []}}, (), 1, "takes an admin key"),
            ("c", {"listen": {"port": 0}}, (), 1, "say with --port"),
            ("d", {"state": f"redis://127.0.0.1:{nobody}"}, (), 1, "usage: the store does not answer"),
            ("e", {}, ("--since", "yesterday"), 2, "--since is a span of time such as 30m, 24h or 7d"),
            ("f", {}, ("--by", "colour"), 2, "--by is a list of: tenant, key"),
            ("g", {}, ("--json", "--csv"), 2, "exclude each other"),
        ):
            (tmp_path / name).mkdir()
            cases.append((written(tmp_path / name, **sections), arguments, code, words))
        for file, arguments, code, words in cases:
            done = inside("usage", "-c", file, *map(str, arguments))
            assert (done.returncode, done.stdout) == (code, "")
            assert words in done.stderr
            assert "Traceback" not in done.stderr
            assert len(done.stderr.splitlines()) == 1


def test_another_server_is_not_believed(tmp_path: Path) -> None:
    with serving({**CONFIG, "admin": {"keys": []}}) as process:
        done = usage(written(tmp_path), "--port", process.port)
        assert (done.returncode, done.stdout) == (1, "")
        assert "has no /admin" in done.stderr


def test_help_is_there_at_once() -> None:
    best = 1.0
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run([SCRIPT, "usage", "--help"], capture_output=True, text=True, timeout=30)
        best = min(best, time.perf_counter() - started)
        assert "--since" in done.stdout
    assert best < 1.0  # 200 ms where nothing else runs


IMPORTED = "import sys; from proxy.cli import app; print('\\n'.join(sys.modules))"


def test_the_command_line_alone_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, timeout=30, check=True)
    assert {"asyncio", "pydantic", "msgspec", "redis", "httpx2", "fastapi"}.isdisjoint(done.stdout.split())


# -- the ledger's file, by processes that end in all ways ------------------------------------------------------------


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def spent_today(process: ServeProcess, tenant: str) -> float:
    headers = {"authorization": f"Bearer {ADMIN}"}
    (one,) = httpx2.get(f"{process.url}/admin/budgets/{tenant}", headers=headers, verify=CLEAR).json()
    return float(one["windows"]["usd_per_day"]["spent"])


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_knows_what_was_spent_however_the_process_ended(tmp_path: Path, end: signal.Signals) -> None:
    ledger = tmp_path / "ledger.jsonl"
    file = written(tmp_path, ledger={"sinks": [{"file": "ledger.jsonl"}]}, budget={"usd_per_day": 10})
    with serving(file) as process:
        cost = sum(ask(process, key) for key in (ACME, ACME, BETA))
        if end == signal.SIGKILL:
            deadline = time.monotonic() + 10
            while len(lines(ledger)) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        process.stop(end)
    assert len(lines(ledger)) == 3
    assert sum(float(line["cost_usd"]) for line in lines(ledger)) == pytest.approx(cost, abs=1e-12)
    text = ledger.read_text()
    assert all(secret not in text for secret in (ADMIN, ACME, BETA, "Hello!"))
    with serving(file) as process:
        (restored,) = process.wait_for("ledger.restored")
        assert (restored["records"], restored["complete"]) == (3, True)
        assert spent_today(process, "acme") + spent_today(process, "beta") == pytest.approx(cost, abs=1e-12)
        ask(process, ACME)
    assert len(lines(ledger)) in (3, 4)  # killed, so the last may be missing


def test_with_one_redis_each_request_is_written_once_however_many_processes_write(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    with running(tmp_path / "redis") as server:
        sinks = [{"file": "one.jsonl"}, {"file": "two.jsonl"}]
        file = written(tmp_path, state=server.url, ledger={"sinks": sinks})
        with serving(file) as one, serving(file) as two:
            for _ in range(3):
                ask(one, ACME)
                ask(two, BETA)
            assert one.stop() == 0
            ask(two, BETA)
            assert two.stop() == 0
        for name in ("one.jsonl", "two.jsonl"):
            found = lines(tmp_path / name)
            assert len({line["request_id"] for line in found}) == len(found) == 7


@pytest.mark.parametrize("budget", [{"mode": "off"}, {"mode": "observe", "tokens_per_minute": 1}, {}])
def test_what_reserves_nothing_is_written_too(tmp_path: Path, budget: dict[str, Any]) -> None:
    file = written(tmp_path, ledger={"sinks": [{"file": "ledger.jsonl"}]}, budget=budget)
    with serving(file) as process:
        cost = ask(process, ACME) + ask(process, BETA)
        assert process.stop() == 0
    found = lines(tmp_path / "ledger.jsonl")
    assert sorted(line["tenant"] for line in found) == ["acme", "beta"]
    assert sum(float(line["cost_usd"]) for line in found) == pytest.approx(cost, abs=1e-12)
