"""The JSON Schema of the configuration file.

It describes the file, not the models behind it: where a number or a switch stands, a variable can (`${PORT:-8080}`); a
secret can be read from a file; a section can be empty, with all its lines commented out.
"""

from __future__ import annotations

from typing import Any

from proxy.config.settings import Settings

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_VARIABLE: Schema = {"type": "string", "pattern": r"\$\{[A-Za-z_]"}
_SECRET_FILE: Schema = {
    "type": "object",
    "description": "Read from a file; a relative path starts at the directory of the configuration file.",
    "properties": {"file": {"type": "string"}},
    "required": ["file"],
    "additionalProperties": False,
}
_ANNOTATIONS = ("description", "default")


def json_schema() -> Schema:
    """The schema, with every key's documentation in it."""
    written = _written(Settings.model_json_schema())
    switched = {f"#/$defs/{name}" for name, one in written["$defs"].items() if "off" in _modes(one)}
    _may_be_false(written, switched)
    return {"$schema": _DIALECT, "title": "Breakwater configuration", **written}


def _written(node: Schema) -> Schema:
    """A schema node of a model as a node of the file."""
    kept = {key: _inner(key, value) for key, value in node.items() if key != "title"}
    if kept.get("type") in ("integer", "number", "boolean"):
        return _either(kept, _VARIABLE)
    if kept.get("format") == "password":
        return _either({**kept, "minLength": 1}, _SECRET_FILE)
    return kept


def _inner(key: str, value: Any) -> Any:
    if key in ("properties", "$defs"):
        return {name: _section(_written(child)) for name, child in value.items()}
    if key in ("items", "additionalProperties") and isinstance(value, dict):
        return _written(value)
    if key in ("anyOf", "oneOf"):
        return [_written(child) for child in value]
    return value


def _modes(node: Schema) -> list[str]:
    found: list[str] = node.get("properties", {}).get("mode", {}).get("enum", [])
    return found


def _may_be_false(node: Any, switched: set[str]) -> None:
    """`SECTION: false` stands for `mode: off`."""
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _may_be_false(inner, switched)
    if isinstance(node, dict) and any(one.get("$ref") in switched for one in node.get("anyOf", [])):
        node["anyOf"].append({"const": False})


def _section(node: Schema) -> Schema:
    return _either(node, {"type": "null"}) if "$ref" in node else node


def _either(node: Schema, other: Schema) -> Schema:
    notes = {key: node[key] for key in _ANNOTATIONS if key in node}
    return {"anyOf": [{key: value for key, value in node.items() if key not in notes}, other], **notes}
