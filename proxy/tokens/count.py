"""Counting tokens without holding up the event loop.

Up to 16 KiB of text that no memo knows is counted on the loop, about 0.5 ms (7 ms at worst); more goes to a worker
thread, slice by slice, and the tokenizer releases the interpreter lock in each. Bodies beyond 256 KiB are taken apart
and hashed in the thread too. A caller that is cancelled stops its thread at the next slice.

Counts are estimates of what a provider will bill: exact for text, by custom for the frame around it (`prompts`), and
bounded in effort: see `slices` for what happens beyond 2 million characters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from hashlib import sha256
from threading import Event
from typing import Any, Final

import msgspec

from proxy.tokens import prompts
from proxy.tokens.memo import DEFAULT_ENTRIES, Memo
from proxy.tokens.slices import TEXT_CHARS, Tally
from proxy.tokens.vocabularies import SHARED, Vocabularies, Vocabulary
from proxy.types import Dialect

INLINE_BYTES: Final = 16_384
LOOP_BYTES: Final = 262_144

_encode = msgspec.json.Encoder().encode
_NO_JSON: Final = (TypeError, ValueError, OverflowError, RecursionError)


class Counter:
    """Token counts of texts and prompts, remembered per message.

    `executor` runs what is too long for the loop (None: the loop's default one); its owner closes it, after the last
    count. `encoding` arguments are names out of `vocabularies.ENCODINGS`, see `encodings.encoding_of`.
    All methods raise VocabularyError if the installation's rank files are damaged, and nothing else.
    """

    __slots__ = ("_executor", "_memo", "_vocabularies", "encode_calls")

    def __init__(
        self,
        *,
        memo_entries: int = DEFAULT_ENTRIES,
        executor: Executor | None = None,
        vocabularies: Vocabularies = SHARED,
    ) -> None:
        self._memo = Memo(memo_entries)
        self._executor = executor
        self._vocabularies = vocabularies
        self.encode_calls = 0
        """Slices given to the tokenizer by counts that were completed."""

    async def count_text(self, text: str, encoding: str) -> int:
        """Tokens of a text, with nothing around it. Not remembered."""
        return await self._count_texts([text], await self._vocabularies.get(encoding))

    async def count_texts(self, texts: Sequence[str], encoding: str) -> int:
        """The sum over some texts, each counted for itself."""
        return await self._count_texts(texts, await self._vocabularies.get(encoding))

    async def count_messages(self, messages: Sequence[Mapping[str, Any]], encoding: str) -> int:
        """Tokens of chat messages as decoded from JSON, the opening of the reply included."""
        vocabulary = await self._vocabularies.get(encoding)
        try:
            raws = [_encode(message) for message in messages]
        except _NO_JSON:  # e.g. lone surrogates: countable, but nothing to hash
            found = [prompts.message(message) for message in messages]
            fixed = sum(tokens for tokens, _ in found) + prompts.REPLY_TOKENS
            return fixed + await self._count_texts([text for _, texts in found for text in texts], vocabulary)
        prompt = prompts.Prompt(fixed=prompts.REPLY_TOKENS, messages=raws, of=len(raws))
        return await self._count_parts(prompt, sum(map(len, raws)), vocabulary)

    async def count_prompt(self, dialect: Dialect, fields: Mapping[str, prompts.Raw], encoding: str) -> int:
        """Tokens of the prompt in a request body, given the raw members of its top level.

        Dialects without a prompt count as 0, and so does whatever has not the shape that its dialect asks for.
        """
        vocabulary = self._vocabularies.ready(encoding) or await self._vocabularies.get(encoding)
        size = prompts.size_of(dialect, fields)
        if size > LOOP_BYTES:
            return await self._in_thread(
                lambda tally: self._add_up(prompts.take_apart(dialect, fields), vocabulary, tally), vocabulary
            )
        return await self._count_parts(prompts.take_apart(dialect, fields), size, vocabulary)

    async def _count_texts(self, texts: Sequence[str], vocabulary: Vocabulary) -> int:
        def add(tally: Tally) -> int:
            return sum(map(tally.add, texts))

        # Text of other scripts takes about twice the time; `isascii` only reads a flag.
        if sum((len(text) if text.isascii() else 2 * len(text)) + TEXT_CHARS for text in texts) <= INLINE_BYTES:
            return self._inline(add, vocabulary)
        return await self._in_thread(add, vocabulary)

    async def _count_parts(self, prompt: prompts.Prompt, size: int, vocabulary: Vocabulary) -> int:
        """`size` is the length of all units in bytes."""
        if size <= INLINE_BYTES:
            tally = Tally(vocabulary)
            tokens = self._add_up(prompt, vocabulary, tally)
            self.encode_calls += tally.calls
            return tokens
        if size > LOOP_BYTES:
            return await self._in_thread(lambda tally: self._add_up(prompt, vocabulary, tally), vocabulary)
        units = prompt.units + [(prompts.MESSAGE, raw) for raw in prompt.messages]
        known, unknown = self._look_up(units, vocabulary)
        known += prompt.fixed
        if sum(len(raw) for _, _, raw in unknown) <= INLINE_BYTES:
            return known + self._inline(lambda tally: self._learn(unknown, tally), vocabulary)
        return known + await self._in_thread(lambda tally: self._learn(unknown, tally), vocabulary)

    def _inline(self, count: Callable[[Tally], int], vocabulary: Vocabulary) -> int:
        tally = Tally(vocabulary)
        tokens = count(tally)
        self.encode_calls += tally.calls
        return tokens

    async def _in_thread(self, count: Callable[[Tally], int], vocabulary: Vocabulary) -> int:
        stop = Event()
        tally = Tally(vocabulary, stop)
        try:
            tokens = await asyncio.get_running_loop().run_in_executor(self._executor, count, tally)
        finally:
            stop.set()  # If we are cancelled, the thread is still at it.
        self.encode_calls += tally.calls
        return tokens

    def _add_up(self, prompt: prompts.Prompt, vocabulary: Vocabulary, tally: Tally) -> int:
        known, unknown = self._look_up(prompt.units, vocabulary)
        total = prompt.fixed + known + self._learn(unknown, tally)
        if prompt.messages:
            known, unknown = self._look_up([(prompts.MESSAGE, raw) for raw in prompt.messages], vocabulary)
            counted = known + self._learn(unknown, tally)
            total += -(-counted * prompt.of // len(prompt.messages))
        return total

    def _look_up(
        self, units: Sequence[tuple[bytes, prompts.Raw]], vocabulary: Vocabulary
    ) -> tuple[int, list[tuple[bytes, bytes, prompts.Raw]]]:
        """Sum of the counts that the memo has, and (key, kind, bytes) of the units that it lacks.

        The memo is shared by all tenants, so the key must not collide on purpose: 128 bits of SHA-256.
        """
        known = 0
        unknown = []
        get, tag = self._memo.get, vocabulary.tag
        for kind, raw in units:
            key = sha256(raw).digest()[:16] + kind + tag
            tokens = get(key)
            if tokens is None:
                unknown.append((key, kind, raw))
            else:
                known += tokens
        return known, unknown

    def _learn(self, unknown: Sequence[tuple[bytes, bytes, prompts.Raw]], tally: Tally) -> int:
        total = 0
        for key, kind, raw in unknown:
            guesses = tally.guesses
            tokens, texts = prompts.texts(kind, raw)
            tokens += sum(map(tally.add, texts))
            if tally.guesses == guesses:
                self._memo.put(key, tokens)
            total += tokens
        return total
