"""Summaries of what was removed from conversations: the port of the store that keeps them.

A key stands for everything that went into a summary, so a text never changes: whoever writes it first is right, and
every process that asks later gets the same bytes. What a provider remembers of a prompt's beginning stays valid so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

KEPT_SECONDS: Final = 86_400
"""From the moment it was first written."""
MOST_BYTES: Final = 65_536
"""Of one text, as UTF-8."""
KEY_BYTES: Final = 32


class SummaryStore(Protocol):
    """Keys are `KEY_BYTES` long digests. Both verbs raise StoreUnavailable of `store.base`, within the store's own
    time limit, and ValueError for a key or text that cannot be one."""

    async def find(self, keys: Sequence[bytes]) -> tuple[int, str] | None:
        """The first of `keys` under which a text is kept: its place among them, and the text."""

    async def keep(self, key: bytes, text: str) -> str:
        """The text that is kept under the key from now on: `text`, unless one was kept before."""


def checked_key(key: bytes) -> bytes:
    """Raises ValueError."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"the key of a summary is a digest of {KEY_BYTES} bytes")
    return key


def encoded(text: str) -> bytes:
    """Raises ValueError for a text that is empty, too long, or has no UTF-8."""
    data = text.encode()
    if not 0 < len(data) <= MOST_BYTES:
        raise ValueError(f"a summary is 1 to {MOST_BYTES} bytes long")
    return data


def decoded(data: bytes) -> str | None:
    """None for what `encoded` cannot have written."""
    if not 0 < len(data) <= MOST_BYTES:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
