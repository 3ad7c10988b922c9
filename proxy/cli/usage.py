"""`breakwater usage`: what was used and what it cost, from the store that all replicas share, or from the one process
that keeps it in its memory."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import urlencode

from proxy.app.budgets import store_of, used
from proxy.budget.rollups import FIGURES, Document, as_csv, as_table, query_of
from proxy.cli.check import load_or_exit
from proxy.config.settings import Settings
from proxy.errors import InvalidRequest, StoreUnavailable
from proxy.store.address import MEMORY

ANSWER_SECONDS: Final = 30.0
MAX_ANSWER_BYTES: Final = 67_108_864
_ANY: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
"""Where to reach a process on this machine that listens at every address."""


def run(config: Path, since: str, by: str, *, as_json: bool, as_csv: bool, host: str | None, port: int | None) -> None:
    """Prints the document to stdout. Exits with 2 for a wrong question, with 1 if nobody can answer it."""
    if as_json and as_csv:
        _fail("--json and --csv exclude each other", 2)
    try:
        query_of(since, by, 0)
    except InvalidRequest as wrong:
        _fail(f"--{wrong.message}", 2)
    settings = load_or_exit(config).settings
    if settings.state.get_secret_value() == MEMORY:
        found = _asked(settings, since, by, host, port)
    else:
        found = asyncio.run(_read(settings, since, by))
    print(_formed(found, as_json, as_csv), end="")


def _formed(found: Document, json_wanted: bool, csv_wanted: bool) -> str:
    if json_wanted:
        return json.dumps(found, indent=2) + "\n"
    return as_csv(found) if csv_wanted else as_table(found)


async def _read(settings: Settings, since: str, by: str) -> Document:
    store = store_of(settings)
    try:
        return await used(store.usage, time.time_ns() // 1_000_000, since, by)
    except StoreUnavailable:
        _fail("the store does not answer: see whether `state` names it, and whether it runs", 1)
    finally:
        await store.aclose()


def _asked(settings: Settings, since: str, by: str, host: str | None, port: int | None) -> Document:
    """What the running process says."""
    listen = settings.listen
    if not settings.admin.keys:
        _fail(
            "state is memory://, so the running process must be asked, and that takes an admin key. Add to the "
            'configuration and restart: admin: {keys: ["${BREAKWATER_ADMIN_KEY}"]}',
            1,
        )
    host = host or _ANY.get(listen.host, listen.host)
    port = port or (listen.port if listen.admin_port is None else listen.admin_port)
    if not port:
        _fail("the port in the configuration is 0, so any: say with --port where the process listens", 1)
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    status, body = _get(host, port, place, settings.admin.keys[0].get_secret_value(), {"since": since, "by": by})
    if status == 401:
        _fail(f"the process at {place} does not take the first of admin.keys: was it started with this file?", 1)
    if status == 404:
        _fail(f"the process at {place} has no /admin: it was started without admin.keys, or has listen.admin_port", 1)
    try:
        found = json.loads(body) if status == 200 else None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not _is_document(found):
        _fail(f"the process at {place} answered with status {status}, and not as Breakwater does", 1)
    return found


def _get(host: str, port: int, place: str, key: str, query: dict[str, str]) -> tuple[int, bytes]:
    """By no proxy, and following nobody elsewhere: the request carries a key."""
    connection = HTTPConnection(host, port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", f"/admin/usage?{urlencode(query)}", headers={"authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        return answer.status, answer.read(MAX_ANSWER_BYTES)
    except ConnectionRefusedError:
        _fail(f"nobody listens at {place}: start it, or say with --host and --port where it is", 1)
    except (OSError, HTTPException):
        _fail(f"the process at {place} cannot be reached, or does not speak HTTP", 1)
    finally:
        connection.close()


def _is_document(found: Document) -> bool:
    try:
        names = [*found["by"], *FIGURES]
        return all(isinstance(row[name], int | str) for row in found["rows"] for name in names) and all(
            isinstance(found["total"][name], int | str) for name in FIGURES
        )
    except (KeyError, TypeError):
        return False


def _fail(message: str, code: int) -> NoReturn:
    print(f"usage: {message}", file=sys.stderr)
    sys.exit(code)
