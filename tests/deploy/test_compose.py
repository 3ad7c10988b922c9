"""docker-compose.yml: against the published schema, and everything in it that can be run without Docker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.scene import ENV, check, keeps_what_it_is_told, redis_of, runs, variables
from tests.deploy.schemas import compose_errors

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker-compose.yml"
CONFIG = ROOT / "deploy/compose/breakwater.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text())
OURS: dict[str, Any] = COMPOSE["services"]["breakwater"]
REDIS: dict[str, Any] = COMPOSE["services"]["redis"]


def milliseconds(text: str) -> int:
    found = re.fullmatch(r"(\d+)s", text)
    assert found is not None, text
    return int(found[1]) * 1000


def test_the_file_fits_the_published_schema() -> None:
    assert compose_errors(COMPOSE) == []


def test_the_schema_finds_what_is_wrong() -> None:
    wrong = {**COMPOSE, "services": {**COMPOSE["services"], "redis": {**REDIS, "read_onyl": True}}}
    assert len(compose_errors(wrong)) == 1


def test_a_secret_is_asked_for_and_never_written() -> None:
    named = set()
    for service in (OURS, REDIS):
        for value in service["environment"].values():
            assert re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", value), "unset or empty must be an error"
            named |= variables(value)
    assert named == ENV.keys()


def test_only_breakwater_is_published_and_only_to_this_machine() -> None:
    assert [port.partition(":")[0] for port in OURS["ports"]] == ["127.0.0.1"]
    assert "ports" not in REDIS


def test_breakwater_waits_for_redis_and_both_say_how_they_are() -> None:
    assert OURS["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert OURS["healthcheck"]["test"] == ["CMD", "breakwater", "health", "--ready"]
    assert "redis-cli ping" in REDIS["healthcheck"]["test"][1]


def test_the_image_is_built_here() -> None:
    assert (OURS["build"], OURS["image"]) == (".", "breakwater:local")
    assert re.fullmatch(r"redis:\d+-alpine", REDIS["image"])


def test_neither_can_write_or_do_more_than_it_must() -> None:
    for service in (OURS, REDIS):
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_a_stop_leaves_the_time_that_a_drain_takes() -> None:
    listen = yaml.safe_load(CONFIG.read_text()).get("listen", {})
    drain, grace = listen.get("drain_ms", 5000), listen.get("grace_ms", 30_000)
    assert milliseconds(OURS["stop_grace_period"]) >= drain + grace + 5000


def test_the_mounted_configuration_is_valid() -> None:
    (mount,) = OURS["volumes"]
    source, target, mode = mount.split(":")
    assert (ROOT / source).resolve() == CONFIG
    assert f'"{target}"' in (ROOT / "Dockerfile").read_text()
    assert mode == "ro"
    text = CONFIG.read_text()
    assert variables(text) <= OURS["environment"].keys()
    assert check(CONFIG, ENV) == (0, f"{CONFIG}: valid\n")
    assert "redis://:${REDIS_PASSWORD}@redis:6379/0" in text, "the service's name"


def test_redis_and_breakwater_run_as_written(tmp_path: Path, redis_binary: Path) -> None:
    shell, option, script = REDIS["command"]
    assert (shell, option) == ("sh", "-c")
    # Compose writes a dollar twice where the container is to see it.
    with redis_of(script.replace("$$", "$"), tmp_path) as port:
        keeps_what_it_is_told(port)
        runs(CONFIG, port)
