"""Processes that share one Redis, as their clients and their operators see it: real `serve` processes, a real server.

What a window took is counted from the replies themselves, and compared with what the processes say.
"""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import openai
import pytest
import trustme

from tests import clear
from tests.clear import CLEAR
from tests.e2e.stack import ServeProcess, serving
from tests.redis_server import RedisServer, free_port, redis_binary, running
from tests.store.faults import TcpProxy

__all__ = ["redis_binary"]  # a fixture, found here by pytest

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

ADMIN = "bw-admin-key-0123456789"
KEYS = {name: f"bw-{name}-0123456789abcdef" for name in ("local", "deny", "allow")}
PRICE = {"input": 1000, "output": 2000}
ASK: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 20}
PATIENT_MS = 2000
"""For what is not about time: a busy machine must not look like a store that is away."""


@pytest.fixture
def redis(redis_binary: Path, tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path) as server:
        yield server


def config(url: str, *, timeout_ms: int = PATIENT_MS, **sections: Any) -> dict[str, Any]:
    return {
        "listen": {"drain_ms": 0, "grace_ms": 1000},
        "state": url,
        "state_timeout_ms": timeout_ms,
        "admin": {"keys": [ADMIN]},
        "providers": {"mock": {"kind": "mock", "models": {"*": {"price": PRICE}}}},
        "tenants": [{"name": name, "keys": [key], "budget": {"on_store_error": name}} for name, key in KEYS.items()],
        **sections,
    }


@contextmanager
def two(settings: dict[str, Any]) -> Iterator[tuple[ServeProcess, ServeProcess]]:
    settings = {"state_namespace": f"of-{uuid4().hex[:8]}", **settings}
    with serving(settings) as one, serving(settings) as other:
        yield one, other


@asynccontextmanager
async def client_of(process: ServeProcess, key: str) -> AsyncIterator[httpx2.AsyncClient]:
    headers = {"authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=process.url, headers=headers, timeout=20, verify=CLEAR) as client:
        yield client


async def ask(process: ServeProcess, tenant: str, **more: Any) -> httpx2.Response:
    async with client_of(process, KEYS[tenant]) as client:
        return await client.post("/v1/chat/completions", json={**ASK, **more})


async def admin(process: ServeProcess, path: str) -> Any:
    async with client_of(process, ADMIN) as client:
        answer = await client.get(path)
        return answer.json() if "json" in answer.headers["content-type"] else answer.text


async def window(process: ServeProcess, tenant: str, name: str) -> dict[str, Any]:
    (scope,) = [one for one in await admin(process, f"/admin/budgets/{tenant}") if one["scope"] == "tenant"]
    found: dict[str, Any] = scope["windows"][name]
    return found


async def ready(process: ServeProcess) -> tuple[int, str]:
    async with httpx2.AsyncClient(base_url=process.url, verify=CLEAR) as client:
        assert (await client.get("/livez")).text == "ok"
        answer = await client.get("/readyz")
        return answer.status_code, answer.text


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.05)


async def until_ready(*processes: ServeProcess, state: tuple[int, str] = (200, "ok")) -> None:
    for process in processes:

        async def is_so(process: ServeProcess = process) -> bool:
            return await ready(process) == state

        await until(is_so)


def said(process: ServeProcess, event: str) -> list[dict[str, Any]]:
    return [line for line in process.lines() if line["event"] == event]


def error_of(answer: httpx2.Response) -> str:
    found: str = answer.json()["error"]["code"]
    return found


async def figures(process: ServeProcess) -> dict[str, float]:
    page = await admin(process, "/metrics")
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")}


# -- one budget ------------------------------------------------------------------------------------------------------


