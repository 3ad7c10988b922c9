"""An answer in the making: what the routes build, the faults bend and the pace spreads over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from proxy.providers.mock.refusal import Refusal
from proxy.transport.answer import Answer, End
from proxy.types import Headers

JSON = b"application/json"
SSE = b"text/event-stream; charset=utf-8"

_ALWAYS: Headers = [
    (b"openai-version", b"2020-10-01"),
    (b"openai-processing-ms", b"7"),
    (b"x-ratelimit-limit-requests", b"10000"),
    (b"x-ratelimit-remaining-requests", b"9999"),
    (b"x-ratelimit-reset-requests", b"6ms"),
    (b"x-ratelimit-limit-tokens", b"2000000"),
    (b"x-ratelimit-remaining-tokens", b"1999000"),
    (b"x-ratelimit-reset-tokens", b"1m0s"),
]
"""What a large provider sends with every answer; fixed, so that the same request gets the same bytes."""


@dataclass(slots=True)
class Draft:
    status: int = 200
    content_type: bytes = JSON
    headers: Headers = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    """A plain answer: its whole body. A stream: its SSE events, the terminator last."""
    billed: list[int] = field(default_factory=list)
    """Completion tokens billed once that many pieces are sent; as long as `pieces`."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt tokens."""
    stream: bool = False
    end: End = End.COMPLETE
    delay: float = 0.0
    gaps: list[float] | None = None
    """Seconds before each piece; None: none."""
    length: int | None = None
    """The Content-Length of a plain answer when it is not the length of what is sent."""

    def keep(self, pieces: int) -> None:
        self.pieces, self.billed = self.pieces[:pieces], self.billed[:pieces]

    def cut(self, at: int) -> None:
        """Keeps the first `at` bytes of the body. A plain answer still declares its full length."""
        if not self.stream and self.length is None:
            self.length = sum(map(len, self.pieces))
        kept: list[bytes] = []
        for piece in self.pieces:
            if at <= 0:
                break
            kept.append(piece[:at])
            at -= len(piece)
        self.pieces, self.billed = kept, self.billed[: len(kept)]
        if self.gaps is not None:
            self.gaps = self.gaps[: len(kept)]

    def answer(self) -> Answer:
        headers = [(b"content-type", self.content_type), *_ALWAYS, *self.headers]
        length = None
        if not self.stream:
            length = sum(map(len, self.pieces)) if self.length is None else self.length
        gaps: Sequence[float] = self.gaps if self.gaps is not None else [0.0] * len(self.pieces)
        steps = tuple((gap, piece) for gap, piece in zip(gaps, self.pieces, strict=True) if piece)
        return Answer(self.status, headers, steps, end=self.end, delay=self.delay, length=length)


def sse(event: str, data: bytes) -> bytes:
    """One event of a stream; without a name if `event` is empty."""
    head = b"event: " + event.encode() + b"\n" if event else b""
    return head + b"".join(b"data: " + line + b"\n" for line in data.split(b"\n")) + b"\n"


def plain(
    body: bytes,
    prompt_tokens: int = 0,
    completion_tokens: int = 0,
    content_type: bytes = JSON,
    *,
    cached_tokens: int = 0,
) -> Draft:
    return Draft(
        content_type=content_type,
        pieces=[body],
        billed=[completion_tokens],
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
    )


def refused(refusal: Refusal) -> Draft:
    return Draft(status=refusal.status, headers=refusal.headers, pieces=[refusal.envelope()], billed=[0])


def paced(draft: Draft, tokens_per_second: float, first_token: float) -> None:
    """Spreads the answer over time: a stream piece by piece, a plain answer as one wait before its head.

    `first_token`: seconds. Pieces that bill nothing (finish, usage, terminator) go out with the one before.
    """
    if not tokens_per_second and not first_token:
        return
    each = 1.0 / tokens_per_second if tokens_per_second else 0.0
    if not draft.stream:
        draft.delay = first_token + each * (draft.billed[-1] if draft.billed else 0)
        return
    before = [0, *draft.billed]
    draft.gaps = [each * (now - then) for then, now in zip(before, draft.billed, strict=False)]
    if draft.gaps:
        draft.gaps[0] += first_token
