"""What one target gets of a conversation that has been counted. The decision of this layer, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
from msgspec.structs import replace

from proxy.context import answers
from proxy.context.atoms import Atom, Untrimmable, grouped
from proxy.context.base import Sent
from proxy.context.digest import NOTE_TOKENS
from proxy.context.heads import Dialect, Head, Raw, head_of
from proxy.context.rewrite import MARKER_TOKENS, marker, mask_savings, rewritten
from proxy.context.settings import ContextSettings
from proxy.context.trim import Cut, trim
from proxy.errors import ContextExceeded
from proxy.tokens.bound import most_with
from proxy.tokens.memo import Memo
from proxy.tokens.recall import Measured
from proxy.types import Ask

KEPT: Final = 32_768
"""Heads that are remembered, of each dialect; about 250 bytes each."""


class Heads:
    """Remembers heads. Threads may share it."""

    __slots__ = ("_kept",)

    def __init__(self, entries: int = KEPT) -> None:
        self._kept: dict[Dialect, Memo[Head]] = {"chat": Memo(entries), "responses": Memo(entries)}

    def of(self, dialect: Dialect, raws: Sequence[Raw], keys: Sequence[bytes]) -> list[Head]:
        """The heads of some messages. `keys` name them by their bytes: no two messages share one."""
        memo = self._kept[dialect]
        found = memo.get_all(keys)
        heads = []
        for at, head in enumerate(found):
            if head is None:
                head = head_of(dialect, raws[at])
                memo.put(keys[at], head)
            heads.append(head)
        return heads


class Fit(NamedTuple):
    """What came of one target."""

    sent: Sent
    limit: int | None
    measured: Measured | None = None
    """None: its size in bytes was enough to know."""
    atoms: Sequence[Atom] = ()
    cut: Cut | None = None
    refused: ContextExceeded | None = None
    untouched: str = ""
    """Why nothing is removed although it is too long."""


def total(measured: Measured) -> int:
    """Tokens that must fit into a window."""
    return measured.fixed + sum(measured.each)


def fitted(ask: Ask, settings: ContextSettings, limit: int, measured: Measured, known: Heads) -> Fit:
    """Everything, or what is left after a cut, or a refusal. Takes milliseconds where a cut is needed."""
    tokens = total(measured)
    whole = Sent(ask, measured.total, max(most_with(ask.dialect, ask.fields, measured.media), measured.total))
    if tokens <= limit:
        return Fit(whole, limit, measured)
    acts = settings.mode == "enforce"
    checked = acts and settings.preflight_check
    try:
        atoms, cut = _cut(ask, settings, limit, measured, known)
    except Untrimmable as why:
        refused = answers.cannot_shorten(ask, limit, tokens, why) if checked else None
        return Fit(whole, limit, measured, refused=refused, untouched=why.reason)
    if not cut.fits and (checked or not acts):
        refused = answers.cannot_fit(ask, limit, cut) if checked else None
        return Fit(whole, limit, measured, refused=refused, untouched="cannot_fit")
    if not (cut.stages or cut.masked):
        return Fit(whole, limit, measured)
    note = marker(cut, measured.each, atoms) if cut.stages else None
    sent = shortened(ask, measured, atoms, cut, note) if acts else whole
    return Fit(sent, limit, measured, atoms, cut)


def _cut(
    ask: Ask, settings: ContextSettings, limit: int, measured: Measured, known: Heads
) -> tuple[Sequence[Atom], Cut]:
    """Raises Untrimmable."""
    dialect, raws, each = ask.dialect, measured.raws, measured.each
    if (dialect != "chat" and dialect != "responses") or not raws:
        raise Untrimmable("one_text" if measured.exact else "too_many_messages")
    atoms = grouped(known.of(dialect, raws, measured.keys))
    savings = mask_savings(dialect, raws, atoms, each) if settings.mask_tool_outputs else None
    low = int(limit * settings.trim_to)
    reserve = NOTE_TOKENS if settings.trim_strategy == "summary" else MARKER_TOKENS
    return atoms, trim(atoms, each, fixed=measured.fixed, high=limit, low=low, reserve=reserve, masks=savings)


def shortened(ask: Ask, measured: Measured, atoms: Sequence[Atom], cut: Cut, note: str | None) -> Sent:
    """`ask` without what `cut` removes, and with `note` in its place."""
    dialect = ask.dialect
    assert dialect == "chat" or dialect == "responses"  # nothing else is cut
    array = rewritten(dialect, measured.raws, atoms, cut, note, measured.each)
    fields = {**ask.fields, answers.ARRAYS[dialect]: msgspec.Raw(array)}
    tokens = cut.after + measured.media.guessed
    most = max(most_with(dialect, fields, measured.media), tokens)
    return Sent(replace(ask, fields=fields, edited=True), tokens, most)
