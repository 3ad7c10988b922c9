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

from collections.abc import Hashable, Iterable, Sequence

import msgspec

from proxy.context.heads import INSTRUCTION, MODEL, OUTPUT, PINNED, REASONING, USER, Dialect, Head, Raw, head_of


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


def atoms_of(dialect: Dialect, raws: Sequence[Raw]) -> list[Atom]:
    """The atoms of an array of messages (`chat`) or items (`responses`), each as its JSON: in order, without gaps.

    Raises Untrimmable with one of these reasons: `not_an_object`; `malformed`: a member that the grouping needs is of
    the wrong type, or there is no reading the JSON; `unknown_role`; `orphan_result`: no call before it has its id;
    `duplicate_result`; `unanswered_call`; `stored_item`: a reference to what only the provider has.
    """
    return grouped([head_of(dialect, raw) for raw in raws])


def grouped(heads: Sequence[Head]) -> list[Atom]:
    """The same from what has been read of each message."""
    ties = _Ties(len(heads))
    before = 0
    for at, head in enumerate(heads):
        flags = head.flags
        if head.reason:
            raise Untrimmable(head.reason, at)
        if head.answers is not None:
            ties.answer(head.answers, at)
        for key in head.calls:
            ties.call(key, at)
        if before & REASONING or flags & before & MODEL:
            ties.ends[at - 1] = at
        ties.flags[at] = before = flags
    return ties.atoms()


class _Ties:
    """What holds messages together, filled in from the first to the last."""

    __slots__ = ("calls", "ends", "flags")

    def __init__(self, size: int) -> None:
        self.ends = list(range(size))
        """Each message is tied to all up to this one."""
        self.flags = bytearray(size)
        """What each message is, as of its head."""
        self.calls: dict[Hashable, list[int]] = {}
        """Key of a call: positions of those that no result has answered yet. Keys stay when all are answered."""

    def call(self, key: Hashable, at: int) -> None:
        self.calls.setdefault(key, []).append(at)

    def answer(self, key: Hashable, at: int) -> None:
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
                found.append(Atom(start, start + 1, flag & PINNED != 0, flag & USER != 0))
                start += 1
                continue
            outputs = []
            at = start
            while at < last:
                at += 1
                last = ends[at] if ends[at] > last else last
                flag |= flags[at]
                if flags[at] & OUTPUT:
                    outputs.append(at)
            found.append(Atom(start, at + 1, flag & PINNED != 0, flag & USER != 0, tuple(outputs)))
            start = at + 1
        return found


def leading(dialect: Dialect, raws: Iterable[Raw]) -> int:
    """How many system and developer messages stand at the start of an array that has atoms."""
    count = 0
    for raw in raws:
        if not head_of(dialect, raw).flags & INSTRUCTION:
            break
        count += 1
    return count
