"""The administration's JSON API, through the edge that guards it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from proxy.admin.api import create_admin
from tests.clear import CLEAR
from tests.e2e.stack import Stack, stack

pytestmark = pytest.mark.anyio

KEY = "bw-admin-key-0123456789"
CONFIG: dict[str, Any] = {
    "providers": {"up": {"kind": "openai", "api_key": "sk-the-provider-s-secret"}},
    "admin": {"keys": [KEY]},
    "listen": {"drain_ms": 0, "grace_ms": 100},
}


def client(running: Stack, key: str = KEY) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=running.url, headers={"authorization": f"Bearer {key}"}, verify=CLEAR)


async def test_what_runs_here() -> None:
    async with stack(CONFIG) as running, client(running) as admin:
        answer = await admin.get("/admin/status")
        status = answer.json()
        assert answer.headers["x-request-id"].startswith("req_")
        assert set(status) == {"version", "config_hash", "uptime_seconds", "in_flight"}
        assert status["in_flight"] == 0
        assert status["uptime_seconds"] >= 0


async def test_the_configuration_in_force_without_its_secrets() -> None:
    async with stack(CONFIG) as running, client(running) as admin:
        answer = await admin.get("/admin/config")
        told = answer.json()
        assert told["config"]["listen"]["grace_ms"] == 100
        assert told["origins"]["listen.port"] == "default"
        assert told["config"]["providers"]["up"]["base_url"] == "https://api.openai.com/v1"
        assert CONFIG["providers"]["up"]["api_key"] not in answer.text
        assert KEY not in answer.text


async def test_its_description_names_every_route() -> None:
    async with stack(CONFIG) as running, client(running) as admin:
        paths = (await admin.get("/admin/openapi.json")).json()["paths"]
        names = ("status", "config", "budgets", "budgets/{tenant}", "usage")
        names += ("keys", "keys/{key_id}", "keys/{key_id}/rotate", "circuits", "circuits/{provider}/{model}")
        assert set(paths) == {f"/admin/{name}" for name in names}
        verbs = [verb for route in paths.values() for verb in route.values()]
        assert len(verbs) == 11
        assert all(verb["summary"] for verb in verbs)
        assert all(verb["description"] for verb in verbs)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/admin", 404, "unknown_url"),
        ("GET", "/admin/status/", 404, "unknown_url"),
        ("GET", "/admin/docs", 404, "unknown_url"),
        ("POST", "/admin/status", 405, "method_not_allowed"),
    ],
)
async def test_errors_have_the_envelope(method: str, path: str, status: int, code: str) -> None:
    async with stack(CONFIG) as running, client(running) as admin:
        answer = await admin.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers.get("allow") == ("GET" if status == 405 else None)


async def test_a_fault_of_ours_has_it_too() -> None:
    def fails() -> int:
        raise RuntimeError("a text that nobody should see")

    async def none(*_: Any) -> Any:
        return []

    app = create_admin(config_hash="h", effective=dict, in_flight=fails, budgets=none, usage=none, usage_csv=str)
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as admin:
        answer = await admin.get("/admin/status")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert "nobody" not in answer.text
        assert (await admin.get("/admin/config")).json() == {}


async def test_first_requests_at_once_all_get_their_answer() -> None:
    async with stack(CONFIG) as running, client(running) as admin:
        answers = await asyncio.gather(*[admin.get("/admin/status") for _ in range(8)])
        assert [answer.status_code for answer in answers] == [200] * 8
