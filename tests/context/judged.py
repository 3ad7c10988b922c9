"""What can be said of a conversation without asking the code under test: what it costs, and what must stay together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from proxy.context.heads import Dialect
from proxy.tokens import walks

Message = dict[str, Any]


@lru_cache(maxsize=65_536)
def tokens(raw: bytes) -> int:
    """As the counter would have it, but that every four characters of a text are a token."""
    extra, texts = walks.texts(walks.MESSAGE, raw)
    return extra + sum(-(-len(text) // 4) for text in texts)


def ties(dialect: Dialect, messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
    """(call, result) and (reasoning, what follows it), as positions. Raises ValueError where something is left open."""
    waiting: list[tuple[str, int]] = []
    for at, message in enumerate(messages):
        kind = message.get("type") or ""
        key = _answers(message)
        if key is not None:
            mates = [mate for mate in waiting if mate[0] == key]
            if not mates:
                raise ValueError(f"{at} answers nothing")
            waiting.remove(mates[-1])  # those of one message are alike
            yield mates[-1][1], at
        waiting += [(made["id"], at) for made in message.get("tool_calls") or ()]
        if message.get("function_call"):
            waiting.append((message["function_call"]["name"], at))
        if kind.endswith("_call") and isinstance(message.get("call_id"), str):
            waiting.append((message["call_id"], at))
        if kind == "mcp_approval_request":
            waiting.append((message["id"], at))
        if kind == "reasoning" and at + 1 < len(messages):
            yield at, at + 1
    if waiting:
        raise ValueError(f"{waiting} have no answer")


def _answers(message: Message) -> str | None:
    """The id, or the name, of what a message answers."""
    if message.get("role") == "tool" and "type" not in message:
        return str(message["tool_call_id"])
    if message.get("role") == "function":
        return str(message["name"])
    if message.get("type") == "mcp_approval_response":
        return str(message["approval_request_id"])
    return str(message["call_id"]) if (message.get("type") or "").endswith("_output") else None
