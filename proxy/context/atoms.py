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

from collections.abc import Sequence
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
    """What the grouping needs; the rest is skipped. Leaves that are only compared are of any type."""

    role: Any = None
    tool_calls: list[_ChatCall] | None = None
    function_call: _LegacyCall | None = None
    tool_call_id: Any = None
    name: Any = None
    content: msgspec.Raw = _ABSENT
    cache_control: Any = None


class _Item(msgspec.Struct, gc=False):
    """An item of the Responses API."""

    type: Any = None
    role: Any = None
    id: Any = None
    call_id: Any = None
    approval_request_id: Any = None
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
    at = 0
    try:
        if dialect == "chat":
            for at, raw in enumerate(raws):
                _read_message(ties, at, _chat_message(raw))
        else:
            for at, raw in enumerate(raws):
                _read_item(ties, at, _item(raw))
    except _NOT_READABLE as error:
        is_object = bytes(raws[at]).lstrip().startswith(b"{")
        raise Untrimmable("malformed" if is_object else "not_an_object", at) from error
    return ties.atoms()


class _Ties:
    """What holds messages together, filled in from the first to the last."""

    __slots__ = ("calls", "ends", "follows", "outputs", "pinned", "user")

    def __init__(self, size: int) -> None:
        self.ends = list(range(size))
        """Each message is tied to all up to this one."""
        self.pinned = [False] * size
        self.user = [False] * size
        self.outputs = [False] * size
        self.calls: dict[object, list[int]] = {}
        """Key of a call: positions of those that no result has answered yet. Keys stay when all are answered."""
        self.follows: Literal["anything", "the model", "reasoning"] = "anything"
        """In a responses array: what the next item follows."""

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
        while start < size:
            last = ends[start]
            if last == start:
                found.append(Atom(start, start + 1, pinned[start], user[start]))
                start += 1
                continue
            at = start
            while at < last:
                at += 1
                last = max(last, ends[at])
            end = last + 1
            results = tuple(at for at in range(start, end) if outputs[at])
            found.append(Atom(start, end, True in pinned[start:end], True in user[start:end], results))
            start = end
        return found


def _read_message(ties: _Ties, at: int, message: _ChatMessage) -> None:
    role = message.role
    if role == "user":
        ties.user[at] = True
    elif role == "tool":
        call_id = message.tool_call_id
        ties.answer(call_id if isinstance(call_id, str) else None, at)
        ties.outputs[at] = True
    elif role == "function":
        name = message.name
        ties.answer(("function", name) if isinstance(name, str) else None, at)
        ties.outputs[at] = True
    elif role in INSTRUCTIONS:
        ties.pinned[at] = True
    elif role != "assistant":
        raise Untrimmable("unknown_role", at)
    if message.tool_calls or message.function_call:
        if role != "assistant":
            raise Untrimmable("malformed", at)
        for call in message.tool_calls or ():
            ties.call(call.id, at)
        if message.function_call:
            ties.call(("function", message.function_call.name), at)
    if message.cache_control is not None or (memoryview(message.content)[0] == _LIST and _marked(message.content)):
        ties.pinned[at] = True


def _read_item(ties: _Ties, at: int, item: _Item) -> None:
    kind = item.type
    model = False
    if kind is None and item.role is None:
        raise Untrimmable("stored_item" if item.id is not None else "unknown_role", at)
    if kind is None or kind == "message":
        model = _read_easy(ties, at, item.role)
    elif not isinstance(kind, str):
        raise Untrimmable("malformed", at)
    elif kind == "item_reference":
        raise Untrimmable("stored_item", at)
    else:
        model = _read_typed(ties, at, kind, item)
    if ties.follows == "reasoning" or (model and ties.follows == "the model"):
        ties.ends[at - 1] = at
    ties.follows = "reasoning" if kind == "reasoning" else "the model" if model else "anything"
    if (
        item.cache_control is not None
        or (memoryview(item.content)[0] == _LIST and _marked(item.content))
        or (memoryview(item.output)[0] == _LIST and _marked(item.output))
    ):
        ties.pinned[at] = True


def _read_easy(ties: _Ties, at: int, role: object) -> bool:
    """A message among items. Returns whether the model wrote it."""
    if role == "assistant":
        return True
    if role == "user":
        ties.user[at] = True
    elif role in INSTRUCTIONS:
        ties.pinned[at] = True
    else:
        raise Untrimmable("unknown_role", at)
    return False


def _read_typed(ties: _Ties, at: int, kind: str, item: _Item) -> bool:
    """An item that is no message. Returns whether it is part of what the model said."""
    key = item.call_id if isinstance(item.call_id, str) else None
    if kind.endswith("_call"):
        if key is not None:
            ties.call(key, at)
        elif kind in _ANSWERED:
            raise Untrimmable("malformed", at)
        return True  # one without a `call_id` was run by the provider, and holds its result
    if kind.endswith("_output"):
        if kind == "tool_search_output" and item.call_id is None:
            return True  # the provider searched
        if kind == "local_shell_call_output" and key is None and isinstance(item.id, str):
            key = item.id  # as the API's reference has it; others send a `call_id`
        ties.answer(key, at)
        ties.outputs[at] = True
    elif kind == "mcp_approval_request":
        ties.call(("approval", item.id if isinstance(item.id, str) else None), at)
        return True
    elif kind == "mcp_approval_response":
        request = item.approval_request_id
        ties.answer(("approval", request) if isinstance(request, str) else None, at)
    elif "compaction" in kind or kind == "summary":
        ties.pinned[at] = True
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
