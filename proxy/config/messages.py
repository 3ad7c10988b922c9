"""Our words for what pydantic finds. Its own texts quote the value, which may be a secret; these cannot."""

from __future__ import annotations

from typing import Any

from pydantic_core import ErrorDetails

_RANGES = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
_WORDS = {
    "missing": "is missing",
    "finite_number": "expected a finite number",
    "extra_forbidden": "unknown key",
}


def describe(detail: ErrorDetails) -> str:
    """What is expected, for a person. Texts of ValueErrors are from our own validators and pass as they are."""
    kind = detail["type"]
    context: dict[str, Any] = detail.get("ctx", {})
    if kind in _RANGES:
        word, bound = _RANGES[kind]
        return f"must be {word} {context[bound]}"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("too_short", "string_too_short"):
        unit = "character" if kind.startswith("string") else "entry"
        return f"needs at least {context['min_length']} {unit}; leave the line out for the default, if there is one"
    if kind == "string_too_long":
        return f"must have at most {context['max_length']} characters"
    return _WORDS.get(kind, f"is not valid here ({kind})")
