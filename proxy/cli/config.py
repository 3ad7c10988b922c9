"""`breakwater config show` and `breakwater config schema`."""

from __future__ import annotations

import json
from pathlib import Path

from proxy.cli.check import load_or_exit
from proxy.config.effective import leaves, masked, nested
from proxy.config.problems import render
from proxy.config.schema import json_schema


def show(file: Path, as_json: bool) -> None:
    """Every value in effect with its origin, secrets masked."""
    loaded = load_or_exit(file)
    if as_json:
        document = {"hash": loaded.hash, "values": nested(loaded.settings), "origins": dict(loaded.origins)}
        print(json.dumps(document, indent=2))
        return
    rows = [(render(path), json.dumps(masked(value))) for path, value in leaves(loaded.settings)]
    left = max(len(path) for path, _ in rows)
    middle = max(len(value) for _, value in rows)
    for path, value in rows:
        print(f"{path:<{left}}  {value:<{middle}}  # {ascii(loaded.origins[path])[1:-1]}")


def schema() -> None:
    """The JSON Schema of the configuration file."""
    print(json.dumps(json_schema(), indent=2))
