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

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal

import msgspec

Raw = bytes | msgspec.Raw
Dialect = Literal["chat", "responses"]


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
"""Roles whose messages are never removed."""
_PINNED: Final = 1
_USER: Final = 2
_OUTPUT: Final = 4

_ABSENT: Final = msgspec.Raw(b"null")
_LIST: Final = ord("[")
_MARK: Final = b'cache_control"'
_NOT_READABLE: Final = (ValueError, RecursionError, OverflowError)
"""msgspec's errors and those of Unicode are kinds of ValueError."""

_ANSWERED: Final = frozenset(
    ["function_call", "custom_tool_call", "computer_call", "local_shell_call", "shell_call", "apply_patch_call"]
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
    try:
        if dialect == "chat":
            _read_messages(ties, map(_chat_message, raws))
        else:
            _read_items(ties, map(_item, raws))
    except _NOT_READABLE as error:
        raise _unreadable(_chat_message if dialect == "chat" else _item, raws) from error
    return ties.atoms()


def _unreadable(decode: Callable[[Raw], object], raws: Sequence[Raw]) -> Untrimmable:
    for at, raw in enumerate(raws):
        try:
            decode(raw)
        except _NOT_READABLE:
            is_object = bytes(raw).lstrip().startswith(b"{")
            return Untrimmable("malformed" if is_object else "not_an_object", at)
    return Untrimmable("malformed")  # nested so deeply that it depends on how deep the stack is


class _Ties:
    """What holds messages together, filled in from the first to the last."""

    __slots__ = ("calls", "ends", "flags")

    def __init__(self, size: int) -> None:
        self.ends = list(range(size))
        """Each message is tied to all up to this one."""
        self.flags = bytearray(size)
        """What each message is: a sum of `_PINNED`, `_USER` and `_OUTPUT`."""
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
        ends, flags = self.ends, self.flags
        start, size = 0, len(ends)
        while start < size:
            last = ends[start]
            flag = flags[start]
            if last == start:
                found.append(Atom(start, start + 1, flag & _PINNED != 0, flag & _USER != 0))
                start += 1
                continue
            outputs = []
            at = start
            while at < last:
                at += 1
                last = ends[at] if ends[at] > last else last
                flag |= flags[at]
                if flags[at] & _OUTPUT:
                    outputs.append(at)
            found.append(Atom(start, at + 1, flag & _PINNED != 0, flag & _USER != 0, tuple(outputs)))
            start = at + 1
        return found


def _read_messages(ties: _Ties, messages: Iterable[_ChatMessage]) -> None:
    call, answer, flags = ties.call, ties.answer, ties.flags
    for at, message in enumerate(messages):
        role = message.role
        if role == "tool":
            answer(message.tool_call_id, at)
            flags[at] = _OUTPUT
        elif role == "user":
            flags[at] = _USER
        elif role == "function":
            answer(("function", message.name) if isinstance(message.name, str) else None, at)
            flags[at] = _OUTPUT
        elif role in INSTRUCTIONS:
            flags[at] = _PINNED
        elif role != "assistant":
            raise Untrimmable("unknown_role", at)
        if message.tool_calls or message.function_call:
            if role != "assistant":
                raise Untrimmable("malformed", at)
            for made in message.tool_calls or ():
                call(made.id, at)
            if message.function_call:
                call(("function", message.function_call.name), at)
        if message.cache_control is not None or _marked(message.content):
            flags[at] |= _PINNED


def _read_items(ties: _Ties, items: Iterable[_Item]) -> None:
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
        if item.cache_control is not None or _marked(item.content) or _marked(item.output):
            ties.flags[at] |= _PINNED


def _read_easy(ties: _Ties, at: int, role: object) -> bool:
    """A message among items. Returns whether the model wrote it."""
    if role == "assistant":
        return True
    if role == "user":
        ties.flags[at] = _USER
    elif role in INSTRUCTIONS:
        ties.flags[at] = _PINNED
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
        ties.flags[at] = _OUTPUT
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
        ties.flags[at] = _PINNED
    return kind in ("reasoning", "mcp_list_tools")


def leading(dialect: Dialect, raws: Sequence[Raw]) -> int:
    """How many system and developer messages stand at the start of an array that has atoms."""
    for at, raw in enumerate(raws):
        if dialect == "chat":
            role = _chat_message(raw).role
        else:
            item = _item(raw)
            role = item.role if item.type in (None, "message") else None
        if role not in INSTRUCTIONS:
            return at
    return len(raws)


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
