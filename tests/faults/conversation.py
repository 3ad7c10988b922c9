"""A long session of an agent: made from a seed, and only ever longer, as agents make them.

It begins with a system prompt and a task. Then each turn adds what an agent adds before it asks again: the model's
message with one or two tool calls and their results, or the model's text and what the user says to that. Results are
of very different sizes. Here and there somebody states a fact, "The code of X is Y.": whether it can still be read in
a prompt tells what a shortened conversation has kept.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

RESULT_TOKENS: Final = 1100
"""Mean of a tool result."""
_CHARACTERS_A_TOKEN: Final = 4.6
"""Of the text below, by o200k_base."""
_SPREAD: Final = 0.9
"""Sigma of the lognormal distribution of sizes: half of the results have fewer than 730 tokens, one in fifty 4,600."""
_LARGEST: Final = 8
"""Times the mean."""
_USER_TURNS: Final = 0.08
_TWO_CALLS: Final = 0.25

_PROSE: Final = (
    "the anchor holds while every second buoy drifts along a line that no chart shows and our pilot reads depth from "
    "old soundings before entering under sail with careful hands who check each rope then wait for water to rise over "
    "that bar again so cargo can move toward land without loss or delay returning value expected result error none "
    "found file module function test passed import class method string integer list index range"
)
_WORDS: Final = tuple(_PROSE.split())
_KINDS: Final = ("pier", "buoy", "lock", "crane", "quay", "beacon", "wharf", "dock", "mole", "tower")
_SIDES: Final = ("north", "south", "outer", "inner", "upper", "lower", "western", "eastern", "old", "new")
_LETTERS: Final = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"

Where = Literal["system", "task", "tool", "assistant", "user"]
_TURNS: Final[tuple[Where, ...]] = ("tool", "assistant", "user")
"""Where facts are stated in the course of a session, in turn."""

TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": does,
            "parameters": {"type": "object", "properties": {member: {"type": "string"}}, "required": [member]},
        },
    }
    for name, does, member in (
        ("read_file", "Reads a file of the project.", "path"),
        ("run", "Runs a command and returns what it printed.", "command"),
    )
]


@dataclass(frozen=True, slots=True)
class Fact:
    turn: int
    """After which it stands in the conversation; 0 for the system prompt and the task."""
    where: Where
    place: str
    code: str

    @property
    def text(self) -> str:
        return f"The code of {self.place} is {self.code}."


@dataclass(frozen=True, slots=True)
class Session:
    """Messages as JSON, so that sending a longer conversation does not encode it again."""

    opening: tuple[bytes, ...]
    turns: tuple[tuple[bytes, ...], ...]
    facts: tuple[Fact, ...]

    @property
    def pinned(self) -> tuple[Fact, ...]:
        """Those of the system prompt and of the task: never to be lost."""
        return tuple(fact for fact in self.facts if fact.turn == 0)

    @property
    def planted(self) -> tuple[Fact, ...]:
        """Those of the turns."""
        return tuple(fact for fact in self.facts if fact.turn > 0)

    def bodies(self, model: str) -> Iterator[bytes]:
        """The request before each turn and the one after the last, each the one before and a turn more."""
        head = json.dumps({"model": model, "max_tokens": 64, "tools": TOOLS})[:-1].encode()
        so_far = bytearray(b",".join(self.opening))
        yield b'%b,"messages":[%b]}' % (head, so_far)
        for turn in self.turns:
            so_far += b"," + b",".join(turn)
            yield b'%b,"messages":[%b]}' % (head, so_far)


def session(seed: int, turns: int, *, scale: float = 1.0, every: int = 10) -> Session:
    """`scale`: of the sizes of all messages; `every`: so many turns there is a fact."""
    return _Writer(seed, scale).session(turns, every)


class _Writer:
    def __init__(self, seed: int, scale: float) -> None:
        self._random = random.Random(seed)
        self._scale = scale
        self._calls = 0
        self._places = [f"the {side} {kind} {number}" for number in range(1, 100) for side in _SIDES for kind in _KINDS]
        self._random.shuffle(self._places)

    def session(self, turns: int, every: int) -> Session:
        facts = [self._fact(0, where) for where in ("system", "task") for _ in range(3)]
        rules, task = (" ".join(fact.text for fact in facts if fact.where == where) for where in ("system", "task"))
        opening = (
            _message("system", f"You keep the books of a harbor. {self._text(900)} {rules}"),
            _message("user", f"Go through all that lies here and put it in order. {self._text(300)} {task}"),
        )
        made: list[tuple[bytes, ...]] = []
        for turn in range(1, turns + 1):
            fact = None
            if turn % every == 0:
                fact = self._fact(turn, _TURNS[turn // every % len(_TURNS)])
                facts.append(fact)
            made.append(self._turn(fact))
        return Session(opening, tuple(made), tuple(facts))

    def _turn(self, fact: Fact | None) -> tuple[bytes, ...]:
        where = fact.where if fact is not None else None
        words = self._text(self._random.randrange(20, 120))
        if where == "user" or (where is None and self._random.random() < _USER_TURNS):
            asked = self._text(self._random.randrange(20, 200))
            return _message("assistant", words), _message("user", self._with(asked, fact))
        said = self._with(words, fact) if where == "assistant" else words
        count = 2 if self._random.random() < _TWO_CALLS else 1
        calls = [self._call() for _ in range(count)]
        content = said if where == "assistant" or self._random.random() < 0.5 else None
        stated = self._random.randrange(count)
        results = [
            _message("tool", self._result(fact if where == "tool" and i == stated else None), tool_call_id=call["id"])
            for i, call in enumerate(calls)
        ]
        return _message("assistant", content, tool_calls=calls), *results

    def _fact(self, turn: int, where: Where) -> Fact:
        code = "".join(self._random.choices(_LETTERS, k=8))
        return Fact(turn, where, self._places.pop(), f"{code[:3]}-{code[3:]}")

    def _call(self) -> dict[str, Any]:
        self._calls += 1
        tool = self._random.choice(TOOLS)["function"]
        (member,) = tool["parameters"]["properties"]
        arguments = json.dumps({member: self._text(12)})
        return {
            "id": f"call_{self._calls:06d}",
            "type": "function",
            "function": {"name": tool["name"], "arguments": arguments},
        }

    def _result(self, fact: Fact | None) -> str:
        size = self._random.lognormvariate(math.log(RESULT_TOKENS) - _SPREAD**2 / 2, _SPREAD)
        return self._with(self._text(min(size, _LARGEST * RESULT_TOKENS)), fact)

    def _text(self, tokens: float) -> str:
        """Lines of about so many tokens, times the scale."""
        left = max(tokens * self._scale * _CHARACTERS_A_TOKEN, 8)
        lines = []
        while left > 0:
            words = self._random.choices(_WORDS, k=min(self._random.randrange(6, 16), 1 + int(left / 5)))
            lines.append(f"{self._random.randrange(10_000)}: {' '.join(words)}")
            left -= len(lines[-1]) + 1
        return "\n".join(lines)

    def _with(self, text: str, fact: Fact | None) -> str:
        """The text with the fact as one of its lines, wherever."""
        if fact is None:
            return text
        lines = text.split("\n")
        lines.insert(self._random.randrange(len(lines) + 1), fact.text)
        return "\n".join(lines)


def _message(role: str, content: str | None, **more: Any) -> bytes:
    return json.dumps({"role": role, "content": content, **more}, separators=(",", ":")).encode()
