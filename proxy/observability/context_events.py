"""What became of long conversations, as values (see `events`)."""

from __future__ import annotations

from typing import ClassVar

import msgspec


class ContextTrimmed(msgspec.Struct, frozen=True, kw_only=True):
    """Messages were removed, or outputs of tools masked, so that a conversation fits; in mode observe they would have
    been. Counts are those of one request: a long session has one of these for each of its turns after the first cut."""

    event: ClassVar[str] = "context.trimmed"

    request_id: str
    trace_id: str
    tenant: str
    model: str
    target: str
    mode: str
    strategy: str
    """oldest or summary: what took the place of the messages."""
    fallback: str = ""
    """Why it is oldest where summary was wanted."""
    limit: int
    before: int
    after: int
    """Tokens of the prompt."""
    dropped: int
    """Messages."""
    masked: int = 0
    """Outputs of tools."""
    cut: int
    """Position behind the newest message that was removed, in the array of the client."""
