"""What is said of a conversation that is long: the refusal, and the headers. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from proxy.context.atoms import Atom, Untrimmable
from proxy.context.trim import Cut
from proxy.errors import ContextExceeded
from proxy.types import Ask, Dialect

ARRAYS: Final[Mapping[Dialect, str]] = {"chat": "messages", "responses": "input"}
"""Where a conversation stands in a body."""
MEMBERS: Final[Mapping[Dialect, str]] = {**ARRAYS, "completions": "prompt"}
"""What of a body can be too long."""
_KEPT_ELSEWHERE: Final = ("previous_response_id", "conversation")
"""Members of a request for a response that stand for messages which nobody can count, or cut, from here."""

_WHY: Final = {
    "one_text": "it is one text, from which nothing can be removed",
    "too_many_messages": "it has too many messages to remove some of them",
    "orphan_result": "a tool result has no call before it, and such a conversation is not shortened",
    "duplicate_result": "a tool call has two results, and such a conversation is not shortened",
    "unanswered_call": "a tool call has no result, and such a conversation is not shortened",
    "unknown_role": "a message has an unknown role, and such a conversation is not shortened",
    "not_an_object": "an entry is no message, and such a conversation is not shortened",
    "stored_item": "it refers to stored items, whose length is not known here",
}


def compacts(ask: Ask) -> bool:
    """What is sent is to become shorter, and for good: nothing may be missing from it."""
    return ask.dialect == "responses" and ask.route.endswith("/compact")


def kept_elsewhere(ask: Ask) -> str:
    """The member that stands for history that the provider keeps; empty: there is none."""
    if ask.dialect != "responses":
        return ""
    return next((name for name in _KEPT_ELSEWHERE if not _is_null(ask.fields.get(name))), "")


def cut_by_provider(ask: Ask) -> bool:
    """The provider has been asked to shorten what is too long: it refuses nothing for that."""
    if ask.dialect != "responses":
        return False
    truncation = ask.fields.get("truncation")
    auto = truncation is not None and bytes(truncation) == b'"auto"'
    return auto or not _is_null(ask.fields.get("context_management"))


def _is_null(raw: msgspec.Raw | None) -> bool:
    return raw is None or bytes(memoryview(raw)[:5]) in (b"null", b"[]")


def cannot_fit(ask: Ask, limit: int, cut: Cut) -> ContextExceeded:
    """Everything that may go is gone, and the rest is still too long."""
    return ContextExceeded(
        f"The conversation has {cut.before} tokens and {limit} fit. What must stay (system messages, tools, the first "
        f"and the last user message, the newest messages) has {cut.pinned} of them, the newest messages {cut.newest}.",
        param=MEMBERS[ask.dialect],
        limit=limit,
        tokens=cut.before,
        pinned=cut.pinned,
        newest=cut.newest,
    )


def cannot_shorten(ask: Ask, limit: int, tokens: int, why: Untrimmable) -> ContextExceeded:
    """It is too long, and not of a shape that anything is removed from."""
    param = MEMBERS[ask.dialect]
    place = param if why.position is None else f"{param}[{why.position}]"
    reason = _WHY.get(why.reason, "it is not of a shape that can be shortened")
    details: dict[str, Any] = {"limit": limit, "tokens": tokens, "pinned": tokens, "newest": tokens}
    return ContextExceeded(
        f"The prompt has {tokens} tokens and {limit} fit; {reason}.", param=place, reason=why.reason, **details
    )


def removed(cut: Cut, atoms: Sequence[Atom]) -> tuple[int, int]:
    """How many messages are removed, and the position behind the newest of them."""
    gone = [atoms[position] for stage in cut.stages for position in stage]
    return sum(atom.end - atom.start for atom in gone), max((atom.end for atom in gone), default=0)


def tokens_header(tokens: int, limit: int, method: str) -> str:
    return f"est={tokens};limit={limit};method={method}"


def trimmed_header(strategy: str, cut: Cut, dropped: int, place: int, *, failed: str, acts: bool) -> str:
    """`failed`: why there is no summary. `acts` False: it would have been so."""
    said = f"{strategy};dropped={dropped};tokens={cut.before - cut.after};cut={place}"
    if cut.masked:
        said += f";masked={len(cut.masked)}"
    if failed:
        said += f";fallback={failed}"
    return said if acts else f"{said};mode=observe"


def untrimmed_header(reason: str) -> str:
    return f"none;reason={reason}" if reason else "none"
