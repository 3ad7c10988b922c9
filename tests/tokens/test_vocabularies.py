"""The vocabularies: right, checked, loaded once, and never from the network."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import proxy
from proxy.tokens.encodings import encoding_of
from proxy.tokens.vocabularies import ENCODINGS, SHARED, Vocabularies, Vocabulary, VocabularyError, packed


@pytest.mark.parametrize(
    ("encoding", "text", "ids"),
    [
        ("o200k_base", "hello world", [24912, 2375]),
        ("o200k_harmony", "hello world", [24912, 2375]),
        ("cl100k_base", "hello world", [15339, 1917]),
        ("cl100k_base", "<|endoftext|>", [27, 91, 8862, 728, 428, 91, 29]),
    ],
)
def test_known_ids(encoding: str, text: str, ids: list[int]) -> None:
    assert SHARED.load(encoding).ids(text) == ids


def test_the_notice_states_the_files_as_they_are() -> None:
    notice = packed("NOTICE").decode()
    for name in ("o200k_base", "cl100k_base"):
        data = gzip.decompress(packed(f"{name}.tiktoken.gz"))
        (line,) = [line.split() for line in notice.splitlines() if f"{name}.tiktoken.gz" in line]
        assert line[1:] == [str(len(data)), hashlib.sha256(data).hexdigest()]
        ranks = [int(entry.rpartition(b" ")[2]) for entry in data.splitlines()]
        assert ranks == list(range(len(ranks)))  # what the loader takes for granted


@pytest.mark.parametrize("damage", ["flipped", "short", "no gzip", "missing", "other file"])
def test_a_damaged_file_is_told_by_name(damage: str) -> None:
    def read(file: str) -> bytes:
        good = packed(file)
        if damage == "missing":
            raise FileNotFoundError(2, "gone", f"/somewhere/{file}")
        if damage == "flipped":
            return gzip.compress(gzip.decompress(good).replace(b" 77777\n", b" 77778\n"), 1)
        if damage == "other file":
            return packed("cl100k_base.tiktoken.gz")
        return good[: len(good) // 2] if damage == "short" else b"not gzip at all"

    broken = Vocabularies(read)
    with pytest.raises(VocabularyError, match=r"o200k_base\.tiktoken\.gz .*Reinstall") as sync:
        broken.load("o200k_base")
    assert "somewhere" not in str(sync.value)
    with pytest.raises(VocabularyError):
        asyncio.run(broken.get("o200k_base"))


def test_a_failed_load_is_tried_again() -> None:
    contents = [b"damaged", packed("cl100k_base.tiktoken.gz")]
    vocabularies = Vocabularies(lambda file: contents.pop(0))
    with pytest.raises(VocabularyError):
        vocabularies.load("cl100k_base")
    assert vocabularies.load("cl100k_base").ids("hello world") == [15339, 1917]


def test_one_load_serves_all_who_wait_and_survives_those_who_leave() -> None:
    reading, go = threading.Event(), threading.Event()
    reads: list[str] = []

    def read(file: str) -> bytes:
        reads.append(threading.current_thread().name)
        reading.set()
        assert go.wait(30)
        return packed(file)

    async def scenario() -> None:
        vocabularies = Vocabularies(read)
        first, second, third = (asyncio.create_task(vocabularies.get("cl100k_base")) for _ in range(3))
        while not reading.is_set():  # the loop turns while the thread is at work
            await asyncio.sleep(0.001)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        go.set()
        assert await second is await third
        assert vocabularies.load("cl100k_base") is await second
        assert await vocabularies.get("cl100k_base") is await second

    asyncio.run(scenario())
    assert reads == ["load-cl100k_base"]


def test_threads_that_ask_at_once_share_a_load() -> None:
    reads: list[str] = []

    def read(file: str) -> bytes:
        reads.append(file)
        return packed(file)

    vocabularies = Vocabularies(read)
    found: list[Vocabulary] = []
    threads = [threading.Thread(target=lambda: found.append(vocabularies.load("cl100k_base"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert len({id(vocabulary) for vocabulary in found}) == 1
    assert len(found) == 4


def test_an_unknown_encoding_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        SHARED.load("p50k_base")


def test_a_panic_is_survived_and_counted_as_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    vocabulary = SHARED.load("o200k_base")
    with pytest.raises(BaseException, match="StackOverflow") as panic:
        vocabulary.ids(" " * 1_100_000)
    assert not isinstance(panic.value, Exception)  # the trap: `except Exception` lets it through
    assert vocabulary.count(" " * 1_100_000) == 1_100_000
    assert "panicked" in capfd.readouterr().err
    assert vocabulary.count("hello world") == 2  # and the tokenizer goes on working


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError, MemoryError, ValueError])
def test_only_a_panic_is_survived(error: type[BaseException]) -> None:
    def encode(text: str) -> list[int]:
        raise error

    with pytest.raises(error):
        Vocabulary("test", b"t", encode).count("text")


def test_nothing_is_fetched_and_nothing_is_written(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys

        def forbid(event, arguments):
            if event.startswith("socket.") or (event == "open" and "w" in str(arguments[1])):
                raise SystemExit(f"{event} {arguments}")

        sys.addaudithook(forbid)
        from proxy.tokens.vocabularies import ENCODINGS, SHARED

        assert not any(name.startswith("requests") for name in sys.modules)
        for encoding in sorted(ENCODINGS):
            print(encoding, SHARED.load(encoding).count("hello world"))
    """)
    cache = tmp_path / "cache"
    home = tmp_path / "home"
    cache.mkdir()
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-B", "-c", program],
        cwd=Path(proxy.__file__).parents[1],
        env={"HOME": str(home), "TIKTOKEN_CACHE_DIR": str(cache), "DATA_GYM_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["cl100k_base", "2", "o200k_base", "2", "o200k_harmony", "2"]
    assert not list(cache.iterdir())
    assert not list(home.iterdir())


def test_import_loads_no_vocabulary_and_loading_costs_what_it_says() -> None:
    program = textwrap.dedent("""
        from pathlib import Path

        def resident():
            (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
            return int(line.split()[1]) / 1024

        from proxy.tokens.count import Counter
        from proxy.tokens.vocabularies import SHARED

        Counter()
        before = resident()
        SHARED.load("o200k_base")
        print(before, resident())
    """)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(proxy.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    before, after = map(float, done.stdout.split())
    assert before < 60
    assert 20 < after - before < 90  # MiB


@pytest.mark.parametrize(
    ("model", "encoding"),
    [
        ("gpt-4o", "o200k_base"),
        ("gpt-4o-mini-2024-07-18", "o200k_base"),
        ("chatgpt-4o-latest", "o200k_base"),
        ("gpt-4.1-nano", "o200k_base"),
        ("gpt-4.5-preview", "o200k_base"),
        ("gpt-5.6", "o200k_base"),
        ("gpt-6", "o200k_base"),
        ("o1", "o200k_base"),
        ("o3-mini", "o200k_base"),
        ("o4-mini", "o200k_base"),
        ("computer-use-preview", "o200k_base"),
        ("gpt-oss-120b", "o200k_harmony"),
        ("openai/gpt-oss-20b", "o200k_harmony"),
        ("gpt-4", "cl100k_base"),
        ("GPT-4", "cl100k_base"),
        ("gpt-4-turbo", "cl100k_base"),
        ("gpt-4-32k-0314", "cl100k_base"),
        ("gpt-3.5-turbo-0125", "cl100k_base"),
        ("gpt-35-turbo-16k", "cl100k_base"),
        ("text-embedding-ada-002", "cl100k_base"),
        ("text-embedding-3-large", "cl100k_base"),
        ("openai/gpt-4o", "o200k_base"),
        ("azure/openai/gpt-4", "cl100k_base"),
        ("ft:gpt-4o:acme::abc", "o200k_base"),
        ("ft:gpt-3.5-turbo:acme::abc", "cl100k_base"),
        ("claude-sonnet-5", "o200k_base"),
        ("", "o200k_base"),
        ("/", "o200k_base"),
        ("x" * 1_000_000, "o200k_base"),
    ],
)
def test_encoding_of_a_model(model: str, encoding: str) -> None:
    assert encoding_of(model) == encoding
    assert encoding in ENCODINGS
