"""Tokenizer vocabularies from the package's own files: nothing is ever fetched.

A vocabulary is a pattern that splits text into pieces and a table of ranks that merges each piece's bytes into
tokens. The ranks lie beside this module (`vocabulary/*.tiktoken.gz`), checked at load against the sums below.

A vocabulary costs about 50 MiB and 0.3 s, so it is loaded at first need, once per process, in a thread of its own.
That thread shares the interpreter except for the final step (about 0.2 s for o200k_base): tiktoken builds its table
in one call that holds the interpreter lock. Who cannot bear that pause while serving loads at start-up.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import zlib
from binascii import a2b_base64
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import resources
from threading import Lock, Thread
from typing import Final

import tiktoken


class VocabularyError(RuntimeError):
    """A rank file of the installation is missing or damaged. Only reinstalling helps."""


@dataclass(frozen=True, slots=True)
class _Spec:
    sha256: str
    """Of the unpacked rank file."""
    pattern: str
    tag: bytes
    """One byte that stands for the vocabulary in memo keys."""


_SPECS: Final = {
    "o200k_base": _Spec(
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"
        r"|\s+",
        b"o",
    ),
    "cl100k_base": _Spec(
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        r"'(?i:[sdmt]|ll|ve|re)"
        r"|[^\r\n\p{L}\p{N}]?+\p{L}++"
        r"|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$"
        r"|\s*[\r\n]"
        r"|\s+(?!\S)"
        r"|\s",
        b"c",
    ),
}

_RANKS_OF: Final = {"o200k_base": "o200k_base", "o200k_harmony": "o200k_base", "cl100k_base": "cl100k_base"}
"""Encoding to rank file. Harmony adds only special tokens, and ordinary text never becomes one."""

ENCODINGS: Final = frozenset(_RANKS_OF)


class Vocabulary:
    """One loaded vocabulary. Immutable: any thread may use it, and encoding releases the interpreter lock."""

    __slots__ = ("_encode", "name", "tag")

    def __init__(self, name: str, tag: bytes, encode: Callable[[str], list[int]]) -> None:
        self.name = name
        self.tag = tag
        self._encode = encode

    def ids(self, text: str) -> list[int]:
        """Token ids of a text. Special-token texts such as `<|endoftext|>` are plain text.

        Not for text from outside: a run of a million blanks panics. `count` survives that.
        """
        return self._encode(text)

    def count(self, text: str) -> int:
        """Number of tokens of a slice, in one go on the calling thread (16 Ki characters: up to 7 ms).

        If the tokenizer panics, the answer is the number of UTF-8 bytes: no token is shorter than one.
        """
        try:
            return len(self._encode(text))
        # A Rust panic derives from BaseException and its class cannot be imported; all else goes on, cancellation too.
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            return len(text.encode("utf-8", "replace"))


def packed(file: str) -> bytes:
    """The bytes of a file in the package's `vocabulary` directory."""
    return resources.files("proxy.tokens").joinpath("vocabulary", file).read_bytes()


class Vocabularies:
    """Loads each vocabulary at most once, whoever asks, from whichever thread or event loop.

    `read` gives the content of a rank file by file name (`o200k_base.tiktoken.gz`).
    """

    __slots__ = ("_loads", "_lock", "_read", "_ready")

    def __init__(self, read: Callable[[str], bytes] = packed) -> None:
        self._read = read
        self._lock = Lock()
        self._loads: dict[str, Future[Vocabulary]] = {}
        self._ready: dict[str, Vocabulary] = {}

    def load(self, encoding: str) -> Vocabulary:
        """Blocks until the vocabulary of an encoding (one of `ENCODINGS`, else KeyError) is there.

        Raises VocabularyError; the next call then tries again.
        """
        name = _RANKS_OF[encoding]
        future, mine = self._claim(name)
        if mine:
            self._fill(name, future)
        return future.result()

    def ready(self, encoding: str) -> Vocabulary | None:
        """The vocabulary, if it is loaded."""
        return self._ready.get(encoding)

    async def get(self, encoding: str) -> Vocabulary:
        """The same without blocking. A cancelled caller leaves the load running for the others."""
        name = _RANKS_OF[encoding]
        future, mine = self._claim(name)
        if mine:
            thread = Thread(target=self._fill, args=(name, future), name=f"load-{name}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._fail(name, future, error)
        vocabulary = future.result() if future.done() else await asyncio.wrap_future(future)
        self._ready[encoding] = vocabulary
        return vocabulary

    def _claim(self, name: str) -> tuple[Future[Vocabulary], bool]:
        with self._lock:
            future = self._loads.get(name)
            if future is not None:
                return future, False
            future = self._loads[name] = Future()
            future.set_running_or_notify_cancel()  # From here on nobody's cancellation can take it from the others.
            return future, True

    def _fill(self, name: str, future: Future[Vocabulary]) -> None:
        try:
            vocabulary = _build(name, self._read)
        # Whatever went wrong belongs to those who wait; it is raised there.
        except BaseException as error:
            self._fail(name, future, error)
        else:
            future.set_result(vocabulary)

    def _fail(self, name: str, future: Future[Vocabulary], error: BaseException) -> None:
        with self._lock:
            del self._loads[name]
        future.set_exception(error)


def _build(name: str, read: Callable[[str], bytes]) -> Vocabulary:
    spec = _SPECS[name]
    ranks = _ranks(name, spec.sha256, read)
    # No special tokens are declared, for none is ever wanted: all text is ordinary.
    encoding = tiktoken.Encoding(name, pat_str=spec.pattern, mergeable_ranks=ranks, special_tokens={})
    # The tokenizer has its own copy by now; ours would hold 20 MiB for decoding, which nobody does.
    ranks.clear()
    return Vocabulary(name, spec.tag, encoding.encode_ordinary)


def _ranks(name: str, sha256: str, read: Callable[[str], bytes]) -> dict[bytes, int]:
    file = f"{name}.tiktoken.gz"
    try:
        data = gzip.decompress(read(file))
    except (OSError, EOFError, zlib.error) as error:
        raise VocabularyError(f"The tokenizer file {file} cannot be read. Reinstall the package.") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise VocabularyError(
            f"The tokenizer file {file} is damaged: sha256 {found}, expected {sha256}. Reinstall the package."
        )
    # The sum vouches for the content: base64, blank, rank; one line per token, in the order of the ranks from 0.
    ranks = {}
    for rank, line in enumerate(io.BytesIO(data)):
        ranks[a2b_base64(line[: line.index(b" ")])] = rank
    return ranks


SHARED: Final = Vocabularies()
"""The process's own. Vocabularies are large and never change, so one copy serves everybody."""
