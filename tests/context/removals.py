"""Conversations with a cut made by hand, for tests of what is made of the part that was removed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from proxy.context.atoms import Atom
from proxy.context.trim import Cut

TOKENS = 1_000
"""Of each message, so that any summary is short beside it."""


@dataclass
class Removal:
    """`parts` go to whoever wants a summary: dialect, raws, atoms, each, cut."""

    raws: list[bytes]
    atoms: list[Atom]
    cut: Cut

    @property
    def each(self) -> list[int]:
        return [TOKENS] * len(self.raws)

    @property
    def parts(self) -> tuple[Any, ...]:
        return "chat", self.raws, self.atoms, self.each, self.cut


def message(role: str, content: Any, **more: Any) -> bytes:
    return json.dumps({"role": role, "content": content, **more}).encode()


def removal(*stages: Sequence[int], texts: Sequence[str] | None = None, name: str = "") -> Removal:
    """A system message, then turns of a user and an assistant, an atom each; `stages` are positions of turns."""
    turns = 1 + max((turn for stage in stages for turn in stage), default=0)
    raws = [message("system", "You help.")]
    atoms = [Atom(0, 1, pinned=True)]
    for turn in range(turns + 1):
        text = texts[turn] if texts is not None and turn < len(texts) else f"{name}question {turn}"
        raws += [message("user", text), message("assistant", f"{name}answer {turn}")]
        atoms.append(Atom(1 + 2 * turn, 3 + 2 * turn, user=True))
    cut = Cut(tuple(tuple(turn + 1 for turn in stage) for stage in stages), (), 0, 0, 0, 0, True)
    return Removal(raws, atoms, cut)


def reply(content: Any = "Goals - none.", finish_reason: Any = "stop", **more: Any) -> bytes:
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **more}, "finish_reason": finish_reason}
    return json.dumps({"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice]}).encode()
