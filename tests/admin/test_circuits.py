"""Circuits by hand, through the edge that guards the administration."""

from __future__ import annotations

from typing import Any

import pytest

from tests.admin.test_api import CONFIG, client
from tests.e2e.stack import stack

pytestmark = pytest.mark.anyio

MODELS: list[dict[str, Any]] = [
    {"name": "gpt-4o", "targets": ["up/llama"]},
    {"name": "meta/llama", "targets": [["up/llama"], "up/small"]},
    {"name": "*", "targets": ["up/*"]},
]


async def test_open_and_reset() -> None:
    async with stack({**CONFIG, "models": MODELS}) as running, client(running) as admin:
        assert (await admin.get("/admin/circuits")).json() == []
        opened = await admin.post("/admin/circuits/up/meta%2Fllama", json={"action": "open"})
        row = opened.json()
        assert opened.status_code == 200
        assert (row["provider"], row["model"], row["state"], row["scope"]) == ("up", "meta/llama", "open", "hand")
        assert row["fleet"] is True
        (shown,) = (await admin.get("/admin/circuits")).json()
        assert {**shown, "fleet": True} == {**row, "opened_by": shown["opened_by"]}
        assert [said["why"] for said in shown["opened_by"]] == ["by hand"]
        page = (await admin.get("/metrics")).text
        assert 'breakwater_circuit_state{provider="up",model="meta/llama"} 2' in page
        reset = await admin.post("/admin/circuits/up/meta/llama", json={"action": "reset"})
        assert (reset.json()["state"], reset.json()["opened_by"]) == ("closed", [])


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("up/gpt-4o", b'{"action": "open"}', 200, None),
        ("up/*", b'{"action": "open"}', 200, None),
        ("up/other", b'{"action": "open"}', 200, None),
        ("nobody/gpt-4o", b'{"action": "open"}', 404, "unknown_url"),
        ("up/gpt-3", b'{"action": "open"}', 404, "unknown_url"),
        ("up/llama", b'{"action": "open"}', 404, "unknown_url"),  # requests are counted by the names of entries
        ("up/", b'{"action": "open"}', 404, "unknown_url"),
        ("up/gpt-4o", b'{"action": "close"}', 400, "invalid_request"),
        ("up/gpt-4o", b'{"action": "open", "for": 1}', 400, "invalid_request"),
        ("up/gpt-4o", b"", 400, "invalid_request"),
        ("up/gpt-4o", b"\xff", 400, "invalid_request"),
    ],
)
async def test_only_what_is_configured_and_known(path: str, body: bytes, status: int, code: str | None) -> None:
    async with stack({**CONFIG, "models": MODELS}) as running, client(running) as admin:
        answer = await admin.post(f"/admin/circuits/{path}", content=body)
        assert answer.status_code == status
        assert answer.json().get("error", {}).get("code") == code


async def test_switched_off_there_are_none() -> None:
    config = {**CONFIG, "fault_tolerance": {"circuit_breaker": {"mode": "off"}}}
    async with stack(config) as running, client(running) as admin:
        assert (await admin.get("/admin/circuits")).json() == []
        answer = await admin.post("/admin/circuits/up/other", json={"action": "open"})
        assert answer.status_code == 400


async def test_not_without_the_admin_key() -> None:
    async with stack(CONFIG) as running, client(running, "bw-another-key-0123456789") as admin:
        assert (await admin.get("/admin/circuits")).status_code == 401
        assert (await admin.post("/admin/circuits/up/other", json={"action": "open"})).status_code == 401
