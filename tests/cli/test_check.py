"""The console script itself: exit codes, what goes to stdout and what to stderr, and what a command imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.inside import inside

pytestmark = pytest.mark.slow

SCRIPT = Path(sys.executable).parent / "breakwater"
EXAMPLE = Path(__file__).resolve().parents[2] / "config.example.yaml"
SECRET = "sk-canary-0123456789abcdef"
GOOD = "providers:\n  a: {kind: openai, api_key: '${KEY}', base_url: 'https://example.com/v1'}\n"
BAD = "providers:\n  a: {kind: opneai}\nlisten:\n  prot: 1\n"


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BREAKWATER_")}
    environment |= {"KEY": SECRET, "COLUMNS": "200", **(env or {})}
    return subprocess.run(
        [SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=60, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    return file


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    file = tmp_path / "bad.yaml"
    file.write_text(BAD)
    return file


def test_a_valid_file_exits_0(good: Path) -> None:
    done = run("check", good)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"{good}: valid\n")


def test_an_invalid_file_exits_1_with_every_problem_on_stdout(bad: Path) -> None:
    done = run("check", bad)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"{bad}:2:13: providers.a.kind: expected openai or mock: did you mean 'openai'?",
        f"{bad}:4:3: listen.prot: unknown key: did you mean 'port'?",
    ]
    assert done.stderr == f"{bad}: 2 errors\n"


def test_the_environment_is_checked_too(good: Path) -> None:
    done = run("check", good, env={"BREAKWATER_LISTEN__PROT": "1", "KEY": ""})
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"{good}:2:30: providers.a.api_key: variable KEY is not set, or empty: set it, or write ${{KEY:-default}}",
        "environment BREAKWATER_LISTEN__PROT: matches no key: did you mean 'BREAKWATER_LISTEN__PORT'?",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["check"],
        ["check", "/nowhere.yaml"],
        ["check", "/"],
        ["check", "--wrong"],
        ["chekc"],
        ["serve"],
        ["config", "show"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Error" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_json(good: Path, bad: Path) -> None:
    done = run("check", bad, "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["valid"] is False
    assert document["warnings"] == []
    assert document["errors"][1] == {
        "file": str(bad),
        "line": 4,
        "column": 3,
        "path": "listen.prot",
        "message": "unknown key: did you mean 'port'?",
    }
    done = run("check", good, "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"valid": True, "errors": [], "warnings": []})


def test_warnings_go_to_stderr_and_leave_the_exit_code(good: Path) -> None:
    done = run("check", good, env={"BREAKWATER_LISTEN__HOST": "0.0.0.0"})
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("warning: environment BREAKWATER_LISTEN__HOST: listen.host: reachable from other")
    document = json.loads(run("check", good, "--json", env={"BREAKWATER_LISTEN__HOST": "0.0.0.0"}).stdout)
    assert document["warnings"][0]["path"] == "listen.host"


def test_config_show_masks_secrets_and_names_origins(good: Path) -> None:
    env = {"BREAKWATER_LISTEN__PORT": "9000"}
    done = run("config", "show", "-c", good, env=env)
    assert done.returncode == 0
    rows = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert rows["providers.a.api_key"].split() == ['"***"', "#", f"{good}:2"]
    assert rows["listen.port"].split() == ["9000", "#", "environment", "BREAKWATER_LISTEN__PORT"]
    assert rows["listen.host"].split() == ['"127.0.0.1"', "#", "default"]
    as_json = run("config", "show", "-c", good, "--json", env=env)
    document = json.loads(as_json.stdout)
    assert document["values"]["listen"]["port"] == 9000
    assert document["values"]["providers"]["a"]["api_key"] == "***"
    assert document["values"]["models"] == [
        {"name": "*", "targets": ["a/*"], "price": None, "context_window": None, "max_output_tokens": None}
    ]
    assert document["origins"]["providers.a.api_key"] == f"{good}:2"
    assert len(document["hash"]) == 16
    assert SECRET not in done.stdout + done.stderr + as_json.stdout + as_json.stderr


def test_config_show_of_an_invalid_file_exits_1_and_prints_no_data(bad: Path) -> None:
    done = run("config", "show", "-c", bad)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == f"{bad}: 2 errors"


def test_config_schema_is_json() -> None:
    done = run("config", "schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["required"] == ["providers"]


def test_the_example_is_valid() -> None:
    done = run("check", EXAMPLE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"{EXAMPLE}: valid\n")


def test_bare_commands_print_help() -> None:
    for arguments in ([], ["config"], ["keys"]):
        done = run(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == run(*arguments, "--help").stdout
        assert done.stdout.startswith("Usage: breakwater")


def test_version_and_module() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("breakwater 0.")
    module = subprocess.run([sys.executable, "-m", "proxy", "--version"], capture_output=True, text=True, timeout=60)
    assert (module.returncode, module.stdout) == (0, done.stdout)


def test_every_command_has_help() -> None:
    listing = run("--help").stdout
    for name in ("serve", "demo", "check", "health", "mock", "config", "keys"):
        assert f"\n  {name} " in listing
        assert inside(name, "--help").returncode == 0
    listing = run("keys", "--help").stdout
    for name in ("create", "list", "revoke", "rotate"):
        assert f"\n  {name} " in listing
        assert inside("keys", name, "--help").returncode == 0


HEAVY = {"fastapi", "starlette", "uvicorn", "uvloop", "httpx2", "yaml", "tiktoken", "msgspec", "structlog"}


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], HEAVY | {"pydantic", "rich"}),
        (["--version"], HEAVY | {"pydantic", "rich"}),
        (["serve", "--help"], HEAVY),  # here typer itself reads the options' types with pydantic
        (["keys", "--help"], HEAVY),
        (["keys", "create", "--help"], HEAVY),
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str], heavy: set[str]) -> None:
    code = (
        "import sys, proxy.cli\n"
        f"sys.argv = ['breakwater', *{arguments!r}]\n"
        "try: proxy.cli.main()\n"
        "except SystemExit as done: assert not done.code\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    loaded = set(done.stderr.split())
    assert "typer" in loaded
    assert loaded & heavy == set()


def test_a_reader_that_leaves_causes_no_traceback() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [SCRIPT, "config", "schema"], stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60
        )
    finally:
        os.close(write_end)
    assert "Traceback" not in done.stderr
    assert done.returncode != 0
