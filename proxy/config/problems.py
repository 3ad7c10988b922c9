"""What is wrong with a configuration, and where: `file:line:col: path: message`."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

Path = tuple[str | int, ...]
"""The way to a value: keys and list positions from the top, such as ("tenants", 0, "keys", 1)."""

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was written. `line` and `column` count from 1; line 0 means that the source has no lines."""

    source: str
    """The file's path, `environment NAME`, `flag`, or empty for what was written nowhere."""
    line: int = 0
    column: int = 0

    @property
    def origin(self) -> str:
        """`file:line`, `environment NAME` or `flag`."""
        return f"{self.source}:{self.line}" if self.line else self.source


NOWHERE = Place("")


@dataclass(frozen=True, slots=True)
class Problem:
    """One error or warning. The message is for a person and never holds a secret's value."""

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        line = ": ".join(part for part in (place, self.path, self.message) if part)
        return "".join(character if character.isprintable() else "?" for character in line)


class ConfigErrors(Exception):
    """Everything that is wrong with a configuration, in the order of its text."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def problem(place: Place, path: Path, message: str) -> Problem:
    return Problem(place.source, place.line, place.column, render(path), message)


def render(path: Path) -> str:
    """`tenants[0].keys[1]`; a key with other characters than letters, digits, '_' and '-' as `providers["a.b"]`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _PLAIN_KEY.fullmatch(step):
            text += f".{step}" if text else step
        else:
            text += f"[{json.dumps(step, ensure_ascii=False)}]"
    return text


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`did you mean 'x'?`, or all options when none is near, or "" when there are none."""
    known = list(options)
    near = difflib.get_close_matches(word, known, n=1)
    if not near:
        folded = {option.lower(): option for option in known}
        near = [folded[found] for found in difflib.get_close_matches(word.lower(), folded, n=1)]
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known here: {', '.join(known)}" if known else ""
