"""What was removed from a conversation, as plain text for a model to read. Pure, and tolerant: any JSON gives a text.

    [user]
    > Rename the module `store`.
    [assistant, tool call]
    > shell {"command": "git mv store.py shelf.py"}
    [tool result]
    > exit code 0

Every line of content begins with `>`, whatever it holds, and every other line is one of a few fixed ones: no text, be
it a user's, a model's or a tool's, can pass for another's or for the end of the transcript. What is no text (images,
audio, files) is named, not copied.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from proxy.types import Dialect

RESULT_CHARS: Final = 2_000
"""Of the result of a tool, and of the arguments of a call."""
TEXT_CHARS: Final = 8_000
"""Of any other message: one of them alone is not to take all the room."""
MOST_MESSAGES: Final = 4_096
"""Looked at, the newest first."""
MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""A longer message is not read: reading it would hold up everybody else."""

Raw = bytes | msgspec.Raw
_NOT_JSON: Final = (msgspec.DecodeError, ValueError, RecursionError)
_decode: Final = msgspec.json.decode
_encode: Final = msgspec.json.Encoder().encode

_USER: Final = "user"
_ASSISTANT: Final = "assistant"
_CALL: Final = "assistant, tool call"
_RESULT: Final = "tool result"
_OTHER: Final = "other"
_SPEAKERS: Final = {
    "user": _USER,
    "assistant": _ASSISTANT,
    "tool": _RESULT,
    "function": _RESULT,
    "system": "system",
    "developer": "system",
}
_MEDIA: Final = {
    "image_url": "an image",
    "input_image": "an image",
    "image": "an image",
    "input_audio": "audio",
    "audio": "audio",
    "output_audio": "audio",
    "file": "a file",
    "input_file": "a file",
    "document": "a file",
    "video_url": "a video",
    "computer_screenshot": "a screenshot",
}
_NAME_CHARS: Final = 200
_UNREAD: Final = (_OTHER, "(a message that could not be read)")

Said = tuple[str, str]
"""Who said it, one of the fixed words above, and the text."""


def transcript(dialect: Dialect, raws: Sequence[Raw], most_chars: int) -> str:
    """The messages in order, as in the module's docstring; at most about `most_chars` characters.

    What does not fit is left out from the beginning, and a line says how many messages that were.
    """
    blocks: list[str] = []
    room = most_chars
    first = len(raws)
    for raw in reversed(raws[-MOST_MESSAGES:]):
        block = "".join(_block(who, text) for who, text in said_in(dialect, raw))
        if len(block) > room:
            if not blocks:  # one message of many long calls: its end is still worth more than nothing
                blocks.append(block[len(block) - room :].partition("\n")[2])
            break
        room -= len(block)
        blocks.append(block)
        first -= 1
    if first:
        blocks.append(f"[{first} earlier message{'s' if first > 1 else ''} left out]\n")
    return "".join(reversed(blocks))


def quoted(text: str) -> str:
    """Each line behind a `>`: of whatever kind its end is, no line begins otherwise."""
    return "".join(f"> {line}\n" for line in text.splitlines()) or ">\n"


def said_in(dialect: Dialect, raw: Raw) -> list[Said]:
    """What one message or item says. Nothing for what is not for others to read, such as hidden reasoning."""
    if len(raw) > MESSAGE_BYTES:
        return [(_OTHER, f"(a message of {len(raw)} bytes, not shown)")]
    try:
        value = decoded(raw)
    except _NOT_JSON:
        return [_UNREAD]
    if not isinstance(value, dict):
        return [(_OTHER, _cut(value, TEXT_CHARS))] if isinstance(value, str) else [_UNREAD]
    kind = value.get("type")
    if dialect == "responses" and isinstance(kind, str) and kind != "message":
        return _item(kind, value)
    return _message(value)


def decoded(raw: Raw) -> Any:
    """Any JSON, half a surrogate pair (which clients that cut a text in two send) included. Raises ValueError, or
    RecursionError for what is nested too deep."""
    try:
        return _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return json.loads(bytes(raw))


def _message(value: dict[str, Any]) -> list[Said]:
    get = value.get
    role = get("role")
    who = _SPEAKERS.get(role, _OTHER) if isinstance(role, str) else _OTHER
    pieces = [_text(get("content")), _text(get("refusal")), "(audio)" if isinstance(get("audio"), dict) else ""]
    text = "\n".join(piece for piece in pieces if piece)
    name = get("name")
    if isinstance(name, str) and name and text:
        text = f"{name[:_NAME_CHARS]}: {text}"
    said = [(who, _cut(text, RESULT_CHARS if who == _RESULT else TEXT_CHARS))] if text or who == _RESULT else []
    calls = get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict):
            said += _call(call.get("function")) + _call(call.get("custom"))
    return said + _call(get("function_call"))


def _call(call: Any) -> list[Said]:
    """`function`, `custom` or `function_call` of a tool call."""
    if not isinstance(call, dict):
        return []
    given = [call.get(member) for member in ("name", "arguments", "input")]
    return [(_CALL, _cut(" ".join(one for one in given if isinstance(one, str)), RESULT_CHARS))]


def _item(kind: str, value: dict[str, Any]) -> list[Said]:
    if kind == "reasoning":
        return []
    if kind.endswith("_output"):
        return [(_RESULT, _cut(_text(value.get("output")), RESULT_CHARS))]
    said = []
    if kind.endswith(("_call", "_request")):
        # Of every kind of call that there is, these members hold what was called, and with what.
        given = [] if kind in ("function_call", "custom_tool_call") else [kind]
        given += [_text_or_json(value[member]) for member in _CALL_MEMBERS if member in value]
        said.append((_CALL, _cut(" ".join(one for one in given if one), RESULT_CHARS)))
        if "output" in value:  # a call that the provider itself answered
            said.append((_RESULT, _cut(_text(value["output"]), RESULT_CHARS)))
        return said
    if kind.endswith("_response") and "approve" in value:
        return [(_USER, "(approved)" if value["approve"] is True else "(not approved)")]
    return _message(value) or [(_OTHER, f"({kind[:_NAME_CHARS]})")]


_CALL_MEMBERS: Final = ("name", "arguments", "input", "code", "queries", "action", "operation")


def _text_or_json(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return _encode(value).decode()
    except (TypeError, ValueError, OverflowError, RecursionError):  # half a surrogate pair inside, and the like
        return "(arguments that could not be read)"


def _text(content: Any) -> str:
    """Of a content that is a string or a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return _part(content)
    if not isinstance(content, list):
        return ""
    return "\n".join(text for text in map(_part, content) if text)


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return ""
    for member in ("text", "refusal"):
        text = part.get(member)
        if isinstance(text, str):
            return text
    kind = part.get("type")
    media = _MEDIA.get(kind) if isinstance(kind, str) else None
    if media is None:
        return "(a part that is no text)"
    file = part.get("file")
    name = (file if isinstance(file, dict) else part).get("filename")
    return f"({media}, {name[:_NAME_CHARS]})" if isinstance(name, str) and name else f"({media})"


def _cut(text: str, most: int) -> str:
    """Its beginning and its end, if it is longer: results begin with what they are, and end with how it went."""
    if len(text) <= most:
        return text
    head = most * 3 // 5
    return f"{text[:head]}\n(… {len(text) - most} characters left out …)\n{text[head - most :]}"


def _block(who: str, text: str) -> str:
    return f"[{who}]\n{quoted(text)}"
