"""Takes secrets out of whatever is about to leave the process sideways: log lines, tracebacks, forwarded errors.

Three rules, each for what the others cannot see: the *name* of the field, the *shape* of the value, and the *values*
themselves as far as they are configured. The requests and replies that pass through are never touched.

Not seen: an unknown secret with no known prefix in prose; one in base64 that is not configured; one whose parts
stand in different fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from proxy.observability import shapes
from proxy.observability.known import KnownSecrets
from proxy.observability.unescape import Span, original, views

REDACTED: Final = "[redacted]"

MAX_TEXT: Final = 64 * 1024
"""Longer texts are cut: this is for logs, and every search is paid per byte."""

_MARGIN: Final = 8 * 1024
_MAX_DEPTH: Final = 32
_CUT: Final = "…[cut]"


class Scrubber:
    """`known`: every secret of the configuration, as it is used. Immutable, and safe in any thread.

    With `texts` False what is for logs stays as it is (only cut); answers to clients (`scrub_bytes`) never do.
    """

    __slots__ = ("_known", "_texts")

    def __init__(self, known: Iterable[str] = (), *, texts: bool = True) -> None:
        self._known = KnownSecrets(known)
        self._texts = texts

    def is_clean(self, text: str) -> bool:
        """True: there is certainly nothing to redact. The cheap question that answers for nearly every text."""
        if not self._texts:
            return True
        return shapes.innocent(text) and self._known.absent(text.encode("utf-8", "surrogatepass"))

    def scrub_text(self, text: str, limit: int = MAX_TEXT) -> str:
        """`text` with every secret replaced by `[redacted]`, a vendor's public prefix left standing.

        Of a text over `limit` bytes the rest is cut off, and a mark says so.
        """
        if len(text) <= limit // 4 and self.is_clean(text):
            return text
        data = text[: limit + _MARGIN].encode("utf-8", "surrogatepass")
        # Seen beyond the cut, so that a secret that lies across it is recognised; kept only up to it.
        data, cut = data[: limit + _MARGIN], len(data) > limit
        spans = self._spans(data) if self._texts else []
        if cut:
            spans = [(start, min(end, limit)) for start, end in spans if start < limit]
            data = data[:limit]
        scrubbed = _replace(data, spans).decode("utf-8", "replace" if cut else "surrogatepass")
        return scrubbed + _CUT if cut else scrubbed

    def scrub_value(self, value: Any) -> Any:
        """A copy of nested data (mappings, sequences, text, bytes, numbers), scrubbed by member name and as text.

        Bytes become text. Anything else becomes its type's name: a foreign `repr` is not ours to trust.
        """
        return self._value(value, _MAX_DEPTH)

    def scrub_bytes(self, body: bytes) -> bytes:
        """`body` with the known secrets replaced, in every encoding, and not a byte else changed."""
        if self._known.absent(body) and self._known.plain(body):
            return body
        spans = [original(span, way) for data, way in views(body) for span in self._known.find(data)]
        return _replace(body, spans) if spans else body

    def _spans(self, text: bytes) -> list[Span]:
        spans: list[Span] = []
        for data, way in views(text):
            found = shapes.find(data) + self._known.find(data)
            spans += [original(span, way) for span in found] if way else found
        return spans

    def _value(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            return self.scrub_text(value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, bytes | bytearray):
            return self.scrub_text(bytes(value[: MAX_TEXT + _MARGIN]).decode("utf-8", "replace"))
        if depth == 0:
            return REDACTED
        if isinstance(value, Mapping):
            return {self._name(key): self._member(key, member, depth - 1) for key, member in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str | bytes):
                # A header, perhaps. Text of two words is judged like one: better too much than a key.
                return [self._name(value[0]), self._member(value[0], value[1], depth - 1)]
            return [self._value(member, depth - 1) for member in value]
        return f"<{type(value).__name__}>"

    def _member(self, key: Any, value: Any, depth: int) -> Any:
        if self._texts and shapes.is_secret_name(key if isinstance(key, str) else _text(key)):
            # Numbers and flags stay: `"first_token": 0.3`, `"password": null`. A password of digits is a string.
            return value if value is None or isinstance(value, bool | int | float) else REDACTED
        return self._value(value, depth)

    def _name(self, key: Any) -> str:
        return self.scrub_text(key if isinstance(key, str) else _text(key))


def _text(key: Any) -> str:
    if isinstance(key, bytes):
        return key.decode("utf-8", "replace")
    return str(key) if isinstance(key, bool | int | float) or key is None else f"<{type(key).__name__}>"


def _replace(data: bytes, spans: list[Span]) -> bytes:
    """Every span replaced; spans that touch or overlap are one."""
    if not spans:
        return data
    pieces: list[bytes] = []
    done = 0
    edge = -1
    for start, end in sorted(spans):
        if start > edge:
            pieces += (data[done:start], REDACTED.encode())
        edge = max(edge, end)
        done = edge
    pieces.append(data[done:])
    return b"".join(pieces)
