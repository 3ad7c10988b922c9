"""What is to be counted of one unit of a prompt: texts, and tokens that are none. Pure, and tolerant of any JSON.

The rules of chat: 3 tokens a message, its role, its texts, 1 more for a `name`; 3 for a tool call beside its name and
arguments; the schema of a reply as it is written. Items of the Responses API follow the same rules. Parts without text
(images, audio, files) are left to `media`.

No unit has more tokens than bytes, but for a little that `bound` knows of: whoever changes a rule here looks there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from proxy.tokens import tools

MESSAGE_TOKENS: Final = 3
NAME_TOKENS: Final = 1
CALL_TOKENS: Final = 3
ROLE_TOKENS: Final = 1
"""Of the role of a message that was written as a bare string; every usual role is one token."""
CHOICE_NONE: Final = 1
CHOICE_NAMED: Final = 4
FORMAT_TOKENS: Final = 10
"""The heading over the schema of a reply."""

MESSAGE: Final = b"m"
BARE: Final = b"s"
"""A conversation, or instructions, that is no list."""
PROMPT: Final = b"p"
TOOLS: Final = b"t"
FUNCTIONS: Final = b"f"
CHOICE: Final = b"c"
FORMAT: Final = b"r"

Raw = bytes | msgspec.Raw
Found = tuple[int, list[str]]
"""Tokens that are no text, and the texts."""

BROKEN: Final = object()
"""In place of a value: the bytes are not JSON after all."""

_decode = msgspec.json.decode
_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def texts(kind: bytes, raw: Raw) -> Found:
    """What is to be counted of one unit. Bytes that are not JSON after all count as plain text."""
    if kind == FORMAT:
        return _format(raw)
    value = decoded(raw)
    return (0, [plain(raw)]) if value is BROKEN else WALKS[kind](value)


def decoded(raw: Raw) -> Any:
    """The value; BROKEN if the bytes are not JSON after all (a lone surrogate, a nesting without end)."""
    try:
        return _decode(raw)
    except _NOT_JSON:
        return BROKEN


def plain(raw: Raw) -> str:
    """Bytes as text, of which no character takes more bytes than it came from."""
    return bytes(raw).decode("utf-8", "replace").replace("\ufffd", "?")


def message(value: Any) -> Found:
    """A chat message or an item of the Responses API, decoded. A string that is an element is a frame and a text."""
    found: list[str] = []
    if not isinstance(value, dict):
        _add(value, found)
        return MESSAGE_TOKENS if found else 0, found
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


def _bare(value: Any) -> Found:
    extra, found = message(value)
    return (extra if isinstance(value, dict) or not found else extra + ROLE_TOKENS), found


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


def each_prompt(raw: Raw) -> list[Found]:
    """The prompts in `prompt` or `input`: a text, a list of token ids, or a list of either; each is answered alone."""
    value = decoded(raw)
    return [(0, [plain(raw)])] if value is BROKEN else _prompts(value)


def _prompts(value: Any) -> list[Found]:
    found: list[Found] = []
    ids = 0
    for entry in value if isinstance(value, list) else (value,):
        if isinstance(entry, str):
            found.append((0, [entry]))
        elif isinstance(entry, int):
            ids += 1
        elif isinstance(entry, list):
            found.append((sum(isinstance(item, int) for item in entry), []))
    return [*found, (ids, [])] if ids else found


def _prompt(value: Any) -> Found:
    every = _prompts(value)
    return sum(ids for ids, _ in every), [text for _, texts in every for text in texts]


class _Schema(msgspec.Struct):
    """`json_schema` of `response_format`, or the `format` of `text`. Leaves are of any type: odd ones harm nobody."""

    name: Any = None
    description: Any = None
    schema: msgspec.Raw = msgspec.Raw(b"")


class _ResponseFormat(msgspec.Struct):
    json_schema: _Schema | None = None
    format: _Schema | None = None


_decode_format = msgspec.json.Decoder(_ResponseFormat).decode


def _format(raw: Raw) -> Found:
    """The schema that a reply must follow, in the client's own bytes, under a heading."""
    try:
        wanted = _decode_format(raw)
    except _NOT_JSON:
        return 0, []
    schema = wanted.json_schema or wanted.format
    if schema is None or not len(schema.schema):
        return 0, []
    named = [text for text in (schema.name, schema.description) if isinstance(text, str)]
    return FORMAT_TOKENS, [*named, plain(schema.schema)]


def _definitions(functions: list[dict[str, Any]]) -> Found:
    return (tools.FRAME_TOKENS, [tools.render(functions)]) if functions else (0, [])


def _functions(value: Any) -> Found:
    return _definitions(tools.named(value) if isinstance(value, list) else [])


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
    BARE: _bare,
    PROMPT: _prompt,
    TOOLS: lambda value: _definitions(tools.functions_of(value)),
    FUNCTIONS: _functions,
    CHOICE: _choice,
}
