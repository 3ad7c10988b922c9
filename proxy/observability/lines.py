"""One log line as JSON: its time, its text made safe, its length kept.

What a reader of logs may rely on: one object per line, at most 8 KB, nothing in it that a terminal would obey or that
reads as a second line, and no secret. Members that do not apply are absent, never null.
"""

from __future__ import annotations

import re
import time
from typing import Any, Final

import orjson

from proxy.observability.scrub import Scrubber

MAX_LINE: Final = 8 * 1024

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
"""As in the standard library."""

_MAX_ITEMS: Final = 16
_MEMORY: Final = 1024
_MAX_NAME: Final = 128
_MAX_GLANCE: Final = 2048

# JSON escapes the controls below the blank. These it passes: delete, the C1 controls (some terminals obey them), the
# separators and marks that break or turn a line, and lone surrogates, which UTF-8 cannot carry.
_UNSAFE: Final = re.compile("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


class Lines:
    """Makes lines. `now` is the wall clock, in seconds since 1970."""

    __slots__ = ("_harmless", "_now", "_second", "_stamp", "scrubber")

    def __init__(self, scrubber: Scrubber, now: Any = time.time) -> None:
        self.scrubber = scrubber
        self._now = now
        self._second = -1
        self._stamp = ""
        self._harmless: set[tuple[str, ...]] = set()

    def stamp(self) -> str:
        """RFC 3339, UTC, milliseconds."""
        now = self._now()
        second = int(now)
        if second != self._second:
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second
        return f"{self._stamp}.{int((now - second) * 1000):03d}Z"

    def is_safe(self, text: str) -> bool:
        return len(text) <= _MAX_GLANCE and text.isprintable() and self.scrubber.is_clean(text)

    def are_safe(self, names: tuple[str, ...]) -> bool:
        """The same for a set of names that comes again and again: answered from memory, of bounded size."""
        if names in self._harmless:
            return True
        if not all(map(self.is_safe, names)):
            return False
        if len(self._harmless) >= _MEMORY:
            self._harmless.clear()
        if sum(map(len, names)) <= _MAX_NAME * len(names):
            self._harmless.add(names)
        return True

    def safe(self, value: Any) -> Any:
        """A text, or a sequence of texts, scrubbed and without what a terminal would obey. Numbers pass."""
        if isinstance(value, str):
            return _UNSAFE.sub(_escaped, self.scrubber.scrub_text(value, MAX_LINE))
        if isinstance(value, tuple | list):
            return [self.safe(item) for item in value[:_MAX_ITEMS]]
        return value

    def encode(self, fields: dict[str, Any], *, safe: bool = False) -> bytes:
        """The line, newline included. `safe`: every text in it is known to be."""
        if not safe:
            fields = {name: self.safe(value) for name, value in fields.items()}
        line = orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
        return line if len(line) <= MAX_LINE else _shortened(fields)


def printable(text: str) -> str:
    """For a terminal: whatever is not plainly printable is written as an escape, line breaks too."""
    return text if text.isprintable() else "".join([c if c.isprintable() else ascii(c)[1:-1] for c in text])


def _escaped(match: re.Match[str]) -> str:
    return ascii(match.group())[1:-1]


def _shortened(fields: dict[str, Any]) -> bytes:
    """Halves the largest text or list of texts until the line fits."""
    fields = dict(fields)
    while True:
        line = orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
        if len(line) <= MAX_LINE:
            return line
        name = max(fields, key=lambda name: len(orjson.dumps(fields[name])))
        value = fields[name]
        if not isinstance(value, str):
            fields[name] = value[: len(value) // 2]
        else:
            fields[name] = value[: len(value) // 2].removesuffix("…") + "…"
