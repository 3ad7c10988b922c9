"""`breakwater health` against real processes, and against whatever else may listen at an address."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from proxy.cli.health import MAX_ANSWER, Unwell, ask, parse
from tests.e2e.stack import BREAKWATER, ServeProcess, serving

CONFIG = {"providers": {"mock": {"kind": "mock"}}, "listen": {"drain_ms": 60_000, "grace_ms": 1000}}
KEYED = {**CONFIG, "tenants": [{"name": "acme", "keys": ["0123456789abcdef"]}], "admin": {"keys": ["f" * 16]}}


def health(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    done = subprocess.run([BREAKWATER, "health", *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def answering(*pieces: bytes, close: bool = True) -> Iterator[tuple[str, int]]:
    """A socket that sends `pieces` to its first caller, and then closes or stays silent until the end."""
    over = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                for piece in pieces:
                    connection.sendall(piece)
                if not close:
                    over.wait(30)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[:2]
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(30)


@pytest.fixture(scope="module")
def process() -> Iterator[ServeProcess]:
    with serving(KEYED) as one:
        yield one


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_process_that_is_ready_needs_no_key(process: ServeProcess) -> None:
    assert health("--url", process.url) == (0, "ok\n", "")
    assert health("--ready", "--url", f"{process.url}/") == (0, "ok\n", "")


def test_a_process_that_drains_lives_and_is_not_ready() -> None:
    with serving(CONFIG) as draining:
        draining.process.send_signal(signal.SIGTERM)
        draining.wait_for("server.draining")
        assert health("--url", draining.url) == (0, "ok\n", "")
        code, out, error = health("--ready", "--url", draining.url)
        assert (code, out, error) == (1, "", f"{draining.url}/readyz: 503 draining\n")


def test_nobody_listens() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert health("--url", url) == (1, "", f"{url}/livez: nobody listens there\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_address_of_a_configuration(tmp_path: Path, process: ServeProcess, host: str) -> None:
    file = tmp_path / "breakwater.yaml"
    file.write_text(yaml.safe_dump({**KEYED, "listen": {"host": host, "port": process.port}}))
    assert health("-c", file) == (0, "ok\n", "")


def test_a_configuration_that_does_not_say_where(tmp_path: Path) -> None:
    file = tmp_path / "breakwater.yaml"
    file.write_text(yaml.safe_dump({**CONFIG, "listen": {"port": 0}}))
    code, out, error = health("-c", file)
    assert (code, out) == (1, "")
    assert "listen.port is 0" in error
    file.write_text("providers: {mock: {kind: mock}}\nlisten: {prot: 1}\n")
    code, out, error = health("-c", file)
    assert (code, out) == (1, "")
    assert error.startswith(f"{file}:2:10: listen.prot: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--url", "localhost:8080"],
        ["--url", "https://127.0.0.1:8080"],
        ["--url", "http://127.0.0.1:8080/v1"],
        ["--url", "http://127.0.0.1:99999"],
        ["--url", "http://user@127.0.0.1"],
        ["--url", "http://127.0.0.1:8080", "-c", "x.yaml"],
        ["--timeout-ms", "0"],
        ["--timeout-ms", "-1"],
        ["--timeout-ms", "000000001999999"],
        ["--readyy"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    code, out, error = health(*arguments)
    assert (code, out) == (2, "")
    assert error.startswith("usage: breakwater health ")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("http://[::1]:8080/", ("::1", 8080)),
        ("http://localhost", ("localhost", 80)),
        ("http://[localhost]", None),
        ("http://127.0.0.1:0", None),
        ("http://h\r\nx: y", None),
    ],
)
def test_urls(text: str, address: tuple[str, int] | None) -> None:
    assert parse(text) == address


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "the answer is not HTTP"),
        (b"SSH-2.0-x\r\n", "the answer is not HTTP"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "404"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\nstarting", "503 starting"),
        (b"HTTP/1.1 503 x\r\n\r\n\x1b[31mred\nline", "503 ?[31mred?line"),
        (b"HTTP/1.1 2000 OK\r\n\r\nok", "the answer is not HTTP"),
    ],
)
def test_an_answer_that_is_not_well(answer: bytes, says: str) -> None:
    with answering(answer) as address, pytest.raises(Unwell) as found:
        ask(address, "/livez", 10)
    assert str(found.value) == says


def test_an_answer_in_pieces() -> None:
    with answering(b"HTTP/1.1 20", b"0 OK\r\ncontent-type: x\r\n", b"\r\no", b"k") as address:
        assert ask(address, "/livez", 10) == "ok"


def test_one_deadline_for_everything() -> None:
    """Also where something always comes, just never the end."""
    start = time.monotonic()
    with answering(b"HTTP/1.1 200 OK\r\n", close=False) as address, pytest.raises(Unwell, match="in time"):
        ask(address, "/livez", 0.3)
    assert 0.3 <= time.monotonic() - start < 5


def test_an_endless_answer_is_not_collected() -> None:
    with answering(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (MAX_ANSWER * 2), close=False) as address:
        assert ask(address, "/livez", 10) == "x" * 40


def test_it_imports_next_to_nothing() -> None:
    """It is run every few seconds beside every process: what takes its time are imports."""
    code = (
        "import sys, proxy.cli\n"
        f"sys.argv = ['breakwater', 'health', '--url', 'http://127.0.0.1:{free_port()}']\n"
        "try: proxy.cli.main()\n"
        "except SystemExit as done: assert done.code == 1\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    heavy = {"pydantic", "yaml", "asyncio", "fastapi", "uvicorn", "uvloop", "httpx2", "ssl", "http", "redis", "msgspec"}
    assert set(done.stdout.split()) & heavy == set()
