"""What a scripted upstream answers: pure values, and the port through which one is asked.

A `Handler` turns one request into a `Serving`: an `Answer` (a recipe that may be shared by many requests) together
with what belongs to this one request only. It never awaits and never touches a socket; a shell plays the answer:
`transport.scripted` inside this process, `providers.mock.server` on a real socket. So a fault is described once and
looks the same from either side.

    delay ──▶ head ──▶ step 1 (delay, bytes) ──▶ … ──▶ step n ──▶ end
                                                                  COMPLETE  the body ends as framed
                                                                  RESET     the connection is reset (RST)
                                                                  CLOSE     the connection is closed (FIN), nothing more
                                                                  STALL     nothing more ever comes; the line stays open
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Final, Protocol

from proxy.types import Headers

Step = tuple[float, bytes]
"""(seconds to wait since the previous step was due, bytes of the body, not empty)."""

NEVER: Final = math.inf
"""As `Answer.delay`: not even a head is sent. What happens instead is `Answer.end`, at once."""


class End(enum.Enum):
    COMPLETE = "complete"
    RESET = "reset"
    CLOSE = "close"
    STALL = "stall"


class Outcome(enum.Enum):
    FINISHED = "finished"
    """Every step was handed over and the body ended as framed."""
    CUT = "cut"
    """The answer itself ended early, as its recipe says."""
    GONE = "gone"
    """The client left first."""


class Answer:
    """A recipe. Immutable once built: shells may play it for many requests at once."""

    __slots__ = ("delay", "end", "headers", "length", "status", "steps", "whole", "wire")

    def __init__(
        self,
        status: int,
        headers: Headers,
        steps: Sequence[Step] = (),
        *,
        end: End = End.COMPLETE,
        delay: float = 0.0,
        length: int | None = None,
    ) -> None:
        if delay == NEVER and end is End.COMPLETE:
            raise ValueError("an answer without a head cannot be complete")
        self.status = status
        self.headers = headers
        """Lower-case names, without framing headers."""
        self.steps = steps
        self.end = end
        self.delay = delay
        """Seconds before the head, or NEVER."""
        self.length = length
        """The Content-Length that the head declares, whatever the steps hold. None: chunked."""
        self.whole = end is End.COMPLETE or (length is not None and sum(len(data) for _, data in steps) >= length)
        """The steps make a complete body, whatever happens to the connection after it."""
        self.wire: object | None = None
        """A shell's own encoding of this answer, kept for the next request that gets it."""


class Tally(Protocol):
    """Told exactly once how a serving ended."""

    def close(self, steps: int, outcome: Outcome) -> None:
        """`steps`: how many steps of the answer were handed over before it ended."""


class Untold:
    """The tally of an answer that nobody keeps books on."""

    __slots__ = ()

    def close(self, steps: int, outcome: Outcome) -> None:
        return


UNTOLD: Final = Untold()


class Serving:
    """One answer on its way to one client."""

    __slots__ = ("answer", "request_id", "tally")

    def __init__(self, answer: Answer, request_id: bytes = b"", tally: Tally = UNTOLD) -> None:
        self.answer = answer
        self.request_id = request_id
        """Goes out as `x-request-id`, unless empty."""
        self.tally = tally


class Handler(Protocol):
    def handle(self, method: bytes, target: bytes, headers: Headers, body: bytes) -> Serving:
        """`target`: origin-form, as sent, with its query. `headers`: lower-case names. Never raises, never waits."""
