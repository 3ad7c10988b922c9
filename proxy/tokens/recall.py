"""A prompt measured unit by unit: what the memo knows is looked up, the rest is counted and remembered. Never awaits.

The memo is shared by all tenants, so its keys must not collide on purpose: SHA-256 of the unit's bytes, then its kind
and vocabulary. A message that holds media has a second entry, for the formula is the model's and the text is not; the
first one then says so by being negative. So it is with several prompts: the largest of them has an entry of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

import msgspec

from proxy.tokens import media, walks
from proxy.tokens.media import Media
from proxy.tokens.memo import Memo
from proxy.tokens.prompts import Prompt
from proxy.tokens.slices import Tally
from proxy.tokens.vocabularies import Vocabulary
from proxy.tokens.walks import Raw

MEDIA_ENTRIES: Final = 8192
_LARGEST: Final = b"l"


class Measured(msgspec.Struct, frozen=True, gc=False):
    """The tokens of a prompt, media included. `fixed + sum(each)` must fit into a model's window; it has of media only
    what they come to at least (`Media.guessed`)."""

    fixed: int
    """What is no message: tools, instructions, the reply's opening and its schema. Also a conversation that is no list,
    and of several prompts, each of which is answered alone, the largest."""
    each: list[int]
    """Of each message, in order."""
    raws: list[msgspec.Raw]
    """The messages: the client's own bytes."""
    exact: bool
    """Every count depends on its own unit's bytes alone, so that it is the same in every request and every process."""
    media: Media
    """What of the prompt is media: their tokens, which are in the counts, and their bytes."""
    total: int
    """What a provider may bill for: as `fixed + sum(each)`, of several prompts all, of media the most."""
    keys: Sequence[bytes] = ()
    """Of each message: its SHA-256, and a little more. Equal only for equal bytes."""


@dataclass(slots=True)
class Draft:
    """A prompt of which the memo has told what it knows."""

    prompt: Prompt
    family: str
    """Of the model's media."""
    selected: Sequence[msgspec.Raw]
    keys: list[bytes]
    """Of the selected messages."""
    each: list[int]
    """Their tokens; 0 where they are missing."""
    fixed: int
    total: int
    """Tokens of all other units; of several prompts the largest, and all."""
    missing: list[int] = field(default_factory=list)
    """Positions of the messages that are to be counted."""
    unknown: list[tuple[bytes, bytes, Raw]] = field(default_factory=list)
    """(key, kind, bytes) of the other units that are."""
    media: list[Media] = field(default_factory=list)

    @property
    def missing_bytes(self) -> int:
        units = sum(len(raw) for _, _, raw in self.unknown)
        return units + sum(len(self.selected[position]) for position in self.missing)


class Recall:
    """The memory of a process. Threads may share it."""

    __slots__ = ("_media", "_tokens")

    def __init__(self, entries: int) -> None:
        self._tokens: Memo[int] = Memo(entries)
        self._media: Memo[Media] = Memo(MEDIA_ENTRIES)

    def look_up(self, prompt: Prompt, vocabulary: Vocabulary, family: str) -> Draft:
        """What is known: about 1 us a message, and 0.6 us for each KiB of it."""
        selected = prompt.selected
        tag = walks.MESSAGE + vocabulary.tag
        keys = [sha256(raw).digest() + tag for raw in selected]
        found = self._tokens.get_all(keys)
        each = [tokens or 0 for tokens in found]
        draft = Draft(prompt, family, selected, keys, each, prompt.fixed, prompt.fixed)
        for position, tokens in enumerate(found):
            if tokens is None:
                draft.missing.append(position)
            elif tokens < 0:
                known = self._known(keys[position], family)
                if known is None:
                    draft.missing.append(position)
                else:
                    self._take(draft, position, *known)
        for kind, raw in prompt.units:
            key = sha256(raw).digest() + kind + vocabulary.tag
            tokens = self._tokens.get(key)
            largest = self._tokens.get(key + _LARGEST) if tokens is not None and tokens < 0 else tokens
            if tokens is None or largest is None:
                draft.unknown.append((key, kind, raw))
            else:
                draft.fixed += largest
                draft.total += tokens if tokens >= 0 else ~tokens
        return draft

    def learn(self, draft: Draft, tally: Tally) -> Measured:
        """Counts what is missing, remembers it, and sums up."""
        for key, kind, raw in draft.unknown:
            total, largest = self._unit(key, kind, raw, tally)
            draft.fixed += largest
            draft.total += total
        for position in draft.missing:
            key = draft.keys[position]
            known = self._known(key, draft.family)  # it may stand there twice
            self._take(draft, position, *(known or self._message(key, draft.selected[position], draft.family, tally)))
        if draft.prompt.many:
            return _scaled(draft)
        tokens = sum(draft.each)
        exact = not tally.guesses
        found = media.total(draft.media) if draft.media else media.NONE
        most = draft.total + tokens + found.guessed
        return Measured(draft.fixed, draft.each, draft.prompt.messages, exact, found, most, draft.keys or ())

    def _known(self, key: bytes, family: str) -> tuple[int, Media] | None:
        tokens = self._tokens.get(key)
        if tokens is None or tokens >= 0:
            return None if tokens is None else (tokens, media.NONE)
        found = self._media.get(key + family.encode())
        return None if found is None else (~tokens, found)

    def _take(self, draft: Draft, position: int, tokens: int, found: Media) -> None:
        draft.each[position] = tokens + found.tokens - found.guessed
        if found is not media.NONE:
            draft.media.append(found)

    def _message(self, key: bytes, raw: Raw, family: str, tally: Tally) -> tuple[int, Media]:
        guesses = tally.guesses
        value = walks.decoded(raw)
        extra, texts = (0, [walks.plain(raw)]) if value is walks.BROKEN else walks.message(value)
        tokens = extra + sum(map(tally.add, texts))
        found = media.media_in(value, family) if media.marked(bytes(raw)) else media.NONE
        has = found != media.NONE
        if tally.guesses == guesses:
            self._tokens.put(key, ~tokens if has else tokens)
            if has:
                self._media.put(key + family.encode(), found)
        return tokens, found if has else media.NONE

    def _unit(self, key: bytes, kind: bytes, raw: Raw, tally: Tally) -> tuple[int, int]:
        """Its tokens; and if it is several prompts, those of the largest, else the same again."""
        guesses = tally.guesses
        every = walks.each_prompt(raw) if kind == walks.PROMPT else [walks.texts(kind, raw)]
        counts = [extra + sum(map(tally.add, texts)) for extra, texts in every]
        total, largest = sum(counts), max(counts, default=0)
        if tally.guesses == guesses:
            several = len(counts) > 1
            self._tokens.put(key, ~total if several else total)
            if several:
                self._tokens.put(key + _LARGEST, largest)
        return total, largest


def _scaled(draft: Draft) -> Measured:
    """Of too many messages: the tokens of the selected ones scaled up, but never more than their list has bytes."""
    prompt = draft.prompt
    known = media.total(draft.media)
    counted = sum(draft.each) - (known.tokens - known.guessed)
    texts = min(-(-counted * len(prompt.messages) // len(draft.selected)), prompt.size)
    found = media.total(
        media.media_in(walks.decoded(raw), draft.family) for raw in prompt.messages if media.marked(bytes(raw))
    )
    most = draft.fixed + texts + found.tokens
    return Measured(most - found.guessed, [], [], False, found, most, ())
