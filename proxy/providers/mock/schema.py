"""A value that satisfies a JSON Schema, in a simple way: the arguments of the mock's tool calls.

Understood: type (also a list of types), enum, const, properties and required, items, prefixItems, minItems,
minLength and maxLength, the numeric bounds, multipleOf, common formats, anyOf, oneOf, allOf, `$ref` within the same
document. Not understood, and then left to luck: pattern, not, if/then/else, dependent*, uniqueItems.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any, Final, TypeGuard

from proxy.providers.mock.text import prose

_DEEPEST: Final = 8
"""Nesting at which optional members are left out, so that a schema that contains itself comes to an end."""
_ABYSS: Final = 64
"""Nesting that only a schema without a finite value reaches: null is as good an answer as any."""
_LARGEST: Final = 2000
"""Values in one answer. Past this only what is required is filled in, past twice this only nulls."""

_FORMATS: Final = {
    "date": "2026-03-14",
    "date-time": "2026-03-14T09:26:53Z",
    "time": "09:26:53Z",
    "duration": "PT90S",
    "email": "harbor@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/harbor",
    "url": "https://example.com/harbor",
    "uuid": "6f1d7a52-3c1e-4b3a-9c55-0b7f2d1c9a10",
}


def example(schema: Any, random: Random) -> Any:
    """Any schema, also True, False or something that is none at all: the answer is a JSON value."""
    return _Example(schema, random).value(schema, 0)


class _Example:
    def __init__(self, root: Any, random: Random) -> None:
        self._root = root
        self._random = random
        self._made = 0

    def value(self, schema: Any, depth: int) -> Any:
        self._made += 1
        if self._made > _LARGEST:
            depth = max(depth, _DEEPEST)
        if not isinstance(schema, dict) or depth > _ABYSS or self._made > 2 * _LARGEST:
            return None
        if "$ref" in schema:
            return self.value(self._resolve(schema["$ref"]), depth + 1)
        if "const" in schema:
            return schema["const"]
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return self._random.choice(schema["enum"])
        if isinstance(schema.get("allOf"), list):
            return self.value(self._merged(schema), depth + 1)
        for choice in ("anyOf", "oneOf"):
            if isinstance(schema.get(choice), list) and schema[choice]:
                return self._alternative(schema, schema[choice], depth)
        return self._typed(schema, depth)

    def _alternative(self, schema: dict[str, Any], choices: list[Any], depth: int) -> Any:
        """The first alternative that is not null; near the bottom the last one, which is where recursion ends."""
        plain = [c for c in choices if not (isinstance(c, dict) and c.get("type") == "null")] or choices
        chosen = plain[0] if depth < _DEEPEST else choices[-1]
        if "properties" in schema and isinstance(chosen, dict):
            rest = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf")}
            chosen = self._merged({**rest, "allOf": [chosen]})
        return self.value(chosen, depth + 1)

    def _typed(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = next((k for k in kind if k != "null"), "null")
        if kind is None:
            kind = _guess(schema)
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "string":
            return self._string(schema)
        if kind in ("integer", "number"):
            return _number(schema, self._random, whole=kind == "integer")
        if kind == "boolean":
            return self._random.random() < 0.5
        return None

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        members, required = _members(schema), _required(schema)
        names = list(members) if depth < _DEEPEST else [name for name in members if name in required]
        names += [name for name in required if name not in members]
        extra = schema.get("additionalProperties")
        return {name: self.value(members.get(name, extra), depth + 1) for name in names}

    def _array(self, schema: dict[str, Any], depth: int) -> list[Any]:
        least = _whole(schema.get("minItems"), 0)
        most = _whole(schema.get("maxItems"), max(least, 2))
        first = schema.get("prefixItems")
        first = first[:most] if isinstance(first, list) else []
        length = max(least, min(most, 2 if depth < _DEEPEST else 0), len(first))
        items = schema.get("items")
        return [self.value(s, depth + 1) for s in first] + [
            self.value(items, depth + 1) for _ in range(min(length, 1000) - len(first))
        ]

    def _string(self, schema: dict[str, Any]) -> str:
        known = _FORMATS.get(str(schema.get("format")))
        if known is not None:
            return known
        text = "".join(prose(self._random, 3)).rstrip(".").lower()
        least = min(_whole(schema.get("minLength"), 0), 100_000)
        if len(text) < least:
            text += "x" * (least - len(text))
        return text[: _whole(schema.get("maxLength"), len(text))]

    def _resolve(self, ref: Any) -> Any:
        """The target of `#/a/b`; None for anything outside this document."""
        if not isinstance(ref, str) or not ref.startswith("#"):
            return None
        found = self._root
        for part in ref[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or name not in found:
                return None
            found = found[name]
        return found

    def _merged(self, schema: dict[str, Any]) -> dict[str, Any]:
        """`allOf` as one schema: members united, the rest overwritten in order."""
        out = {key: value for key, value in schema.items() if key != "allOf"}
        for part in schema["allOf"]:
            if isinstance(part, dict) and "$ref" in part:
                part = self._resolve(part["$ref"])
            if not isinstance(part, dict):
                continue
            united = {**_members(out), **_members(part)}
            required = [*_required(out), *_required(part)]
            out.update(part)
            if united:
                out["properties"] = united
            if required:
                out["required"] = list(dict.fromkeys(required))
        return out


def _members(schema: dict[str, Any]) -> dict[str, Any]:
    members = schema.get("properties")
    return members if isinstance(members, dict) else {}


def _required(schema: dict[str, Any]) -> list[str]:
    names = schema.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _guess(schema: dict[str, Any]) -> str:
    """The type that the other keywords imply."""
    if "properties" in schema or "required" in schema or "additionalProperties" in schema:
        return "object"
    if "items" in schema or "prefixItems" in schema or "minItems" in schema:
        return "array"
    if "minimum" in schema or "maximum" in schema or "multipleOf" in schema:
        return "number"
    return "string"


def _number(schema: dict[str, Any], random: Random, *, whole: bool) -> int | float:
    low, high, open_low, open_high = _bounds(schema)
    step: Any = schema.get("multipleOf")
    if not _is_number(step) or step <= 0:
        if not whole:
            return (low + high) / 2
        step = 1
    elif whole and step != int(step):
        step = 1
    first, last = math.ceil(low / step), math.floor(high / step)
    first += open_low and first * step == low
    last -= open_high and last * step == high
    value = random.randint(first, max(first, min(last, first + 100))) * step
    return int(value) if whole else value


def _bounds(schema: dict[str, Any]) -> tuple[float, float, bool, bool]:
    """(low, high, low excluded, high excluded). Draft 4 writes an exclusive bound as a boolean beside the bound."""
    low: Any = schema.get("minimum")
    high: Any = schema.get("maximum")
    above: Any = schema.get("exclusiveMinimum")
    below: Any = schema.get("exclusiveMaximum")
    open_low, open_high = above is True, below is True
    if _is_number(above) and not (_is_number(low) and low > above):
        low, open_low = above, True
    if _is_number(below) and not (_is_number(high) and high < below):
        high, open_high = below, True
    if not _is_number(low):
        low = high - 100 if _is_number(high) else 1
    return low, high if _is_number(high) else low + 100, open_low, open_high


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else otherwise
