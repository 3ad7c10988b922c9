"""The configuration in effect, as something that may be shown: every value, and `***` for each secret."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, SecretStr

from proxy.config.problems import Path

MASK = "***"


def leaves(settings: BaseModel) -> Iterator[tuple[Path, object]]:
    """Every single value in effect with its path, in order; secrets as SecretStr. An empty list or table is a leaf."""
    return _leaves(settings, ())


def _leaves(value: object, path: Path) -> Iterator[tuple[Path, object]]:
    inner: list[tuple[str | int, object]] = []
    if isinstance(value, BaseModel):
        inner = [(name, getattr(value, name)) for name in type(value).model_fields]
    elif isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, tuple):
        inner = list(enumerate(value))
    if not inner:
        yield path, value
    for step, item in inner:
        yield from _leaves(item, (*path, step))


def nested(value: object) -> Any:
    """The whole as mappings, lists and plain values."""
    if isinstance(value, BaseModel):
        return {name: nested(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {key: nested(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [nested(item) for item in value]
    return masked(value)


def masked(value: object) -> Any:
    """A leaf as JSON can hold it."""
    if isinstance(value, SecretStr):
        return MASK
    if value == ():
        return []
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def digest(settings: BaseModel) -> str:
    """16 hex digits that name the configuration. Secrets do not enter, so that nothing can be guessed from it."""
    state = [[path, masked(value)] for path, value in leaves(settings)]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
