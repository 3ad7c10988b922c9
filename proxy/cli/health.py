"""`breakwater health`: asks a running process how it is. For container health checks and exec probes.

It runs every few seconds in every replica, so it imports next to nothing: no configuration unless one is named, and a
plain socket instead of an HTTP client, under one deadline for everything.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

DEFAULT_URL = "http://127.0.0.1:8080"
MAX_TIMEOUT_MS = 60_000
MAX_ANSWER = 65_536
"""Bytes; what the probe paths answer is a few words."""

_URL = re.compile(r"http://(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?/?")
_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: [^\r\n]*)?\r\n")
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what a listener binds, not what we bind

Address = tuple[str, int]


class Unwell(Exception):
    """The process did not say that it is well; the text says what was seen instead."""


def run(arguments: Sequence[str]) -> None:
    """Prints the answer's word on stdout and returns; or says on stderr what is wrong, and exits with 1 (2: usage)."""
    given = _options().parse_args(arguments)
    address = given.url if given.config is None else _configured(given.config)
    path = "/readyz" if given.ready else "/livez"
    try:
        print(ask(address, path, given.timeout_ms / 1000))
    except Unwell as found:
        print(f"{_shown(address)}{path}: {found}", file=sys.stderr)
        sys.exit(1)


def _options() -> ArgumentParser:
    parser = ArgumentParser(
        "breakwater health",
        description="Ask a running process how it is: exit 0 if well, 1 if not. For container health checks.",
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", type=_url, default=DEFAULT_URL, help="where the process is (default: %(default)s)")
    where.add_argument("-c", "--config", metavar="FILE", type=Path, help="ask where this configuration listens")
    parser.add_argument("--ready", action="store_true", help="ask whether it takes requests, not only if it runs")
    parser.add_argument(
        "--timeout-ms",
        metavar="N",
        type=_milliseconds,
        default=2000,
        help="for everything together (default: %(default)s)",
    )
    return parser


def _url(text: str) -> Address:
    if (address := parse(text)) is None:
        raise ArgumentTypeError("expected http://HOST:PORT, without a path")
    return address


def _milliseconds(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) <= MAX_TIMEOUT_MS):
        raise ArgumentTypeError(f"expected milliseconds, 1 to {MAX_TIMEOUT_MS}")
    return int(text)


def parse(url: str) -> Address | None:
    """Host and port of a base URL; None if it is none."""
    found = _URL.fullmatch(url)
    if found is None:
        return None
    port = int(found["port"] or 80)
    return (found["six"] or found["name"], port) if 0 < port < 65_536 else None


def ask(address: Address, path: str, seconds: float) -> str:
    """The body of a 200. Raises Unwell for any other answer, and for none within `seconds`."""
    deadline = time.monotonic() + seconds
    try:
        answer = _exchange(address, path, deadline)
    except TimeoutError:
        raise Unwell("no complete answer in time") from None
    except OSError as error:
        # Its text is the system's own and may be in any language; the number's name says enough.
        reason = "nobody listens there" if isinstance(error, ConnectionRefusedError) else "cannot be reached"
        raise Unwell(reason) from error
    status = _STATUS.match(answer)
    body = _word(answer.partition(b"\r\n\r\n")[2])
    if status is None:
        raise Unwell("the answer is not HTTP")
    if status[1] != b"200":
        raise Unwell(f"{status[1].decode()} {body}".rstrip())
    return body


def _exchange(address: Address, path: str, deadline: float) -> bytes:
    """What is answered until the other side closes."""
    host = _shown(address).removeprefix("http://")
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    answer = b""
    with socket.create_connection(address, timeout=_left(deadline)) as connection:
        connection.settimeout(_left(deadline))
        connection.sendall(request)
        while len(answer) < MAX_ANSWER:
            connection.settimeout(_left(deadline))
            received = connection.recv(8192)
            if not received:
                break
            answer += received
    return answer


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _word(body: bytes) -> str:
    """The first word, as far as it can be shown: whatever listens there may say anything."""
    return re.sub(r"[^ -~]", "?", body.strip()[:40].decode("latin-1"))


def _configured(file: Path) -> Address:
    """Where the process of this configuration listens. Exits with 1 if that cannot be said."""
    from proxy.config.loader import load
    from proxy.config.problems import ConfigErrors

    try:
        listen = load(file, os.environ).settings.listen
    except ConfigErrors as errors:
        for problem in errors.problems:
            print(problem, file=sys.stderr)
        sys.exit(1)
    if not listen.port:
        print("listen.port is 0, any free port: say with --url which one was taken", file=sys.stderr)
        sys.exit(1)
    return _ANYWHERE.get(listen.host, listen.host), listen.port


def _shown(address: Address) -> str:
    host, port = address
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
