"""What of a request body is prompt text, per dialect. Pure, and tolerant: any JSON gives an answer, never an error.

A prompt falls into units, each the client's own bytes: a message, an item, a list of tools. A unit's count depends
on its bytes alone, so it can be remembered by their hash.

What of a unit is counted, stands in `walks`. Beside the units there is the reply's opening: 3 tokens. What a provider
keeps (`previous_response_id`, stored prompts) cannot be seen from here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from proxy.tokens.walks import BARE, CHOICE, FORMAT, FUNCTIONS, PROMPT, TOOLS, Raw
from proxy.types import Dialect

REPLY_TOKENS: Final = 3
SYSTEM_WITH_TOOLS: Final = -4
"""A system message and the list of tools share their frame."""
MANY: Final = 65_536
"""Of more messages than this, an even selection is counted and scaled up."""
CROWD: Final = 32_768

_NO_SCHEMA: Final = len('{"type":"json_object"}')
PART_BYTES: Final = 1_048_576
_BETWEEN: Final = re.compile(rb"\}\s*,\s*\{")

_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@dataclass(slots=True)
class Prompt:
    """A prompt taken apart, nothing counted yet."""

    fixed: int = 0
    units: list[tuple[bytes, Raw]] = field(default_factory=list)
    """(kind, bytes); the kind is a constant of `walks`."""
    messages: list[msgspec.Raw] = field(default_factory=list)
    """Units of kind MESSAGE: the elements of the list that holds the conversation."""
    size: int = 0
    """Bytes of that list."""

    @property
    def many(self) -> bool:
        """There are too many messages to count each."""
        return len(self.messages) > MANY

    @property
    def selected(self) -> Sequence[msgspec.Raw]:
        """All messages, or an even selection of at most `MANY`."""
        return self.messages[:: -(-len(self.messages) // MANY)] if self.many else self.messages


_MEMBERS: Final[dict[Dialect, tuple[str, ...]]] = {
    "chat": ("messages", "tools", "functions", "tool_choice", "response_format"),
    "completions": ("prompt", "suffix"),
    "embeddings": ("input",),
    "responses": ("input", "instructions", "tools", "tool_choice", "text"),
}


def size_of(dialect: Dialect, fields: Mapping[str, Raw]) -> int:
    """Bytes of the members that hold prompt text."""
    size = 0
    for name in _MEMBERS.get(dialect, ()):
        if name in fields:
            size += len(fields[name])
    return size


def crowded(dialect: Dialect, fields: Mapping[str, Raw]) -> bool:
    """There may be so many elements that taking them apart takes more than a few milliseconds, however short they are.
    Every one but the first has a comma before it."""
    commas = sum(bytes(fields[name]).count(b",") for name in _MEMBERS.get(dialect, ()) if name in fields)
    return commas > CROWD


def take_apart(dialect: Dialect, fields: Mapping[str, Raw]) -> Prompt:
    """The units of a prompt. A dialect without prompts gives an empty one."""
    prompt = Prompt()
    if dialect == "chat":
        prompt.fixed = REPLY_TOKENS
        _messages(prompt, fields.get("messages"))
        _tools(prompt, fields)
        _format(prompt, fields.get("response_format"))
    elif dialect == "responses":
        prompt.fixed = REPLY_TOKENS
        if "instructions" in fields:
            prompt.units.append((BARE, fields["instructions"]))
        _messages(prompt, fields.get("input"))
        _tools(prompt, fields)
        _format(prompt, fields.get("text"))
    else:
        prompt.units += [(PROMPT, fields[name]) for name in _MEMBERS.get(dialect, ()) if name in fields]
    return prompt


def _messages(prompt: Prompt, raw: Raw | None) -> None:
    if raw is None:
        return
    try:
        prompt.messages = split(raw)
    except _NOT_JSON:
        prompt.units.append((BARE, raw))
    else:
        prompt.size = len(raw)


def _format(prompt: Prompt, raw: Raw | None) -> None:
    if raw is not None and len(raw) > _NO_SCHEMA:
        prompt.units.append((FORMAT, raw))


def split(raw: Raw) -> list[msgspec.Raw]:
    """The elements of a JSON array, each as its bytes. Raises `msgspec.DecodeError` and kin.

    A long array is decoded in parts, because one call holds the interpreter lock to its end, and a body can be made
    of a million messages. What decodes as a list of whole values from the array's start ends between two elements:
    so it is enough to guess where one may end, and to guess again when the decoder disagrees.
    """
    if len(raw) <= 2 * PART_BYTES:
        return _decode_list(raw)
    data = bytes(raw).strip()
    if not (data.startswith(b"[") and data.endswith(b"]")):
        return _decode_list(data)
    view = memoryview(data)
    every: list[msgspec.Raw] = []
    start, reach = 1, PART_BYTES
    while len(data) - start > 2 * reach:
        guess = _BETWEEN.search(data, start + reach)
        if guess is None:
            break
        try:
            every += _decode_list(b"[" + view[start : guess.start() + 1] + b"]")
        except _NOT_JSON:
            reach *= 2
        else:
            start, reach = guess.end() - 1, PART_BYTES
    return every + _decode_list(b"[" + view[start:])


def _tools(prompt: Prompt, fields: Mapping[str, Raw]) -> None:
    given = [(kind, fields[name]) for kind, name in ((TOOLS, "tools"), (FUNCTIONS, "functions")) if name in fields]
    given = [(kind, raw) for kind, raw in given if len(raw) > len("null")]
    if not given:
        return
    prompt.units += given
    if "tool_choice" in fields:
        prompt.units.append((CHOICE, fields["tool_choice"]))
    if prompt.messages and b'"system"' in bytes(memoryview(prompt.messages[0])[:64]):
        prompt.fixed += SYSTEM_WITH_TOOLS
