"""What the grouping of a conversation needs to know of each message, and nothing else of it. Pure.

A head depends on the bytes of its message alone. So a turn of a long conversation reads its new message only, as the
counting of tokens does, and by the same hash.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final, Literal

import msgspec

Dialect = Literal["chat", "responses"]
Raw = bytes | msgspec.Raw

INSTRUCTIONS: Final = ("system", "developer")
"""Roles whose messages are never removed."""
PINNED: Final = 1
USER: Final = 2
OUTPUT: Final = 4
MODEL: Final = 8
"""Part of what the model said in one turn. (Of items alone: in chat a turn is one message.)"""
REASONING: Final = 16
"""Belongs to what follows it."""
INSTRUCTION: Final = 32


class Head(msgspec.Struct, frozen=True, gc=False):
    """Of one message or item."""

    flags: int = 0
    calls: tuple[Hashable, ...] = ()
    """Keys of the calls that it makes: each is to be answered."""
    answers: Hashable = None
    """Key of the call that it is the result of; None: it is no result."""
    reason: str = ""
    """Why it is not understood (see `atoms.Untrimmable`)."""


_NOBODY: Final = ("nobody",)
"""Key of a result that does not say what it is the result of: no call has it."""
_ABSENT: Final = msgspec.Raw(b"null")
_LIST: Final = ord("[")
_MARK: Final = b'cache_control"'
_NOT_READABLE: Final = (ValueError, RecursionError, OverflowError)
"""msgspec's errors and those of Unicode are kinds of ValueError."""
_ANSWERED: Final = frozenset(
    ["function_call", "custom_tool_call", "computer_call", "local_shell_call", "shell_call", "apply_patch_call"]
)
"""Calls that the client runs. Any other type that ends in `_call` is one of them if it has a `call_id`."""
_SEEN: Final = {flags: Head(flags) for flags in range(64)}
"""Those that differ in nothing but their flags are one object each."""


def head_of(dialect: Dialect, raw: Raw) -> Head:
    """The head of a message (`chat`) or an item (`responses`), given as its JSON. Never raises."""
    try:
        return _of_message(_chat_message(raw)) if dialect == "chat" else _of_item(_item(raw))
    except _NOT_READABLE:
        return Head(reason="malformed" if bytes(raw).lstrip().startswith(b"{") else "not_an_object")


# -- chat ------------------------------------------------------------------------------------------------------------


class _ChatCall(msgspec.Struct, gc=False):
    id: str


class _LegacyCall(msgspec.Struct, gc=False):
    name: str


class _ChatMessage(msgspec.Struct, gc=False):
    """The members that are read; the rest is skipped."""

    role: Any = None
    tool_calls: list[_ChatCall] | None = None
    function_call: _LegacyCall | None = None
    tool_call_id: str | None = None
    name: Any = None
    content: msgspec.Raw = _ABSENT
    cache_control: Any = None


_chat_message = msgspec.json.Decoder(_ChatMessage).decode


def _of_message(message: _ChatMessage) -> Head:
    role = message.role
    flags = PINNED if message.cache_control is not None or _marked(message.content) else 0
    if (message.tool_calls or message.function_call) and role != "assistant":
        return Head(reason="malformed")
    if role == "tool":
        return Head(flags | OUTPUT, answers=_NOBODY if message.tool_call_id is None else message.tool_call_id)
    if role == "user":
        return _SEEN[flags | USER]
    if role == "function":
        return Head(flags | OUTPUT, answers=("function", message.name) if isinstance(message.name, str) else _NOBODY)
    if role in INSTRUCTIONS:
        return _SEEN[flags | PINNED | INSTRUCTION]
    if role != "assistant":
        return Head(reason="unknown_role")
    calls: list[Hashable] = [call.id for call in message.tool_calls or ()]
    if message.function_call:
        calls.append(("function", message.function_call.name))
    return Head(flags, tuple(calls)) if calls else _SEEN[flags]


# -- responses -------------------------------------------------------------------------------------------------------


class _Item(msgspec.Struct, gc=False):
    """The members that are read of an item of the Responses API."""

    type: str | None = None
    role: Any = None
    id: str | None = None
    call_id: str | None = None
    approval_request_id: str | None = None
    content: msgspec.Raw = _ABSENT
    output: msgspec.Raw = _ABSENT
    cache_control: Any = None


_item = msgspec.json.Decoder(_Item).decode


def _of_item(item: _Item) -> Head:
    kind = item.type
    marked = item.cache_control is not None or _marked(item.content) or _marked(item.output)
    flags = PINNED if marked else 0
    if kind is not None and kind != "message":
        return _of_typed(item, kind, flags)
    role = item.role
    if kind is None and role is None:
        return Head(reason="stored_item" if item.id is not None else "unknown_role")
    if role == "assistant":
        return _SEEN[flags | MODEL]
    if role == "user":
        return _SEEN[flags | USER]
    if role in INSTRUCTIONS:
        return _SEEN[flags | PINNED | INSTRUCTION]
    return Head(reason="unknown_role")


def _of_typed(item: _Item, kind: str, flags: int) -> Head:
    """Of an item that is no message."""
    key = item.call_id
    if kind.endswith("_call"):
        if key is not None:
            return Head(flags | MODEL, (key,))
        # One without a `call_id` was run by the provider, and holds its result.
        return Head(reason="malformed") if kind in _ANSWERED else _SEEN[flags | MODEL]
    if kind.endswith("_output"):
        if kind == "tool_search_output" and key is None:
            return _SEEN[flags | MODEL]  # the provider searched
        if kind == "local_shell_call_output" and key is None:
            key = item.id  # as the API's reference has it; others send a `call_id`
        return Head(flags | OUTPUT, answers=_NOBODY if key is None else key)
    if kind == "mcp_approval_request":
        return Head(flags | MODEL, (("approval", item.id),)) if item.id is not None else Head(reason="malformed")
    if kind == "mcp_approval_response":
        return Head(flags, answers=("approval", item.approval_request_id))
    if kind == "item_reference":
        return Head(reason="stored_item")
    if kind == "reasoning":
        return _SEEN[flags | MODEL | REASONING]
    if "compaction" in kind or kind == "summary":
        return _SEEN[flags | PINNED]
    return _SEEN[flags | MODEL] if kind == "mcp_list_tools" else _SEEN[flags]


def _marked(content: msgspec.Raw) -> bool:
    """Some part carries a `cache_control`; a text that only speaks of it does not."""
    if memoryview(content)[0] != _LIST or _MARK not in (raw := bytes(content)):
        return False
    try:
        rest = [msgspec.json.decode(raw)]
    except _NOT_READABLE:
        return True  # it may: what is pinned in doubt costs little
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            if value.get("cache_control") is not None:
                return True
            rest += value.values()
        elif isinstance(value, list):
            rest += value
    return False
