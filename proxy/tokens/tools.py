"""Tool definitions as the model reads them: declarations in TypeScript. Pure.

OpenAI does not publish the rendering; this one follows what their chat models have been seen to be billed for:
a namespace, one function type per tool, descriptions as comments (of properties only near the top). Expect +-10 %
against the real count, more for schemas full of keywords that have no TypeScript form.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

FRAME_TOKENS: Final = 9
"""What the list of tools costs beside its text."""

_DEPTH: Final = 16
"""Below this a schema is `any`: deeper ones are not written by people."""
_COMMENTED_INDENT: Final = 2

_NAMES: Final = {
    "string": "string",
    "integer": "number",
    "number": "number",
    "boolean": "boolean",
    "null": "null",
}


def functions_of(tools: object) -> list[dict[str, Any]]:
    """The function definitions in a `tools` member, in the form of either API: nested under `function` or flat.

    Custom tools count as functions of one text. Hosted tools are left out, because nobody but the provider knows their
    text, and so is what has no name, which no provider takes.
    """
    found = []
    for tool in tools if isinstance(tools, list) else ():
        if not isinstance(tool, dict):
            continue
        kind = tool.get("type", "function")
        if kind in ("function", "custom"):
            nested = tool.get(kind)
            found.append(nested if isinstance(nested, dict) else tool)
    return named(found)


def named(functions: Iterable[object]) -> list[dict[str, Any]]:
    """The definitions among some values."""
    return [entry for entry in functions if isinstance(entry, dict) and isinstance(entry.get("name"), str)]


def render(functions: Iterable[dict[str, Any]]) -> str:
    """The declarations of some functions (`name`, `description`, `parameters`), any of whose members may be odd."""
    lines = ["namespace functions {", ""]
    for function in functions:
        _comment(lines, function.get("description"), "")
        name = _text(function.get("name"))
        parameters = function.get("parameters")
        members = _members(parameters, 0, 0) if isinstance(parameters, dict) else []
        if members:
            lines += [f"type {name} = (_: {{", *members, "}) => any;"]
        else:
            lines.append(f"type {name} = () => any;")
        _grammar(lines, function.get("format"))
        lines.append("")
    lines.append("} // namespace functions")
    return "\n".join(lines)


def _members(schema: dict[str, Any], indent: int, depth: int) -> list[str]:
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return []
    required = schema.get("required")
    needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    pad = " " * indent
    lines: list[str] = []
    for name, member in properties.items():
        if indent < _COMMENTED_INDENT and isinstance(member, dict):
            _comment(lines, member.get("description"), pad)
        lines.append(f"{pad}{name}{'' if name in needed else '?'}: {_type(member, indent, depth)},")
    return lines


def _type(schema: object, indent: int, depth: int) -> str:
    if not isinstance(schema, dict) or depth > _DEPTH:
        return "any"
    for several in ("anyOf", "oneOf"):
        options = schema.get(several)
        if isinstance(options, list) and options:
            return " | ".join(_type(option, indent, depth + 1) for option in options)
    values = schema.get("enum")
    if isinstance(values, list) and values:
        return " | ".join(_literal(value) for value in values)
    if "const" in schema:
        return _literal(schema["const"])
    kind = schema.get("type")
    if isinstance(kind, list) and kind:
        # Each name once: a thousand times "object" would write the properties a thousand times, at every depth.
        names = dict.fromkeys(name if isinstance(name, str) else "any" for name in kind)
        return " | ".join(_named(name, schema, indent, depth) for name in names)
    return _named(kind, schema, indent, depth)


def _named(kind: object, schema: dict[str, Any], indent: int, depth: int) -> str:
    if kind == "array":
        return f"{_type(schema.get('items'), indent, depth + 1)}[]"
    if kind == "object":
        members = _members(schema, indent + 2, depth + 1)
        return "\n".join(["{", *members, " " * indent + "}"]) if members else "object"
    return _NAMES.get(kind, "any") if isinstance(kind, str) else "any"


def _literal(value: object) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (ValueError, OverflowError, RecursionError):
        return "any"


def _comment(lines: list[str], description: object, pad: str) -> None:
    if isinstance(description, str) and description:
        lines.append(f"{pad}// {description}")


def _grammar(lines: list[str], form: object) -> None:
    if not isinstance(form, dict):
        return
    grammar = form.get("grammar")
    definition = (grammar if isinstance(grammar, dict) else form).get("definition")
    if isinstance(definition, str):
        lines.append(definition)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
