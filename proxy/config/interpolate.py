"""Variables in a scalar: `${VAR}`, `${VAR:-default}`, `${VAR:?message}`, and `$$` for one dollar sign. Pure.

An unset variable and an empty one are the same. What a variable holds is never looked at again: it cannot bring in
another variable. A default or a message ends at the first `}` and is taken as it stands, but for `$$`. A dollar sign
that is followed by anything else than `{` or `$` stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_DOLLAR = re.compile(r"\$(?:\$|\{)")
_BODY = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::(?P<way>[-?])(?P<word>[^}]*))?\}")


class Uninterpolable(ValueError):
    """`messages`: what is wrong, all of it; they name variables and never hold a value."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__("; ".join(messages))
        self.messages = messages


def interpolate(text: str, env: Mapping[str, str]) -> str:
    """`text` with its variables replaced. Raises Uninterpolable."""
    pieces: list[str] = []
    wrong: list[str] = []
    position = 0
    while found := _DOLLAR.search(text, position):
        pieces.append(text[position : found.start()])
        position = found.end()
        if found[0] == "$$":
            pieces.append("$")
        elif body := _BODY.match(text, position):
            position = body.end()
            pieces.append(_value(body, env, wrong))
        else:
            wrong.append("expected ${NAME}, ${NAME:-default} or ${NAME:?message}; write $${ for a literal ${")
    pieces.append(text[position:])
    if wrong:
        raise Uninterpolable(wrong)
    return "".join(pieces)


def _value(body: re.Match[str], env: Mapping[str, str], wrong: list[str]) -> str:
    name, way, word = body["name"], body["way"], body["word"]
    if word is not None and "${" in word.replace("$$", ""):
        wrong.append(f"variable {name}: a variable within a default or a message is not supported")
    elif value := env.get(name):
        return value
    elif way == "-":
        return word.replace("$$", "$")
    elif way == "?":
        reason = word.replace("$$", "$").strip() or "it is required"
        wrong.append(f"variable {name} is not set, or empty: {reason}")
    else:
        wrong.append(f"variable {name} is not set, or empty: set it, or write ${{{name}:-default}}")
    return ""
