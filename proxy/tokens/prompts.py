"""What of a request body is prompt text, per dialect. Pure, and tolerant: any JSON gives an answer, never an error.

A prompt falls into units, each the client's own bytes: a message, an item, a list of tools. A unit's count depends
on its bytes alone, so it can be remembered by their hash.

The rules of chat: 3 tokens a message, its role, its texts, 1 more for a `name`; 3 for a tool call beside its name and
arguments; 3 for the reply's opening. Items of the Responses API follow the same rules. Parts without text (images,
audio, files) count as 0. What a provider keeps (`previous_response_id`, stored prompts) cannot be seen from here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from proxy.tokens import tools
from proxy.types import Dialect

MESSAGE_TOKENS: Final = 3
NAME_TOKENS: Final = 1
CALL_TOKENS: Final = 3
REPLY_TOKENS: Final = 3
ROLE_TOKENS: Final = 1
"""Of the role of a message that was written as a bare string; every usual role is one token."""
SYSTEM_WITH_TOOLS: Final = -4
"""A system message and the list of tools share their frame."""
CHOICE_NONE: Final = 1
CHOICE_NAMED: Final = 4

MANY: Final = 16_384
"""Of more messages than about this many, an even selection is counted and scaled up."""

PART_BYTES: Final = 1_048_576
_BETWEEN: Final = re.compile(rb"\}\s*,\s*\{")

Raw = bytes | msgspec.Raw
Found = tuple[int, list[str]]
"""Tokens that are no text, and the texts."""

_decode = msgspec.json.decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@dataclass(slots=True)
class Prompt:
    """A prompt taken apart, nothing counted yet."""

    fixed: int = 0
    units: list[tuple[bytes, Raw]] = field(default_factory=list)
    """(kind, bytes); the kind is one byte, a key of `WALKS`."""
    messages: Sequence[Raw] = ()
    """Units of kind MESSAGE, or an even selection of them."""
    of: int = 0
    """How many messages there are."""


MESSAGE: Final = b"m"
PROMPT: Final = b"p"
TOOLS: Final = b"t"
FUNCTIONS: Final = b"f"
CHOICE: Final = b"c"

_MEMBERS: Final[dict[Dialect, tuple[str, ...]]] = {
    "chat": ("messages", "tools", "functions", "tool_choice"),
    "completions": ("prompt", "suffix"),
    "embeddings": ("input",),
    "responses": ("input", "instructions", "tools", "tool_choice"),
}


def size_of(dialect: Dialect, fields: Mapping[str, Raw]) -> int:
    """Bytes of the members that hold prompt text."""
    return sum(len(fields[name]) for name in _MEMBERS.get(dialect, ()) if name in fields)


def take_apart(dialect: Dialect, fields: Mapping[str, Raw]) -> Prompt:
    """The units of a prompt. A dialect without prompts gives an empty one."""
    prompt = Prompt()
    if dialect == "chat":
        prompt.fixed = REPLY_TOKENS
        _messages(prompt, fields.get("messages"))
        _tools(prompt, fields)
    elif dialect == "responses":
        prompt.fixed = REPLY_TOKENS
        if "instructions" in fields:
            prompt.units.append((MESSAGE, fields["instructions"]))
        _messages(prompt, fields.get("input"))
        _tools(prompt, fields)
    else:
        prompt.units += [(PROMPT, fields[name]) for name in _MEMBERS.get(dialect, ()) if name in fields]
    return prompt


def _messages(prompt: Prompt, raw: Raw | None) -> None:
    if raw is None:
        return
    try:
        every = split(raw)
    except _NOT_JSON:
        prompt.units.append((MESSAGE, raw))  # a bare string, or what is no list
        return
    step = -(-len(every) // MANY)
    prompt.of = len(every)
    prompt.messages = every if step <= 1 else every[::step]


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


def texts(kind: bytes, raw: Raw) -> Found:
    """What is to be counted of one unit. Bytes that are not JSON after all count as plain text."""
    try:
        value = _decode(raw)
    except _NOT_JSON:
        return 0, [bytes(raw).decode("utf-8", "replace")]
    return WALKS[kind](value)


def message(value: Any) -> Found:
    """A chat message or an item of the Responses API, decoded. A bare string is a message of one text."""
    found: list[str] = []
    if not isinstance(value, dict):
        _add(value, found)
        return MESSAGE_TOKENS + ROLE_TOKENS if found else 0, found
    get = value.get
    extra = MESSAGE_TOKENS
    for member in _TEXT_MEMBERS:
        content = get(member)
        if content is not None:
            _add(content, found)
    name = get("name")
    if isinstance(name, str) and name:
        extra += NAME_TOKENS
        found.append(name)
    calls = get("tool_calls")
    if isinstance(calls, list):
        for call in calls:
            if isinstance(call, dict):
                extra += _call(call.get("function"), found) + _call(call.get("custom"), found)
    return extra + _call(get("function_call"), found), found


_TEXT_MEMBERS: Final = (
    "role",
    "content",
    "refusal",
    "reasoning_content",  # replayed reasoning: some providers read it, the others leave it out of the bill
    "arguments",
    "input",
    "output",
    "summary",
)


def _add(content: Any, found: list[str]) -> None:
    if isinstance(content, str):
        found.append(content)
    elif isinstance(content, list):
        for part in content:
            if isinstance(part, str):
                found.append(part)
            elif isinstance(part, dict):
                found += [text for text in (part.get("text"), part.get("refusal")) if isinstance(text, str)]


def _call(call: Any, found: list[str]) -> int:
    if not isinstance(call, dict):
        return 0
    found += [text for text in (call.get("name"), call.get("arguments"), call.get("input")) if isinstance(text, str)]
    return CALL_TOKENS


def _prompt(value: Any) -> Found:
    found: list[str] = []
    ids = 0
    for entry in value if isinstance(value, list) else (value,):
        if isinstance(entry, str):
            found.append(entry)
        elif isinstance(entry, int):
            ids += 1
        elif isinstance(entry, list):
            ids += sum(isinstance(item, int) for item in entry)
    return ids, found


def _definitions(functions: list[dict[str, Any]]) -> Found:
    return (tools.FRAME_TOKENS, [tools.render(functions)]) if functions else (0, [])


def _functions(value: Any) -> Found:
    return _definitions([entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else [])


def _choice(value: Any) -> Found:
    if value == "none":
        return CHOICE_NONE, []
    if not isinstance(value, dict):
        return 0, []
    nested = value.get(kind) if isinstance(kind := value.get("type"), str) else None
    name = (nested if isinstance(nested, dict) else value).get("name")
    return (CHOICE_NAMED, [name]) if isinstance(name, str) else (0, [])


WALKS: Final[dict[bytes, Callable[[Any], Found]]] = {
    MESSAGE: message,
    PROMPT: _prompt,
    TOOLS: lambda value: _definitions(tools.functions_of(value)),
    FUNCTIONS: _functions,
    CHOICE: _choice,
}
