"""What a scalar means: the core types of YAML 1.2.

YAML 1.1, which the parser knows, reads `on`, `yes` and `12:30` as a bool, a bool and a number, and `010` as eight. Here
only `true` and `false` are bools, and everything that is not plainly a number or null is text.
"""

from __future__ import annotations

import re

NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]{1,30}")
_HEX = re.compile(r"0x[0-9a-fA-F]{1,30}")
_OCTAL = re.compile(r"0o[0-7]{1,30}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,30}|[0-9]{1,30}(\.[0-9]{0,30})?)([eE][-+]?[0-9]{1,3})?")
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


def resolve(text: str) -> bool | int | float | str | None:
    """The value of an unquoted scalar."""
    if text in NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _HEX.fullmatch(text):
        return int(text[2:], 16)
    if _OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if _FLOAT.fullmatch(text):
        return float(text)
    if (special := _SPECIAL.get(text.lower())) is not None:
        return float(special)
    return text


def kind(value: object) -> str:
    """The type of a resolved scalar, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "a whole number"
    return "a number" if isinstance(value, float) else "text"
