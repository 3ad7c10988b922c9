"""What of a conversation can only be removed together. Pure.

A provider refuses a result without its call, a call without its results, and a `reasoning` item without what came of
it. So a conversation is taken apart into atoms, each of which can go as a whole and leave a valid conversation:

    chat        an assistant message with its calls, to the last of their results
    responses   what the model said in one go (reasoning, messages, calls of any kind), to the last result of its calls
    both        whatever stands in between: two ties that overlap are one atom
    else        the message alone

Whether a conversation is valid is for the provider to say. Here it must only be understood: where it is not, nothing
is removed from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, TypeVar

import msgspec

Raw = bytes | msgspec.Raw
Dialect = Literal["chat", "responses"]
_Entry = TypeVar("_Entry")


class Atom(msgspec.Struct, frozen=True, gc=False):
    """Messages (or items of the Responses API) that stay or go as one: `messages[start:end]`."""

    start: int
    end: int
    pinned: bool = False
    """Never removed: a system or developer message, a compaction, what carries a `cache_control`."""
    user: bool = False
    """Holds a message of the user."""
    outputs: tuple[int, ...] = ()
    """Positions of the messages in it that are outputs of tools: what may be masked."""


class Untrimmable(Exception):
    """A conversation that is not understood well enough to remove anything from it; it is never repaired.

    `reason` is one word for a header; `position` that of the message, where there is one.
    """

    def __init__(self, reason: str, position: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.position = position


INSTRUCTIONS: Final = ("system", "developer")
_ABSENT: Final = msgspec.Raw(b"null")
_LIST: Final = ord("[")
_MARK: Final = b'cache_control"'
_NOT_READABLE: Final = (ValueError, RecursionError, OverflowError)
"""msgspec's errors and those of Unicode are kinds of ValueError."""

_ANSWERED: Final = frozenset(
    (
        "function_call",
        "custom_tool_call",
        "computer_call",
        "local_shell_call",
        "shell_call",
        "apply_patch_call",
    )
)
"""Calls that the client runs. Any other type that ends in `_call` is one of them if it has a `call_id`."""


class _ChatCall(msgspec.Struct, gc=False):
    id: str


class _LegacyCall(msgspec.Struct, gc=False):
    name: str


class _ChatMessage(msgspec.Struct, gc=False):
    """What the grouping needs; the rest is skipped."""

    role: Any = None
    tool_calls: list[_ChatCall] | None = None
    function_call: _LegacyCall | None = None
    tool_call_id: str | None = None
    name: Any = None
    content: msgspec.Raw = _ABSENT
    cache_control: Any = None


class _Item(msgspec.Struct, gc=False):
    """An item of the Responses API."""

    type: str | None = None
    role: Any = None
    id: str | None = None
    call_id: str | None = None
    approval_request_id: str | None = None
    content: msgspec.Raw = _ABSENT
    output: msgspec.Raw = _ABSENT
    cache_control: Any = None


_chat_message = msgspec.json.Decoder(_ChatMessage).decode
_item = msgspec.json.Decoder(_Item).decode


def atoms_of(dialect: Dialect, raws: Sequence[Raw]) -> list[Atom]:
    """The atoms of an array of messages (`chat`) or items (`responses`), each as its JSON: in order, without gaps.

    Raises Untrimmable with one of these reasons: `not_an_object`; `malformed`: a member that the grouping needs is of
    the wrong type, or there is no reading the JSON; `unknown_role`; `orphan_result`: no call before it has its id;
    `duplicate_result`; `unanswered_call`; `stored_item`: a reference to what only the provider has.
    """
    ties = _Ties(len(raws))
    if dialect == "chat":
        _read_messages(ties, _decoded(_chat_message, raws))
    else:
        _read_items(ties, _decoded(_item, raws))
    return ties.atoms()


def _decoded(decode: Callable[[Raw], _Entry], raws: Sequence[Raw]) -> list[_Entry]:
    found: list[_Entry] = []
    try:
        found += map(decode, raws)  # what was decoded before an error is in the list
    except _NOT_READABLE as error:
        at = len(found)
        is_object = bytes(raws[at]).lstrip().startswith(b"{")
        raise Untrimmable("malformed" if is_object else "not_an_object", at) from error
    return found


