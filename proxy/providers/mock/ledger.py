"""The mock's books: what it served and what it billed, to hold a proxy's own figures against.

Billed completion tokens are those of the pieces that were handed to the connection; prompt tokens are billed once the
request was accepted (a refusal bills nothing). A plain answer is billed whole as soon as any of it was sent.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from proxy.transport.answer import Outcome

_KEPT: Final = 100_000


class Totals:
    __slots__ = (
        "cached_tokens", "client_gone", "completion_tokens", "cut", "finished", "in_flight", "prompt_tokens",
        "requests",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests = 0
        self.in_flight = 0
        self.finished = 0
        self.cut = 0
        self.client_gone = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


class Entry:
    """One request. It is in the books from the moment it is answered, and closed once its outcome is known."""

    __slots__ = ("authorization", "billed", "cached_tokens", "id", "model", "outcome", "path", "prompt_tokens",
                 "request_id", "sent", "status", "totals")  # fmt: skip

    def __init__(
        self,
        totals: Totals,
        ident: int,
        path: str,
        model: str,
        status: int,
        prompt_tokens: int,
        billed: Sequence[int],
        request_id: bytes,
        authorization: str | None,
        cached_tokens: int,
    ) -> None:
        self.totals = totals
        self.id = ident
        self.path = path
        self.model = model
        self.status = status
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = cached_tokens
        """Of the prompt tokens: what the prompt cache had."""
        self.billed = billed
        """Completion tokens after each piece."""
        self.request_id = request_id
        self.authorization = authorization
        self.sent = 0
        self.outcome: Outcome | None = None
        totals.requests += 1
        totals.in_flight += 1
        totals.prompt_tokens += prompt_tokens
        totals.cached_tokens += cached_tokens

    @property
    def completion_tokens(self) -> int:
        return self.billed[self.sent - 1] if self.sent else 0

    def close(self, steps: int, outcome: Outcome) -> None:
        if self.outcome is not None:
            return
        self.outcome = outcome
        self.sent = steps
        totals = self.totals
        totals.in_flight -= 1
        if steps:
            totals.completion_tokens += self.billed[steps - 1]
        if outcome is Outcome.FINISHED:
            totals.finished += 1
        elif outcome is Outcome.CUT:
            totals.cut += 1
        else:
            totals.client_gone += 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "path": self.path,
            "model": self.model,
            "status": self.status,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "chunks_sent": self.sent,
            "finished": self.outcome is Outcome.FINISHED,
            "cut": self.outcome is Outcome.CUT,
            "client_gone": self.outcome is Outcome.GONE,
            "in_flight": self.outcome is None,
            "request_id": self.request_id.decode("latin-1"),
            "authorization_seen": self.authorization,
        }


class Ledger:
    """The last `kept` requests, and totals over all since the last reset. Ids go on over a reset."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._entries: deque[Entry] = deque(maxlen=kept)
        self._totals = Totals()
        self._next = 1

    def open(
        self,
        path: str,
        model: str,
        status: int,
        prompt_tokens: int,
        billed: Sequence[int],
        request_id: bytes,
        authorization: bytes,
        cached_tokens: int = 0,
    ) -> Entry:
        key = fingerprint(authorization)
        entry = Entry(
            self._totals, self._next, path, model, status, prompt_tokens, billed, request_id, key, cached_tokens
        )
        self._next += 1
        self._entries.append(entry)
        return entry

    def read(self, since: int = 0, limit: int = _KEPT) -> dict[str, Any]:
        """Entries with an id above `since`, oldest first, at most `limit`; and the totals."""
        first = max(0, since + 1 - self._entries[0].id) if self._entries else 0
        found = [entry.as_dict() for entry in itertools.islice(self._entries, first, first + limit)]
        return {"last_id": self._next - 1, "totals": self._totals.as_dict(), "entries": found}

    def reset(self) -> int:
        """Starts new books; what is still under way closes into the old ones. Returns the entries dropped."""
        dropped = len(self._entries)
        self._entries.clear()
        self._totals = Totals()
        return dropped


@functools.lru_cache(maxsize=256)
def fingerprint(authorization: bytes) -> str | None:
    """Twelve hex digits of the key's SHA-256: tells keys apart, gives none away. None without a key."""
    key = authorization.strip()
    if key[:7].lower() == b"bearer ":
        key = key[7:].strip()
    return hashlib.sha256(key).hexdigest()[:12] if key else None
