"""What a stream says before it says anything: events that promise a reply and bring nothing of it. Pure.

Until the first event that brings something, a request can still be answered by another provider. Servers begin with a
role, an empty text, the filter's findings on the prompt, or the news that a response was created; and some of them then
send an error. So these events wait for the first one with content and leave together with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

_ABSENT: Final = msgspec.Raw(b"")
_NOTHING: Final = (b"", b"null", b'""', b"[]", b"{}")
_ANNOUNCED: Final = frozenset({"response.created", "response.queued", "response.in_progress"})
_SILENT: Final = frozenset({"role", "content", "refusal", "reasoning_content", "reasoning", "tool_calls", "name"})
"""Members of a delta that are there with an empty value before they are there with another."""
MAX_HELD_BYTES: Final = 65_536
"""Of events without content. What goes on beyond that is content of a kind that nobody here knows."""


class _Choice(msgspec.Struct):
    delta: dict[str, msgspec.Raw] | None = None
    text: msgspec.Raw = _ABSENT
    finish_reason: msgspec.Raw = _ABSENT


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = _ABSENT


class _Named(msgspec.Struct):
    type: str = ""


_chunk = msgspec.json.Decoder(_Chunk).decode
_named = msgspec.json.Decoder(_Named).decode

Promises = Callable[[bytes], bool]
"""Whether the data of an event brings nothing of a reply yet."""


def chunk_promises(data: bytes) -> bool:
    """One event of a chat or a legacy completion."""
    try:
        chunk = _chunk(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False  # the judge has let it pass: it is of a form that only the client knows
    if chunk.choices is None or bytes(chunk.usage) not in _NOTHING:
        return False
    return not any(_brings(choice) for choice in chunk.choices)


def _brings(choice: _Choice) -> bool:
    if bytes(choice.finish_reason) not in _NOTHING or bytes(choice.text) not in _NOTHING:
        return True
    for name, value in (choice.delta or {}).items():
        if name == "role":
            continue
        if name not in _SILENT or bytes(value) not in _NOTHING:
            return True
    return False


def response_promises(data: bytes) -> bool:
    """One event of a response."""
    try:
        return _named(data).type in _ANNOUNCED
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def all_bring(data: bytes) -> bool:
    """Of a stream without a dialect."""
    return False