async def test_two_processes_spend_one_budget_and_not_a_token_more(redis: RedisServer) -> None:
    limit = 3000
    budget = {"tokens_per_minute": limit, "estimate": "max", "on_overrun": "cut"}
    with two(config(redis.url, budget=budget)) as processes:
        await until_ready(*processes)
        spent: list[int] = []
        refused = 0

        async def spend(process: ServeProcess, stream: bool) -> None:
            nonlocal refused
            async with openai.AsyncOpenAI(
                base_url=f"{process.url}/v1", api_key=KEYS["local"], max_retries=0, http_client=clear.async_client()
            ) as sdk:
                while True:
                    try:
                        if stream:
                            options = {"stream": True, "stream_options": {"include_usage": True}}
                            chunks = await sdk.chat.completions.create(**ASK, **options)  # type: ignore[call-overload]
                            spent.append(sum([one.usage.total_tokens async for one in chunks if one.usage]))
                        else:
                            spent.append((await sdk.chat.completions.create(**ASK)).usage.total_tokens)  # type: ignore[union-attr]
                    except openai.RateLimitError as error:
                        refused += error.code == "budget_exceeded"
                        return

        await asyncio.gather(*(spend(process, bool(turn % 2)) for turn in range(20) for process in processes))
        await spend(processes[0], stream=False)  # While others were under way, their reservations stood in the way.
        assert refused == 41
        assert limit - 120 <= sum(spent) <= limit, "less than the largest ask is left"

        async def is_booked() -> bool:
            found = [await window(process, "local", "tokens_per_minute") for process in processes]
            return all((one["spent"], one["reserved"]) == (sum(spent), 0) for one in found)

        await until(is_booked)
        usage = await admin(processes[0], "/admin/usage?since=1h&by=tenant")
        assert [(row["tenant"], row["requests"]) for row in usage["rows"]] == [("local", len(spent))]
        assert not any(said(process, "store.degraded") for process in processes)


async def test_scripts_may_be_flushed_at_any_time(redis: RedisServer) -> None:
    with serving(config(redis.url, budget={"tokens_per_minute": 10**6})) as process:
        await until_ready(process)
        total = 0
        for _ in range(5):
            redis.client().script_flush()
            answer = await ask(process, "deny")
            assert answer.status_code == 200
            total += answer.json()["usage"]["total_tokens"]
        assert (await window(process, "deny", "tokens_per_minute"))["spent"] == total
        assert not said(process, "store.degraded")


# -- a server that hangs ---------------------------------------------------------------------------------------------


async def test_a_server_that_hangs_holds_nobody_up_and_each_tenant_has_its_way(redis: RedisServer) -> None:
    with two(config(redis.url, timeout_ms=200, budget={"tokens_per_minute": 10**6})) as processes:
        await until_ready(*processes)
        await until_joined(*processes)
        tokens = dict.fromkeys(KEYS, 0)

        async def serve(process: ServeProcess, tenant: str, *, away: bool) -> int:
            begun = time.monotonic()
            answer = await ask(process, tenant)
            assert time.monotonic() - begun < 2, "nobody waits for a store that hangs"
            assert answer.headers.get("x-breakwater-degraded") == ("store" if away else None)
            if answer.status_code == 200:
                tokens[tenant] += answer.json()["usage"]["total_tokens"]
            else:
                assert error_of(answer) == "store_unavailable"
                assert answer.headers["retry-after"] == "1"
            return answer.status_code

        for tenant in KEYS:
            assert await serve(processes[0], tenant, away=False) == 200
        redis.signal(signal.SIGSTOP)
        try:
            await until_ready(*processes, state=(200, "degraded"))
            answers = [
                await asyncio.gather(*(serve(process, tenant, away=True) for _ in range(5)))
                for process in processes
                for tenant in KEYS
            ]
            assert answers == [[200] * 5, [503] * 5, [200] * 5] * 2
            await _degraded_everywhere(processes[0])
            page = await figures(processes[0])
            assert page["breakwater_degraded"] == 1
            assert sum(value for name, value in page.items() if name.startswith("breakwater_store_errors_total")) >= 1
        finally:
            redis.signal(signal.SIGCONT)
        await until_ready(*processes)
        for tenant in KEYS:
            assert await serve(processes[1], tenant, away=False) == 200

            async def is_booked(tenant: str = tenant) -> bool:
                found = await window(processes[0], tenant, "tokens_per_minute")
                return bool((found["spent"], found["reserved"]) == (tokens[tenant], 0))

            if tenant != "local":  # whose stream was not counted above
                await until(is_booked)
        usage = await admin(processes[1], "/admin/usage?since=1h&by=tenant")
        assert {row["tenant"]: row["requests"] for row in usage["rows"]} == {"local": 13, "deny": 2, "allow": 12}
        for process in processes:
            (degraded,) = said(process, "store.degraded")
            assert degraded["processes"] == 2
            assert len(process.wait_for("store.recovered")) == 1

        async def is_back() -> bool:
            return (await figures(processes[0]))["breakwater_degraded"] == 0

        await until(is_back)  # a page may be a second old


