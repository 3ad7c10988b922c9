"""`breakwater keys`: make, list, revoke and rotate keys, in the store that the configuration names.

A secret goes to stdout, once and alone; what there is to say about it goes to stderr.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

import typer

from proxy.app.budgets import store_of
from proxy.app.keys import Keys, Made, made_shown, moment, registry_of, shown
from proxy.cli.check import load_or_exit
from proxy.errors import ProxyError
from proxy.store.registry import KeyRecord

_T = TypeVar("_T")
_HEAD: Final = ("ID", "TENANT", "NAME", "STATE", "CREATED", "EXPIRES", "MODELS", "BUDGET")


def create(
    config: Path,
    tenant: str,
    *,
    name: str,
    expires: str | None,
    models: str | None,
    budget: list[str],
    as_json: bool,
) -> None:
    """Makes a key. Exits with 1 if that did not work."""
    wanted: dict[str, Any] = {"tenant": tenant, "expires": expires}
    if name:
        wanted["name"] = name
    if models is not None:
        wanted["models"] = [glob.strip() for glob in models.split(",")]
    if budget:
        wanted["budget"] = _pairs(budget)
    made = _done(config, lambda keys: keys.create(wanted))
    record = made.record
    until = f"until {moment(record.expires_ms)}" if record.expires_ms is not None else "until it is revoked"
    _give(made, f"made {record.id} for tenant {record.tenant}, valid {until}", as_json)


def rotate(config: Path, key_id: str, *, overlap: str, as_json: bool) -> None:
    """Gives a key a new secret. Exits with 1 if that did not work."""
    made = _done(config, lambda keys: keys.rotate(key_id, {"overlap": overlap}))
    until = shown(made.record, 0)["overlap_until"]
    old = f"secrets of before are valid until {until}" if until else "secrets of before are valid no more"
    _give(made, f"{made.record.id} of tenant {made.record.tenant} has a new secret; {old}", as_json)


def revoke(config: Path, key_id: str, *, as_json: bool) -> None:
    """Ends a key for good. Exits with 1 if there is none of this id."""
    record, now = _done(config, lambda keys: keys.revoke(key_id))
    if as_json:
        print(json.dumps(shown(record, record.revoked_ms or 0), indent=2))
    when = "" if now else f" since {moment(record.revoked_ms)} already"
    print(f"{record.id} of tenant {record.tenant} is revoked{when}", file=sys.stderr)


def list_keys(config: Path, *, tenant: str | None, everything: bool, as_json: bool) -> None:
    """Prints keys, without their secrets."""
    records, now_ms = _done(config, lambda keys: keys.list())
    records = [one for one in records if tenant in (None, one.tenant) and (everything or one.state(now_ms) == "live")]
    if as_json:
        print(json.dumps({"keys": [shown(one, now_ms) for one in records]}, indent=2))
        return
    if not records:
        print("no keys" if everything else "no keys that are valid; --all shows the others", file=sys.stderr)
        return
    rows = [_HEAD, *(_row(one, now_ms) for one in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _row(one: KeyRecord, now_ms: int) -> tuple[str, ...]:
    told = shown(one, now_ms)
    budget = ",".join(f"{name}={value}" for name, value in (told["budget"] or {}).items())
    created, expires = told["created"], told["expires"] or "-"
    return (
        one.id,
        one.tenant,
        one.name or "-",
        told["state"],
        created,
        expires,
        ",".join(one.models or ()) or "-",
        budget or "-",
    )


def _done(config: Path, verb: Callable[[Keys], Awaitable[_T]]) -> _T:
    """What `verb` answers. Exits with 1 if the configuration, the request or the store will not do."""
    settings = load_or_exit(config).settings

    async def run() -> _T:
        store = store_of(settings)
        try:
            return await verb(Keys(registry_of(store), [one.name for one in settings.tenants]))
        finally:
            await store.aclose()

    try:
        return asyncio.run(run())
    except ProxyError as error:
        print(f"breakwater keys: {error.message}", file=sys.stderr)
        sys.exit(1)


def _give(made: Made, said: str, as_json: bool) -> None:
    print(said, file=sys.stderr)
    print("this is the only time that the secret is shown:", file=sys.stderr, flush=True)
    print(json.dumps(made_shown(made), indent=2) if as_json else made.secret)


def _pairs(texts: Iterable[str]) -> dict[str, Any]:
    """`a=1,b=2`, any number of times. Exits with 2 for what is not that; what the names mean is judged later."""
    found: dict[str, Any] = {}
    for one in (pair for text in texts for pair in text.split(",")):
        name, equals, value = (part.strip() for part in one.partition("="))
        if not (name and equals and value) or name in found:
            raise typer.BadParameter(
                "expected NAME=VALUE, with commas between, each once: tokens_per_minute=10000,usd_per_day=5",
                param_hint="--budget",
            )
        found[name] = None if value == "null" else value
    return found
