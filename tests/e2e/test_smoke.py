"""The shortest way through: the application on a loop, and as a process."""

from __future__ import annotations

import httpx2
import pytest

from tests.clear import CLEAR
from tests.e2e.stack import serving, stack

CONFIG = {"providers": {"mock": {"kind": "mock"}}, "listen": {"drain_ms": 0, "grace_ms": 1000}}
ASK = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello!"}]}


@pytest.mark.anyio
async def test_on_the_loop() -> None:
    async with stack(CONFIG) as running, httpx2.AsyncClient(base_url=running.url, verify=CLEAR) as client:
        answer = await client.post("/v1/chat/completions", json=ASK)
        assert answer.status_code == 200
        await running.quiet()
        assert [event.status for event in running.outcomes()] == [200]


def test_as_a_process() -> None:
    with serving(CONFIG) as process, httpx2.Client(base_url=process.url, verify=CLEAR) as client:
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
        (line,) = process.wait_for("request.finished")
        assert line["status"] == 200
        assert process.stop() == 0