async def _degraded_everywhere(process: ServeProcess) -> None:
    """Every kind of reply says it: streams, refusals, what costs nothing."""
    async with client_of(process, KEYS["local"]) as client:
        async with client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as answer:
            assert answer.headers["x-breakwater-degraded"] == "store"
            assert [line async for line in answer.aiter_lines()][-2] == "data: [DONE]"
        for reply, status in (
            (await client.get("/v1/models"), 200),
            (await client.post("/v1/chat/completions", content=b"{"), 400),
            (await client.post("/v1/nothing"), 404),
        ):
            assert (reply.status_code, reply.headers.get("x-breakwater-degraded")) == (status, "store")


async def test_shares_of_both_add_up_to_the_limit_while_the_server_is_away(redis: RedisServer) -> None:
    with two(config(redis.url, timeout_ms=200, budget={"requests_per_minute": 10})) as processes:
        await until_ready(*processes)
        await until_joined(*processes)
        redis.stop()
        await until_ready(*processes, state=(200, "degraded"))
        for process in processes:
            codes = [(await ask(process, "local")).status_code for _ in range(8)]
            assert codes == [200] * 5 + [429] * 3


async def until_joined(*processes: ServeProcess) -> None:
    """Long enough that all have heard of all: two beats."""
    for process in processes:

        async def has_heard(process: ServeProcess = process) -> bool:
            return bool((await admin(process, "/admin/status"))["uptime_seconds"] > 3.0)

        await until(has_heard)


# -- a server that forgets -------------------------------------------------------------------------------------------


async def test_a_server_that_comes_back_empty_does_not_open_a_spent_budget(redis_binary: Path, tmp_path: Path) -> None:
    budget = {"usd_per_day": 0.60, "estimate": "max", "on_overrun": "cut"}
    port = free_port()
    with running(tmp_path, port=port) as first, two(config(first.url, timeout_ms=500, budget=budget)) as processes:
        await until_ready(*processes)
        await until_joined(*processes)
        spent = 0.0

        async def spend(process: ServeProcess, tenant: str = "local") -> int:
            nonlocal spent
            answer = await ask(process, tenant)
            if answer.status_code == 200 and tenant == "local":
                spent += float(answer.headers["x-breakwater-cost-usd"])
            return answer.status_code

        for _ in range(2):
            for process in processes:
                assert await spend(process) == 200
        first.stop()
        await until_ready(*processes, state=(200, "degraded"))
        away = [await spend(process) for process in processes]
        assert away == [200, 200], "each has a share of what was left"
        with running(tmp_path, port=port):
            await until_ready(*processes)
            while await spend(processes[0]) == 200:
                assert spent <= 0.60
            assert await spend(processes[1]) == 429
            assert 0.45 < spent <= 0.60

            async def is_booked() -> bool:
                found = [await window(process, "local", "usd_per_day") for process in processes]
                return all((float(one["spent"]), float(one["reserved"])) == (spent, 0.0) for one in found)

            spent = round(spent, 9)
            await until(is_booked)
            resets = [line for process in processes for line in said(process, "store.reset")]
            assert len(resets) == 2, "one of the empty server at the very start, one of the empty server after it"
            assert resets[-1]["scopes"] >= 1
            for process in processes:
                process.wait_for("store.recovered")  # a line is written up to 50 ms late
                assert len(said(process, "store.degraded")) == len(said(process, "store.recovered")) == 1


# -- a server that cannot be reached, or not yet ---------------------------------------------------------------------


async def test_a_server_that_appears_only_later_is_waited_for(redis_binary: Path, tmp_path: Path) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    with serving(config(url, budget={"requests_per_minute": 100})) as process:
        assert await ready(process) == (503, "starting")
        codes = {tenant: (await ask(process, tenant)).status_code for tenant in KEYS}
        assert codes == {"local": 503, "deny": 503, "allow": 200}
        assert error_of(await ask(process, "local")) == "store_unavailable"
        (line,) = process.wait_for("store.degraded")
        assert line["reason"] == "connect"
        with running(tmp_path, port=port):
            await until_ready(process)
            assert (await ask(process, "local")).status_code == 200
            assert (await ask(process, "deny")).status_code == 200
            assert (await window(process, "allow", "requests_per_minute"))["spent"] == 1
        assert len(said(process, "store.degraded")) == len(process.wait_for("store.recovered")) == 1


