"""`breakwater check`, and how every command reads its configuration."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from proxy.config.loader import Loaded, load
from proxy.config.problems import ConfigErrors, Problem


def run(file: Path, as_json: bool) -> None:
    """Prints what is wrong, one problem a line, and exits with 1 if anything is."""
    errors: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    try:
        warnings = load(file, os.environ).warnings
    except ConfigErrors as found:
        errors = found.problems
    if as_json:
        print(json.dumps({"valid": not errors, "errors": _plain(errors), "warnings": _plain(warnings)}, indent=2))
    else:
        for error in errors:
            print(error)
        report_warnings(warnings)
        print(_verdict(file, errors), file=sys.stderr)
    if errors:
        sys.exit(1)


def load_or_exit(file: Path | None, overrides: Mapping[str, object] | None = None) -> Loaded:
    """The configuration, its warnings on stderr; or all problems on stderr and exit code 1."""
    try:
        loaded = load(file, os.environ, overrides)
    except ConfigErrors as found:
        for error in found.problems:
            print(error, file=sys.stderr)
        print(_verdict(file, found.problems), file=sys.stderr)
        sys.exit(1)
    report_warnings(loaded.warnings)
    return loaded


def report_warnings(warnings: Iterable[Problem]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _verdict(file: Path | None, errors: tuple[Problem, ...]) -> str:
    count = len(errors)
    name = "configuration" if file is None else ascii(str(file))[1:-1]
    return f"{name}: {count} error{'s' if count != 1 else ''}" if count else f"{name}: valid"


def _plain(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    return [asdict(problem) for problem in problems]
