"""What of a conversation can only be removed together. Pure."""

from __future__ import annotations

import msgspec


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