async def test_where_everybody_is_refused_it_is_not_ready(redis: RedisServer) -> None:
    tenants = [{"name": "deny", "keys": [KEYS["deny"]]}]
    budget = {"requests_per_minute": 100, "on_store_error": "deny"}
    with serving(config(redis.url, timeout_ms=200, budget=budget, tenants=tenants)) as process:
        await until_ready(process)
        redis.stop()
        await until_ready(process, state=(503, "unavailable"))
        assert (await ask(process, "deny")).status_code == 503


async def test_without_a_budget_nobody_is_refused_for_want_of_a_store(tmp_path: Path) -> None:
    tenants = [{"name": "deny", "keys": [KEYS["deny"]]}]
    with serving(config(f"redis://127.0.0.1:{free_port()}", tenants=tenants)) as process:
        await until_ready(process, state=(200, "degraded"))
        answer = await ask(process, "deny")
        assert (answer.status_code, answer.headers["x-breakwater-degraded"]) == (200, "store")


async def test_a_wrong_password_is_said_once_and_never_shown(redis_binary: Path, tmp_path: Path) -> None:
    wrong, right = "not-the-pa55word", "the-pa55word-itself"
    with running(tmp_path, "--requirepass", right) as server:
        url = f"redis://:{{}}@127.0.0.1:{server.port}/0"
        for password, code in ((wrong, 503), (right, 200)):
            settings = config(url.format(password), budget={"requests_per_minute": 100})
            with serving(settings) as process:
                if code == 200:
                    await until_ready(process)
                answer = await ask(process, "local")
                assert answer.status_code == code
                shown = (
                    answer.text + json.dumps(await admin(process, "/admin/config")) + await admin(process, "/metrics")
                )
                if code == 503:
                    (line,) = process.wait_for("store.degraded")
                    assert line["reason"] == "refused"
                    assert await ready(process) == (503, "starting")
                assert process.stop() == 0
                assert password not in shown + process.text()


async def test_tls_is_spoken_and_a_stranger_s_certificate_is_not_taken(redis: RedisServer, tmp_path: Path) -> None:
    """The server speaks no TLS, so a proxy in front of it does."""
    authority, stranger = trustme.CA(), trustme.CA()
    for name, one in (("known.pem", authority), ("strange.pem", stranger)):
        one.cert_pem.write_to_path(str(tmp_path / name))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with TcpProxy(redis.port, context).running() as proxy:
        for name, code in (("known.pem", 200), ("strange.pem", 503)):
            url = f"rediss://127.0.0.1:{proxy.port}/0?ssl_ca_certs={tmp_path / name}"
            process = await asyncio.to_thread(started, config(url, budget={"requests_per_minute": 100}))
            try:
                await until_ready(process, state=(200, "ok") if code == 200 else (503, "starting"))
                assert (await ask(process, "local")).status_code == code
            finally:
                process.close()


def started(settings: dict[str, Any]) -> ServeProcess:
    process = ServeProcess(settings)
    process.wait_until_ready()
    return process


# -- a server that will not do ---------------------------------------------------------------------------------------


async def test_a_server_that_evicts_is_named_once_and_used(redis_binary: Path, tmp_path: Path) -> None:
    evicts = ("--maxmemory-policy", "allkeys-lru")
    with running(tmp_path, *evicts) as server, serving(config(server.url)) as process:
        await until_ready(process)
        (line,) = process.wait_for("store.misconfigured")
        assert (line["eviction"], line["shortcomings"], line["level"]) == ("allkeys-lru", ["eviction"], "warning")
        assert (await ask(process, "local")).status_code == 200
    with running(tmp_path) as server, serving(config(server.url)) as process:
        await until_ready(process)
        assert (await ask(process, "local")).status_code == 200
        assert process.stop() == 0
        assert not said(process, "store.misconfigured")
