"""A cut conversation as JSON again: the client's own bytes of what stays, one note for what does not. Pure.

The note stands behind the leading system and developer messages, so that they stay the beginning of the prompt and the
first message behind them is a user's, as some providers ask. It is data, never an instruction: models have obeyed
notes that read like one. Where outputs were only masked there is no note: the placeholders speak for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from proxy.context.atoms import Atom, leading
from proxy.context.heads import Dialect, Raw
from proxy.context.trim import Cut

MARKER_TOKENS: Final = 41
"""At most what `marker` costs as a message, in any encoding and for any number below 10^12."""
MASKED_TOKENS: Final = 20
"""At most what a masked message costs beside members that are seldom there, for any number below 10^12."""

_LEAST_SAVING: Final = 16
"""Tokens. To mask less would cost the prompt's cache more than it brings."""
_FREE: Final = {
    "chat": frozenset(("role", "tool_call_id", "type", "id")),
    "responses": frozenset(("type", "call_id", "id", "status")),
}
"""Members of an output that are counted as nothing, or within the frame of a message."""
_TEXT: Final = ord('"')
_LIST: Final = ord("[")
_MASKABLE: Final = {
    "function_call_output": (_TEXT, _LIST),
    "custom_tool_call_output": (_TEXT, _LIST),
    "local_shell_call_output": (_TEXT,),
    "apply_patch_call_output": (_TEXT,),
}
"""Types of items whose `output` may be a text, and how one must begin to be replaced by a text."""

_NOT_READABLE: Final = (ValueError, RecursionError, OverflowError)
_encode = msgspec.json.Encoder().encode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class _Typed(msgspec.Struct, gc=False):
    type: str | None = None


_typed = msgspec.json.Decoder(_Typed).decode


def marker(cut: Cut, each: Sequence[int], atoms: Sequence[Atom]) -> str:
    """The note that says what was removed. It depends on the cut alone, and so stays the same while the cut does."""
    dropped = [atoms[k] for stage in cut.stages for k in stage]
    messages = sum(atom.end - atom.start for atom in dropped)
    return removal(messages, sum(sum(each[atom.start : atom.end]) for atom in dropped), len(cut.masked))


def removal(messages: int, tokens: int, masked: int = 0) -> str:
    """The same, given the number of dropped messages, of the tokens in them, and of masked outputs."""
    what = f"{_number(messages, 'earlier message')} ({_number(tokens, 'token')})"
    if masked:
        what += f" and the contents of {_number(masked, 'tool output')}"
    return f"[breakwater] {what} {'were' if masked or messages != 1 else 'was'} removed to fit the context window."


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def rewritten(
    dialect: Dialect, raws: Sequence[Raw], atoms: Sequence[Atom], cut: Cut, note: str | None, each: Sequence[int]
) -> bytes:
    """The JSON array of what stays. `note` goes in as one message of the user, if anything was dropped.

    `raws`, `atoms` and `each` as they were given to `trim`. The bytes of what stays are the client's own, but for the
    content of masked messages.
    """
    dropped = {k for stage in cut.stages for k in stage}
    masked = set(cut.masked)
    kept: list[Raw] = []
    for k, atom in enumerate(atoms):
        if k not in dropped:
            kept += raws[atom.start : atom.end]
            if masked and not masked.isdisjoint(atom.outputs):
                first = len(kept) - (atom.end - atom.start) - atom.start
                for at in masked.intersection(atom.outputs):
                    kept[first + at] = _masked(dialect, raws[at], each[at])
    if dropped and note is not None:
        kept.insert(leading(dialect, raws), _encode({"role": "user", "content": note}))
    return b"[" + b",".join(kept) + b"]"


def _masked(dialect: Dialect, raw: Raw, tokens: int) -> bytes:
    members: dict[str, Any] = _members(raw)
    members[_content(dialect)] = placeholder(tokens)
    return _encode(members)


def placeholder(tokens: int) -> str:
    """What stands for an output of so many tokens."""
    return f"[output removed by proxy: {tokens:,} tokens]"


def _content(dialect: Dialect) -> str:
    return "content" if dialect == "chat" else "output"


def mask_savings(dialect: Dialect, raws: Sequence[Raw], atoms: Sequence[Atom], each: Sequence[int]) -> list[int]:
    """For each message at least how many tokens less it costs masked, in any encoding; 0 where it is not to be masked.

    Only outputs of tools are, that a text can stand for, and that save enough to be worth it.
    """
    savings = [0] * len(raws)
    for atom in atoms:
        if not atom.pinned:
            for at in atom.outputs:
                if each[at] >= MASKED_TOKENS + _LEAST_SAVING:
                    saved = each[at] - MASKED_TOKENS - _left_over(dialect, raws[at], each[at])
                    savings[at] = saved if saved >= _LEAST_SAVING else 0
    return savings


def _left_over(dialect: Dialect, raw: Raw, most: int) -> int:
    """Tokens of what masking leaves beside the frame: a token has at least one byte. `most` if there is no masking."""
    try:
        members = _members(raw)
        kind = _typed(raw).type if dialect == "responses" else None
    except _NOT_READABLE:
        return most
    content = members.pop(_content(dialect), None)
    if content is None:
        return most
    starts = (_TEXT, _LIST) if dialect == "chat" else _MASKABLE.get(kind or "", ())
    if memoryview(content)[0] not in starts:
        return most
    free = _FREE[dialect]
    return sum(len(name) + len(value) for name, value in members.items() if name not in free)
