"""Keys that are made at run time: two `breakwater serve` on one Redis, the commands, and the admin API."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import yaml

from tests import clear
from tests.clear import CLEAR
from tests.cli.inside import inside
from tests.e2e.stack import BREAKWATER, ServeProcess, serving
from tests.redis_server import RedisServer, redis_binary, running

__all__ = ["redis_binary"]  # a fixture, found here by pytest
pytestmark = pytest.mark.slow

ADMIN = "bw-admin-key-0123456789"
CONFIGURED = "bw-acme-configured-0123456789"
PROMISED_SECONDS = 2.0
ASK: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}


class Site:
    """Two replicas, the file that they were started with, and the store that they share."""

    def __init__(self, file: Path, redis: RedisServer, replicas: list[ServeProcess]) -> None:
        self.file = file
        self.redis = redis
        self.replicas = replicas
        self.said = ""
        """All that commands wrote to stderr."""
        self.secrets: list[str] = []
        self.ids: list[str] = []

    def keys(self, *arguments: str, code: int = 0) -> str:
        """`breakwater keys`; what it wrote to stdout."""
        verb, *rest = arguments
        done = subprocess.run(
            [BREAKWATER, "keys", verb, "-c", self.file, *rest], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        self.said += done.stderr
        return done.stdout

    def make(self, *arguments: str) -> tuple[str, str]:
        """Id and secret of a new key of `acme`."""
        return self._noted(self.keys("create", "--tenant", "acme", "--json", *arguments))

    def rotate(self, key_id: str, overlap: str) -> str:
        return self._noted(self.keys("rotate", key_id, "--overlap", overlap, "--json"))[1]

    def _noted(self, made: str) -> tuple[str, str]:
        told = json.loads(made)
        self.secrets.append(told["key"])
        self.ids.append(told["id"])
        return told["id"], told["key"]

    def ask(self, secret: str, at: int = 0, **more: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {secret}"}
        return httpx2.post(
            f"{self.replicas[at].url}/v1/chat/completions",
            json={**ASK, **more},
            headers=headers,
            timeout=20,
            verify=CLEAR,
        )

    def statuses(self, secret: str) -> list[int]:
        return [self.ask(secret, at).status_code for at in range(len(self.replicas))]

    def soon(self, secret: str, status: int, due: float | None = None) -> None:
        """Both replicas answer so, in the time that is promised, counted from now or from `due`."""
        start = due or time.monotonic()
        while (found := self.statuses(secret)) != [status, status]:
            assert time.monotonic() - start < PROMISED_SECONDS, found
            time.sleep(0.02)

    def admin(self, method: str, path: str, at: int = 0, **more: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {ADMIN}"}
        return httpx2.request(
            method, f"{self.replicas[at].url}/admin/{path}", headers=headers, timeout=20, **more, verify=CLEAR
        )


@pytest.fixture(scope="module")
def site(redis_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("keys")
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(running(folder))
        file = folder / "breakwater.yaml"
        config = {
            "state": redis.url,
            "state_timeout_ms": 5000,  # a busy machine is not what is tested
            "admin": {"keys": [ADMIN]},
            "providers": {"m": {"kind": "mock"}},
            "tenants": [{"name": "acme", "keys": [CONFIGURED]}, {"name": "beta"}],
            "budget": {"tokens_per_minute": 1_000_000},
            "listen": {"drain_ms": 0, "grace_ms": 1000},
        }
        file.write_text(yaml.safe_dump(config))
        replicas = [stack.enter_context(serving(file)) for _ in range(2)]
        one = Site(file, redis, replicas)
        assert one.statuses(CONFIGURED) == [200, 200]  # an empty store has been opened
        yield one
        assert leaks(one) == ["control"]


def leaks(site: Site) -> list[str]:
    """Where a secret is found that should be in no place: in whole, or any twelve characters of it."""
    client = site.redis.client()
    places = {f"redis {name!r}": client.dump(name) or b"" for name in client.scan_iter("*")}
    places |= {f"log {at}": one.text().encode() for at, one in enumerate(site.replicas)}
    places["stderr"] = site.said.encode()
    places["list"] = site.keys("list", "--all", "--json").encode() + site.keys("list", "--all").encode()
    places["admin"] = site.admin("GET", "keys").content + site.admin("GET", "config").content
    places["admin"] += site.admin("GET", "usage?by=tenant,key").content + site.admin("GET", "budgets/acme").content
    places["metrics"] = httpx2.get(f"{site.replicas[0].url}/metrics", verify=CLEAR).content
    shown = subprocess.run([BREAKWATER, "config", "show", "-c", site.file], capture_output=True, timeout=60)
    places["config"] = shown.stdout + shown.stderr
    assert site.secrets
    assert all(key_id.encode() in places["list"] for key_id in site.ids)
    pieces = {secret[at : at + 12].encode() for secret in site.secrets for at in range(3, len(secret) - 11)}
    places["control"] = b"x" + site.secrets[-1][8:24].encode()  # a leak would be seen
    return [name for name, text in places.items() if any(piece in text for piece in pieces)]


def test_a_key_that_is_made_works_everywhere_and_one_that_is_revoked_nowhere(site: Site) -> None:
    key_id, secret = site.make("--name", "for the tests")
    assert secret.startswith("bw_")
    assert len(secret) == 46
    site.soon(secret, 200)
    with openai.OpenAI(
        base_url=f"{site.replicas[1].url}/v1", api_key=secret, max_retries=0, http_client=clear.client()
    ) as sdk:
        assert sdk.chat.completions.create(**ASK).choices
    assert json.loads(site.keys("revoke", key_id, "--json"))["state"] == "revoked"
    site.soon(secret, 401)
    assert site.ask(secret).json() == site.ask("bw-anything-else-0123456789").json()
    assert "already" not in site.said
    site.keys("revoke", key_id)  # once more is not an error
    assert "already" in site.said


def test_a_rotation_has_an_overlap_and_then_the_old_secret_is_nothing(site: Site) -> None:
    key_id, old = site.make()
    site.soon(old, 200)
    new = site.rotate(key_id, "4s")
    made = time.monotonic()
    site.soon(new, 200)
    assert site.statuses(old) == [200, 200]
    assert time.monotonic() - made < 4, "too slow a machine to see an overlap of 4 s"
    site.soon(old, 401, due=made + 4)
    last = site.rotate(key_id, "0s")
    site.soon(new, 401)
    site.soon(last, 200)


def test_a_key_expires_everywhere(site: Site) -> None:
    _, secret = site.make("--expires", "4s")
    made = time.monotonic()
    site.soon(secret, 200)
    site.soon(secret, 401, due=made + 4)


def test_a_key_reaches_its_own_models_of_those_of_its_tenant(site: Site) -> None:
    _, secret = site.make("--models", "gpt-4o*, o3*")
    site.soon(secret, 200)
    assert site.ask(secret, model="o3-mini").status_code == 200
    refused = site.ask(secret, model="gpt-5")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert site.ask(CONFIGURED, model="gpt-5").status_code == 200


def test_a_key_has_a_budget_of_its_own_in_all_replicas_and_through_a_rotation(site: Site) -> None:
    key_id, secret = site.make("--budget", "requests_per_minute=3", "--budget", "tokens_per_minute=50000")
    _, other = site.make()
    until(lambda: site.ask(other, 0).status_code == site.ask(other, 1).status_code == 200)
    assert [site.ask(secret, at).status_code for at in (0, 1, 0)] == [200, 200, 200]
    refused = site.ask(secret, 1)
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["code"], error["breakwater"]["scope"]) == ("budget_exceeded", "key")
    assert (error["breakwater"]["window"], error["breakwater"]["limit"]) == ("requests_per_minute", 3)
    assert refused.headers["x-ratelimit-limit-requests"] == "3"
    new = site.rotate(key_id, "24h")
    site.soon(new, 429)
    assert site.ask(other).status_code == site.ask(CONFIGURED).status_code == 200
    shown = {(one["scope"], one["name"]): one["windows"] for one in site.admin("GET", "budgets/acme").json()}
    assert shown["key", f"acme/{key_id}"]["requests_per_minute"]["spent"] == 3
    assert shown["tenant", "acme"]["requests_per_minute"]["spent"] > 3  # and its tenant's, both
    usage = site.admin("GET", "usage?by=key").json()["rows"]
    assert [row["requests"] for row in usage if row["key"] == key_id] == [3]


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PROMISED_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_secret_alone_is_on_stdout(site: Site) -> None:
    out = site.keys("create", "--tenant", "beta", "--expires", "90d")
    secret = out.rstrip("\n")
    assert out == secret + "\n"
    assert secret.startswith("bw_")
    site.secrets.append(secret)
    site.soon(secret, 200)
    table = site.keys("list", "--tenant", "beta").splitlines()
    assert table[0].split() == ["ID", "TENANT", "NAME", "STATE", "CREATED", "EXPIRES", "MODELS", "BUDGET"]
    (row,) = [line.split() for line in table[1:]]
    assert (row[1:4], row[6:]) == (["beta", "-", "live"], ["-", "-"])
    again = site.keys("rotate", row[0], "--overlap", "30m").rstrip("\n")
    site.secrets.append(again)
    site.soon(again, 200)


def test_the_admin_api_does_the_same(site: Site) -> None:
    wanted = {"tenant": "acme", "name": "x", "expires": "90d", "models": ["gpt-4o"], "budget": {"usd_per_day": 5}}
    answer = site.admin("POST", "keys", json=wanted)
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    key_id, secret = made["id"], made["key"]
    site.secrets.append(secret)
    assert made["budget"] == {"usd_per_day": "5"}
    assert (made["models"], made["state"], made["revoked"]) == (["gpt-4o"], "live", None)
    site.soon(secret, 200)
    listed = {one["id"]: one for one in site.admin("GET", "keys?tenant=acme", at=1).json()["keys"]}
    assert listed[key_id] == {name: value for name, value in made.items() if name != "key"}
    assert {one["tenant"] for one in site.admin("GET", "keys?tenant=beta").json()["keys"]} <= {"beta"}
    rotated = site.admin("POST", f"keys/{key_id}/rotate", json={"overlap": "0s"})
    assert (rotated.status_code, rotated.headers["cache-control"]) == (200, "no-store")
    site.secrets.append(rotated.json()["key"])
    site.soon(secret, 401)
    site.soon(rotated.json()["key"], 200)
    for _ in range(2):
        revoked = site.admin("DELETE", f"keys/{key_id}", at=1)
        assert (revoked.status_code, revoked.json()["state"]) == (200, "revoked")
    site.soon(rotated.json()["key"], 401)
    assert site.admin("POST", f"keys/{key_id}/rotate").status_code == 400
    with_tenants_key = httpx2.get(f"{site.replicas[0].url}/admin/keys", headers={"x-api-key": CONFIGURED}, verify=CLEAR)
    assert with_tenants_key.status_code == 401


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"{", None, "not JSON"),
        (b"[]", None, "JSON object"),
        (b"{}", "tenant", "is missing"),
        (b'{"tenant": "acmee"}', "tenant", "did you mean 'acme'?"),
        (b'{"tenant": "acme", "tenants": 1}', "tenants", "unknown key"),
        (b'{"tenant": "acme", "expires": "90"}', "expires", "90d"),
        (b'{"tenant": "acme", "expires": "0d"}', "expires", "more than 0"),
        (b'{"tenant": "acme", "expires": "99999d"}', "expires", "at most"),
        (b'{"tenant": "acme", "expires": {"file": "/etc/passwd"}}', "expires", "expected text"),
        (b'{"tenant": "acme", "name": "a\\nb"}', "name", "printable"),
        (b'{"tenant": "acme", "name": "%s"}' % (b"x" * 65), "name", "at most 64"),
        (b'{"tenant": "acme", "models": []}', "models", "at least 1"),
        (b'{"tenant": "acme", "models": "gpt"}', "models", "expected a list"),
        (b'{"tenant": "acme", "budget": {"usd_per_day": -1}}', "budget.usd_per_day", "negative"),
        (b'{"tenant": "acme", "budget": {"tokens_per_minute": 1.5}}', "budget.tokens_per_minute", "whole number"),
        (b'{"tenant": "acme", "budget": {"requests_per_minute": 0}}', "budget.requests_per_minute", "at least 1"),
        (b'{"tenant": "acme", "budget": {"usd_per_wek": 1}}', "budget.usd_per_wek", "unknown key"),
    ],
)
def test_what_the_admin_api_refuses(site: Site, body: bytes, param: str | None, words: str) -> None:
    before = site.redis.client().hlen("{bw:0}keys")
    answer = site.admin("POST", "keys", content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert site.redis.client().hlen("{bw:0}keys") == before


def test_a_body_that_is_too_large_and_an_id_that_is_none(site: Site) -> None:
    assert site.admin("POST", "keys", content=b" " * 70_000).json()["error"]["code"] == "request_too_large"
    for key_id in ("key_0123456789abcdef", "stamp", "%2A", "key_" + "x" * 5000):
        for method, path in (("DELETE", f"keys/{key_id}"), ("POST", f"keys/{key_id}/rotate")):
            answer = site.admin(method, path)
            assert (answer.status_code, "error" in answer.json()) == (404, True)
    assert site.admin("PUT", "keys").status_code == 405


def test_what_the_commands_refuse(site: Site) -> None:
    for arguments, words in (
        (("create", "--tenant", "acmee"), "did you mean 'acme'?"),
        (("create", "--tenant", "acme", "--expires", "soon"), "expires: expected a span of time"),
        (("create", "--tenant", "acme", "--budget", "usd_per_day=x"), "budget.usd_per_day: expected an amount"),
        (("revoke", "key_0123456789abcdef"), "no key with this id"),
        (("rotate", "nonsense"), "no key with this id"),
        (("rotate", "key_0123456789abcdef", "--overlap", "1y"), "overlap: expected a span of time"),
    ):
        verb, *rest = arguments
        done = inside("keys", verb, "-c", site.file, *rest)
        assert (done.returncode, done.stdout) == (1, "")
        assert words in done.stderr
        site.said += done.stderr
    for arguments in (("create", "--tenant", "acme", "--budget", "usd_per_day"), ("create",), ("revoke",)):
        assert site.keys(*arguments, code=2) == ""


def test_a_store_that_is_away_is_an_answer_and_not_a_wait(tmp_path: Path, site: Site) -> None:
    file = tmp_path / "away.yaml"
    file.write_text(site.file.read_text().replace(site.redis.url, "redis://127.0.0.1:1/0"))
    started = time.monotonic()
    done = command(file, "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "breakwater keys: The store of keys does not answer (connect).\n"
    assert time.monotonic() - started < 20


def command(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    verb, *rest = arguments
    return subprocess.run(
        [BREAKWATER, "keys", verb, "-c", file, *rest],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_in_memory_no_key_can_be_made_and_the_reason_is_said(tmp_path: Path) -> None:
    config = {
        "admin": {"keys": [ADMIN]},
        "providers": {"m": {"kind": "mock"}},
        "tenants": [{"name": "acme", "keys": [CONFIGURED]}],
    }
    file = tmp_path / "memory.yaml"
    file.write_text(yaml.safe_dump(config))
    for arguments in (
        ("create", "--tenant", "acme"),
        ("list",),
        ("revoke", "key_0123456789abcdef"),
        ("rotate", "key_0123456789abcdef"),
    ):
        verb, *rest = arguments
        done = inside("keys", verb, "-c", file, *rest)
        assert (done.returncode, done.stdout) == (1, "")
        assert "memory://" in done.stderr
        assert "`state`" in done.stderr
    with serving(file) as one:
        headers = {"authorization": f"Bearer {ADMIN}"}
        for method in ("GET", "POST"):
            answer = httpx2.request(method, f"{one.url}/admin/keys", headers=headers, timeout=20, verify=CLEAR)
            assert answer.status_code == 400
            assert "memory://" in answer.json()["error"]["message"]