class _Ties:
    """What holds messages together, filled in from the first to the last."""

    __slots__ = ("calls", "ends", "outputs", "pinned", "user")

    def __init__(self, size: int) -> None:
        self.ends = list(range(size))
        """Each message is tied to all up to this one."""
        self.pinned = bytearray(size)
        self.user = bytearray(size)
        """1 for each message that is one, else 0."""
        self.outputs: list[int] = []
        """Positions, ascending."""
        self.calls: dict[object, list[int]] = {}
        """Key of a call: positions of those that no result has answered yet. Keys stay when all are answered."""

    def call(self, key: object, at: int) -> None:
        self.calls.setdefault(key, []).append(at)

    def answer(self, key: object, at: int) -> None:
        """Ids may repeat over a conversation, so a result is that of the latest call which has none."""
        waiting = self.calls.get(key)
        if not waiting:
            raise Untrimmable("orphan_result" if waiting is None else "duplicate_result", at)
        self.ends[waiting.pop()] = at

    def atoms(self) -> list[Atom]:
        unanswered = [waiting[0] for waiting in self.calls.values() if waiting]
        if unanswered:
            raise Untrimmable("unanswered_call", min(unanswered))
        found = []
        ends, pinned, user, outputs = self.ends, self.pinned, self.user, self.outputs
        start, size = 0, len(ends)
        output = 0
        while start < size:
            last = ends[start]
            if last == start:
                found.append(Atom(start, start + 1, pinned[start] == 1, user[start] == 1))
                start += 1
                continue
            at = start
            while at < last:
                at += 1
                if ends[at] > last:
                    last = ends[at]
            end = last + 1
            first = output
            while output < len(outputs) and outputs[output] < end:
                output += 1
            is_pinned, is_user = pinned.find(1, start, end) >= 0, user.find(1, start, end) >= 0
            found.append(Atom(start, end, is_pinned, is_user, tuple(outputs[first:output])))
            start = end
        return found


def _read_messages(ties: _Ties, messages: list[_ChatMessage]) -> None:
    call, answer, outputs = ties.call, ties.answer, ties.outputs
    for at, message in enumerate(messages):
        role = message.role
        if role == "tool":
            answer(message.tool_call_id, at)
            outputs.append(at)
        elif role == "user":
            ties.user[at] = 1
        elif role == "function":
            answer(("function", message.name) if isinstance(message.name, str) else None, at)
            outputs.append(at)
        elif role in INSTRUCTIONS:
            ties.pinned[at] = 1
        elif role != "assistant":
            raise Untrimmable("unknown_role", at)
        if message.tool_calls or message.function_call:
            if role != "assistant":
                raise Untrimmable("malformed", at)
            for made in message.tool_calls or ():
                call(made.id, at)
            if message.function_call:
                call(("function", message.function_call.name), at)
        if message.cache_control is not None or (memoryview(message.content)[0] == _LIST and _marked(message.content)):
            ties.pinned[at] = 1


def _read_items(ties: _Ties, items: list[_Item]) -> None:
    follows_reasoning = follows_model = False
    for at, item in enumerate(items):
        kind = item.type
        if kind is not None and kind != "message":
            model = _read_typed(ties, at, kind, item)
        elif kind is None and item.role is None:
            raise Untrimmable("stored_item" if item.id is not None else "unknown_role", at)
        else:
            model = _read_easy(ties, at, item.role)
        if follows_reasoning or (model and follows_model):
            ties.ends[at - 1] = at
        follows_reasoning, follows_model = kind == "reasoning", model
        if (
            item.cache_control is not None
            or (memoryview(item.content)[0] == _LIST and _marked(item.content))
            or (memoryview(item.output)[0] == _LIST and _marked(item.output))
        ):
            ties.pinned[at] = 1


def _read_easy(ties: _Ties, at: int, role: object) -> bool:
    """A message among items. Returns whether the model wrote it."""
    if role == "assistant":
        return True
    if role == "user":
        ties.user[at] = 1
    elif role in INSTRUCTIONS:
        ties.pinned[at] = 1
    else:
        raise Untrimmable("unknown_role", at)
    return False


def _read_typed(ties: _Ties, at: int, kind: str, item: _Item) -> bool:
    """An item that is no message. Returns whether it is part of what the model said."""
    key = item.call_id
    if kind.endswith("_call"):
        if key is not None:
            ties.call(key, at)
        elif kind in _ANSWERED:
            raise Untrimmable("malformed", at)
        return True  # one without a `call_id` was run by the provider, and holds its result
    if kind.endswith("_output"):
        if kind == "tool_search_output" and key is None:
            return True  # the provider searched
        if kind == "local_shell_call_output" and key is None:
            key = item.id  # as the API's reference has it; others send a `call_id`
        ties.answer(key, at)
        ties.outputs.append(at)
    elif kind == "mcp_approval_request":
        if item.id is None:
            raise Untrimmable("malformed", at)
        ties.call(("approval", item.id), at)
        return True
    elif kind == "mcp_approval_response":
        ties.answer(("approval", item.approval_request_id), at)
    elif kind == "item_reference":
        raise Untrimmable("stored_item", at)
    elif "compaction" in kind or kind == "summary":
        ties.pinned[at] = 1
    return kind in ("reasoning", "mcp_list_tools")


def _marked(parts: Raw) -> bool:
    """Some part carries a `cache_control`; a text that only speaks of it does not."""
    raw = bytes(parts)
    if _MARK not in raw:
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
