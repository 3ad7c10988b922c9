"""Counting tokens without holding up the event loop.

Up to 16 KiB of text that no memo knows is counted on the loop, about 0.5 ms (7 ms at worst); more goes to a worker
thread, slice by slice, and the tokenizer releases the interpreter lock in each. Prompts of more than 768 KiB, or 2,048
messages, are looked up in the thread too. A caller that is cancelled stops its thread at the next slice.

Counts are estimates of what a provider will bill: exact for text, by custom for the frame around it (`walks`), by
formula for media, and bounded in effort: see `slices` for what happens beyond 2 million characters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from threading import Event
from typing import Any, Final, TypeVar

import msgspec

from proxy.tokens import prompts, walks
from proxy.tokens.encodings import DEFAULT
from proxy.tokens.media import family_of
from proxy.tokens.memo import DEFAULT_ENTRIES
from proxy.tokens.recall import Measured, Recall
from proxy.tokens.slices import TEXT_CHARS, Tally
from proxy.tokens.vocabularies import SHARED, Vocabularies, Vocabulary
from proxy.tokens.walks import Raw
from proxy.types import Dialect

INLINE_BYTES: Final = 16_384
LOOP_BYTES: Final = 786_432
LOOP_MESSAGES: Final = 2048
"""Up to both of these, splitting and hashing hold the loop for about 2 ms."""
CROWD_BYTES: Final = 131_072
"""Fewer bytes are taken apart in a few milliseconds, whatever they are."""

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode
_NO_JSON: Final = (TypeError, ValueError, OverflowError, RecursionError)


class Counter:
    """Token counts of texts and prompts, remembered per message.

    `executor` runs what is too long for the loop (None: the loop's default one); its owner closes it, after the last
    count. `encoding` arguments are names out of `vocabularies.ENCODINGS`, see `encodings.encoding_of`.
    All methods raise VocabularyError if the installation's rank files are damaged, and nothing else.
    """

    __slots__ = ("_executor", "_recall", "_vocabularies", "encode_calls")

    def __init__(
        self,
        *,
        memo_entries: int = DEFAULT_ENTRIES,
        executor: Executor | None = None,
        vocabularies: Vocabularies = SHARED,
    ) -> None:
        self._recall = Recall(memo_entries)
        self._executor = executor
        self._vocabularies = vocabularies
        self.encode_calls = 0
        """Slices given to the tokenizer by counts that were completed."""

    async def prepare(self, encoding: str = DEFAULT) -> None:
        """Loads a vocabulary before anybody waits for it: building one holds the interpreter for 0.2 s."""
        await self._vocabularies.get(encoding)

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
            raws = [msgspec.Raw(_encode(message)) for message in messages]
        except _NO_JSON:  # e.g. lone surrogates: countable, but nothing to hash
            found = [walks.message(message) for message in messages]
            fixed = sum(tokens for tokens, _ in found) + prompts.REPLY_TOKENS
            return fixed + await self._count_texts([text for _, texts in found for text in texts], vocabulary)
        size = sum(map(len, raws))
        prompt = prompts.Prompt(fixed=prompts.REPLY_TOKENS, messages=raws, size=size + len(raws))
        return _texts_of(await self._measure(prompt, size, vocabulary, family_of("")))

    async def count_prompt(self, dialect: Dialect, fields: Mapping[str, Raw], encoding: str) -> int:
        """Tokens of the texts of a prompt, of several prompts all: `measure` without the media."""
        return _texts_of(await self.measure(dialect, fields, encoding, ""))

    async def measure(self, dialect: Dialect, fields: Mapping[str, Raw], encoding: str, model: str) -> Measured:
        """Tokens of the prompt in a request body, message by message, given the raw members of its top level.

        `model` is the provider's name of it: the formulas of media differ. Dialects without a prompt count as 0, and
        so does whatever has not the shape that its dialect asks for. Where there is no list of messages (a bare
        string, completions, embeddings), `each` and `raws` are empty and all is in `fixed`.

        A message's count depends on its bytes alone, whatever the memo holds. Not so in two cases, which `exact` tells:
        of more than 65,536 messages, `each` and `raws` are empty, and `fixed` holds the estimate of all; and of texts
        that nobody knows yet, what exceeds 2 million characters in one request is estimated from those before it, and
        counted when it comes again. A single text beyond that length is estimated from evenly spread parts of its own.
        """
        vocabulary = self._vocabularies.ready(encoding) or await self._vocabularies.get(encoding)
        family = family_of(model)
        size = prompts.size_of(dialect, fields)
        if size > LOOP_BYTES or (size > CROWD_BYTES and prompts.crowded(dialect, fields)):
            return await self._in_thread(
                lambda tally: self._all(prompts.take_apart(dialect, fields), vocabulary, family, tally), vocabulary
            )
        return await self._measure(prompts.take_apart(dialect, fields), size, vocabulary, family)

    async def _count_texts(self, texts: Sequence[str], vocabulary: Vocabulary) -> int:
        def add(tally: Tally) -> int:
            return sum(map(tally.add, texts))

        # Text of other scripts takes about twice the time; `isascii` only reads a flag.
        if sum((len(text) if text.isascii() else 2 * len(text)) + TEXT_CHARS for text in texts) <= INLINE_BYTES:
            return self._inline(add, vocabulary)
        return await self._in_thread(add, vocabulary)

    async def _measure(self, prompt: prompts.Prompt, size: int, vocabulary: Vocabulary, family: str) -> Measured:
        """`size` is the length of all units in bytes."""
        if size > LOOP_BYTES or len(prompt.messages) > LOOP_MESSAGES:
            return await self._in_thread(lambda tally: self._all(prompt, vocabulary, family, tally), vocabulary)
        draft = self._recall.look_up(prompt, vocabulary, family)
        if size <= INLINE_BYTES or draft.missing_bytes <= INLINE_BYTES:
            return self._inline(lambda tally: self._recall.learn(draft, tally), vocabulary)
        return await self._in_thread(lambda tally: self._recall.learn(draft, tally), vocabulary)

    def _all(self, prompt: prompts.Prompt, vocabulary: Vocabulary, family: str, tally: Tally) -> Measured:
        return self._recall.learn(self._recall.look_up(prompt, vocabulary, family), tally)

    def _inline(self, count: Callable[[Tally], T], vocabulary: Vocabulary) -> T:
        tally = Tally(vocabulary)
        found = count(tally)
        self.encode_calls += tally.calls
        return found

    async def _in_thread(self, count: Callable[[Tally], T], vocabulary: Vocabulary) -> T:
        stop = Event()
        tally = Tally(vocabulary, stop)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._executor, count, tally)
        finally:
            stop.set()  # If we are cancelled, the thread is still at it.
        self.encode_calls += tally.calls
        return found


def _texts_of(measured: Measured) -> int:
    return measured.total - measured.media.tokens
