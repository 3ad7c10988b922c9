"""The steps of a script, and which of them a request gets. `script` says what they mean and reads them."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Final

from proxy.providers.mock.draft import Draft
from proxy.transport.answer import End
from proxy.types import Headers


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. `line` and `column` count from 1; `path` names the place, as in `steps[2].stream[0].delay_ms`."""

    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.line}:{self.column}: {self.path}: {self.message}"


class ScriptError(ValueError):
    """A script that cannot be played: every mistake in it, in the order of the file."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


ALWAYS: Final = -1


@dataclass(slots=True)
class Step:
    path: str = "*"
    model: str = "*"
    times: int = 1
    """Uses; ALWAYS for any number."""
    status: int = 200
    content_type: bytes | None = None
    """None: the ordinary answer of the mock."""
    headers: Headers | None = None
    delay: float = 0.0
    """Seconds."""
    pieces: tuple[bytes, ...] = ()
    gaps: tuple[float, ...] | None = None
    streams: bool = False
    split: int | None = None
    gap: float | None = None
    cut_at: int | None = None
    then: End | None = None

    def draft(self) -> Draft | None:
        """The step's own answer; None if it only bends the ordinary one."""
        if self.content_type is None:
            return None
        return Draft(
            status=self.status,
            content_type=self.content_type,
            pieces=list(self.pieces),
            billed=[0] * len(self.pieces),
            stream=self.streams,
            gaps=list(self.gaps) if self.gaps is not None else None,
        )

    def bend(self, draft: Draft) -> None:
        draft.delay = max(draft.delay, self.delay)
        for name, value in self.headers or ():
            if name == b"content-type":
                draft.content_type = value
            else:
                draft.headers = [*draft.headers, (name, value)]
        if self.split is not None:
            _split(draft, self.split)
        if self.gap is not None:
            draft.gaps = [0.0, *[self.gap] * (len(draft.pieces) - 1)][: len(draft.pieces)]
        if self.cut_at is not None:
            draft.cut(self.cut_at)
            draft.end = End.RESET
        if self.then is not None:
            if self.then is End.COMPLETE:
                draft.length = None  # a clean end: what is sent is what the head declares
            draft.end = self.then


class Script:
    """The steps with their uses left. One script serves one mock."""

    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps
        self._left = [step.times for step in steps]

    def take(self, path: str, model: str) -> Step | None:
        """The step for this request, one use of it gone; None: answer as usual. `model` as sent, with its prefix."""
        for i, step in enumerate(self._steps):
            if not self._left[i] or not fnmatch.fnmatchcase(path, step.path):
                continue
            if fnmatch.fnmatchcase(model, step.model) or fnmatch.fnmatchcase(model.removeprefix("mock/"), step.model):
                if self._left[i] != ALWAYS:
                    self._left[i] -= 1
                return step
        return None


def _split(draft: Draft, size: int) -> None:
    body = b"".join(draft.pieces)
    ends: list[int] = []
    at = 0
    for piece in draft.pieces:
        at += len(piece)
        ends.append(at)
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    billed = []
    whole = 0  # pieces of the old cut that are complete so far: only these are billed
    for i in range(len(pieces)):
        while whole < len(ends) and ends[whole] <= (i + 1) * size:
            whole += 1
        last = whole if i < len(pieces) - 1 else len(ends)
        billed.append(draft.billed[last - 1] if last else 0)
    draft.pieces, draft.billed, draft.gaps = pieces, billed, None
