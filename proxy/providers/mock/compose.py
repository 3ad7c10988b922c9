"""What the mock says: for one prompt the text or the tool calls of each choice, before any wire format.

| the prompt                                  | the answer                                                |
|---------------------------------------------|-----------------------------------------------------------|
| a tool is forced; or there are tools and the | calls: of every tool that the user names, else of the    |
| last word is not a tool's result            | first one                                                 |
| model `echo`                                | the last user message, verbatim                           |
| model `digest`                              | a summary: each "The code of X is Y." of the prompt, a    |
|                                             | line each; the newest, where it asks for "at most N words" |
| a JSON format is asked for                  | a JSON value that satisfies the schema                    |
| model `bench-N` or `bench-N-RATE`           | exactly N pieces of text (RATE: tokens a second)          |
| anything else                               | 20 to 60 pieces of prose                                  |
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import orjson

from proxy.providers.mock.ask import Prompt
from proxy.providers.mock.schema import example
from proxy.providers.mock.text import Count, fragments, prose, running, shorten, split

BENCH: Final = re.compile(r"bench-(\d{1,5})(?:-(\d{1,5}))?")
"""Model names that say how long the answer is and at what pace it streams."""

_FACT: Final = re.compile(r"The code of [^\s.][^.\n]{0,63} is [^\s.]{1,64}\.")
_AT_MOST: Final = re.compile(r"[Aa]t most (\d{1,5}) words")
_NO_FACTS: Final = "No codes were stated."

CALL_TOKENS: Final = 3
"""Tokens around a call's name and arguments."""


@dataclass(slots=True)
class ToolCall:
    id: str
    kind: str
    name: str
    arguments: str
    pieces: list[str]
    tokens: list[int]
    """Running count over `pieces`; the name and the frame are billed with the first."""


@dataclass(slots=True)
class Choice:
    finish: str
    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def total(self) -> int:
        """Completion tokens."""
        return (self.tokens[-1] if self.tokens else 0) + sum(call.tokens[-1] for call in self.calls)


def compose(prompt: Prompt, count: Count) -> list[Choice]:
    if prompt.tools and (prompt.may_call or prompt.forced is not None):
        return [_calls(prompt, i, count) for i in range(prompt.choices)]
    return [_speak(prompt, i, count) for i in range(prompt.choices)]


def _speak(prompt: Prompt, index: int, count: Count) -> Choice:
    pieces, cut = shorten(_words(prompt, prompt.random(index)), prompt.limit, prompt.stop, count)
    return Choice("length" if cut else "stop", pieces, running(pieces, count))


def _words(prompt: Prompt, random: Random) -> list[str]:
    if prompt.name == "echo":
        return split(prompt.last_user)
    if prompt.name == "digest":
        return split(_digest("\n".join(prompt.texts)))
    if prompt.schema is not None:
        value: Any = example(prompt.schema, random) if prompt.schema else {"answer": "".join(prose(random, 8))}
        return fragments(orjson.dumps(value).decode())
    sized = BENCH.fullmatch(prompt.name)
    return prose(random, int(sized[1]) if sized else random.randint(20, 60))


def _digest(text: str) -> str:
    """What an ideal model would keep of a conversation whose facts are sentences of one form: all of them, or the
    newest ones that there is room for. No real model is as reliable."""
    asked = _AT_MOST.search(text)
    left = int(asked[1]) if asked else len(text)
    kept: list[str] = []
    for fact in reversed(dict.fromkeys(_FACT.findall(text))):
        left -= len(fact.split())
        if left < 0:
            break
        kept.append(fact)
    return "\n".join(reversed(kept)) or _NO_FACTS


def _calls(prompt: Prompt, index: int, count: Count) -> Choice:
    random = prompt.random(index)
    calls = [
        _call(tool, f"call_{prompt.digest.hex()[:16]}{index}{i}", random, count)
        for i, tool in enumerate(_chosen(prompt))
    ]
    choice = Choice("stop" if prompt.forced else "tool_calls", calls=calls)
    if prompt.limit is not None and choice.total > prompt.limit:
        _break(choice, prompt.limit)
    return choice


def _chosen(prompt: Prompt) -> list[dict[str, Any]]:
    if prompt.forced:
        return [tool for tool in prompt.tools if tool["name"] == prompt.forced][:1]
    named = [tool for tool in prompt.tools if tool["name"] in prompt.last_user]
    return (named if prompt.parallel else named[:1]) or prompt.tools[:1]


def _call(tool: dict[str, Any], ident: str, random: Random, count: Count) -> ToolCall:
    if tool["kind"] == "custom":
        arguments = "".join(prose(random, 6))
    else:
        made = example(tool["parameters"] or {"type": "object"}, random)
        arguments = orjson.dumps(made if isinstance(made, dict) else {}).decode()
    pieces = fragments(arguments)
    return _counted(ToolCall(ident, tool["kind"], tool["name"], arguments, pieces, []), count)


def _counted(call: ToolCall, count: Count) -> ToolCall:
    frame = count(call.name) + CALL_TOKENS
    call.tokens = [frame + tokens for tokens in running(call.pieces, count)] or [frame]
    return call


def _break(choice: Choice, limit: int) -> None:
    """The token limit stops a model wherever it is: the last call keeps half a JSON text."""
    kept = []
    for call in choice.calls:
        within = sum(tokens <= limit for tokens in call.tokens) if call.pieces else 0
        kept.append(call)
        if within < len(call.tokens):
            call.pieces, call.tokens = call.pieces[:within], call.tokens[: max(within, 1)]
            call.arguments = "".join(call.pieces)
            call.tokens[-1] = min(call.tokens[-1], limit)
            break
        limit -= call.tokens[-1]
    choice.calls = kept
    choice.finish = "length"
