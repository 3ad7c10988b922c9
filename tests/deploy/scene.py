"""What the deployments share: the environment that their configurations ask for, and how one is tried out."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import redis

from tests.cli.inside import inside
from tests.e2e.stack import BREAKWATER, serving
from tests.redis_server import binary, free_port

PASSWORD = "0123456789abcdef"
ENV = {
    "OPENAI_API_KEY": "sk-not-a-key-0123456789",
    "ACME_KEY": "acme-0123456789abcdef",
    "BREAKWATER_ADMIN_KEY": "admin-0123456789abcdef",
    "REDIS_PASSWORD": PASSWORD,
}


def variables(text: str) -> set[str]:
    """The names that a configuration, or a compose file, takes from the environment."""
    return set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", text))


def check(file: Path, env: Mapping[str, str]) -> tuple[int, str]:
    """`breakwater check`, with nothing else in the environment: its exit code and all that it says."""
    clean = {name: value for name, value in os.environ.items() if name not in ENV}
    done = subprocess.run([BREAKWATER, "check", file], env={**clean, **env}, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


@contextlib.contextmanager
def redis_of(script: str, folder: Path) -> Iterator[int]:
    """Runs the shell script that a container runs, on a free port of this machine. Yields the port."""
    port = free_port()
    here = script.replace("--dir /data", f"--dir {folder} --port {port} --bind 127.0.0.1")
    assert here != script
    program = binary()
    (folder / "bin").mkdir()
    (folder / "bin/redis-server").symlink_to(program)
    env = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "REDIS_PASSWORD": PASSWORD}
    process = subprocess.Popen(
        ["sh", "-c", here], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert process.stdout is not None
        said = b""
        while b"eady to accept connections" not in said:
            line = process.stdout.readline()
            assert line, said.decode()
            said += line
        yield port
    finally:
        process.terminate()
        process.communicate(timeout=30)


def keeps_what_it_is_told(port: int) -> None:
    """The server asks for the password, writes to disk, and forgets nothing."""
    with redis.Redis(port=port, socket_timeout=10) as stranger:
        try:
            stranger.ping()
        except redis.AuthenticationError:
            pass
        else:
            raise AssertionError("it lets anybody in")
    with redis.Redis(port=port, password=PASSWORD, socket_timeout=10) as client:
        told: Any = client.config_get("append*")
        assert (told["appendonly"], told["appendfsync"]) == ("yes", "everysec")
        limits: Any = client.config_get("maxmemory*")
        assert limits["maxmemory-policy"] == "noeviction"
        assert int(limits["maxmemory"]) > 0
        found: Any = client.info("server")
        arguments = Path(f"/proc/{found['process_id']}/cmdline").read_text()
        assert "redis-server" in arguments, "it took the shell's place, so that signals reach it"
        assert PASSWORD not in arguments


def runs(file: Path, port: int) -> None:
    """`breakwater serve` with the configuration, and the Redis at `port` in place of the one that it names."""
    env = {
        **ENV,
        "BREAKWATER_STATE": f"redis://:{PASSWORD}@127.0.0.1:{port}/0",
        "BREAKWATER_LISTEN__HOST": "127.0.0.1",
    }
    if "admin_port" in file.read_text():
        env["BREAKWATER_LISTEN__ADMIN_PORT"] = "0"
    with serving(file, env=env) as process:
        deadline = time.monotonic() + 20
        asks = ["health", "--ready", "--url", process.url]
        while (ready := inside(*asks)).stdout != "ok\n":
            assert "seeding" in ready.stderr or "starting" in ready.stderr, ready.stderr  # an empty store is told
            assert time.monotonic() < deadline, ready.stderr
            time.sleep(0.02)
        assert subprocess.run([BREAKWATER, *asks], capture_output=True, timeout=60).stdout == b"ok\n"
