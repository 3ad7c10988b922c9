"""Slices and tallies: nothing lost, nothing gained beyond the stated error, and an end to every flood."""

from __future__ import annotations

import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.tokens.slices import CUT_ERROR, EXACT_CHARS, SAMPLE_SLICES, SLICE_CHARS, Abandoned, Tally, slices
from proxy.tokens.vocabularies import SHARED, Vocabulary

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

PLAIN = ["a", "word", " word", "Word", "'s", " ", "  ", "\n", "\r\n", "\t", "1", "12345", ".", "//", '":{', "_x", "ABC"]
ODD = ["é", "漢字", "\u200b", "e\u0301", "😀", "👩\u200d🚀", "\u05d0\u05d1", "<|endoftext|>", "\xa0", "-" * 9, "=" * 40]
PIECES = st.sampled_from([*PLAIN, *ODD])
TEXTS = st.lists(PIECES, max_size=200).map("".join) | st.text(max_size=200)
ENCODINGS = ("o200k_base", "cl100k_base")


@settings(RELAXED)
@given(text=TEXTS, size=st.integers(4, 64))
def test_slices_are_the_text(text: str, size: int) -> None:
    parts = list(slices(text, size))
    assert "".join(parts) == text
    assert all(0 < len(part) <= size for part in parts)


@settings(RELAXED)
@given(text=TEXTS, size=st.integers(8, 64))
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_slices_count_as_the_whole_within_the_stated_error(encoding: str, text: str, size: int) -> None:
    vocabulary = SHARED.load(encoding)
    parts = list(slices(text, size))
    whole = vocabulary.count(text)
    assert abs(sum(map(vocabulary.count, parts)) - whole) <= CUT_ERROR * max(len(parts) - 1, 0)


@settings(RELAXED)
@given(words=st.lists(st.from_regex(r"[A-Za-z0-9é漢.,:;'\-]{1,12}[ \n]", fullmatch=True), max_size=120))
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_words_and_lines_are_cut_without_any_error(encoding: str, words: list[str]) -> None:
    vocabulary = SHARED.load(encoding)
    text = "".join(words)
    assert sum(map(vocabulary.count, slices(text, 32))) == vocabulary.count(text)


def words_only(text: str) -> list[int]:
    return [0] * len(text.split())


def chars(text: str) -> list[int]:
    assert len(text) <= SLICE_CHARS
    return [0] * len(text)


def test_a_tally_adds_up_and_says_how_often_it_asked() -> None:
    tally = Tally(Vocabulary("chars", b"x", chars))
    assert [tally.add(text) for text in ("", "abc", "b" * SLICE_CHARS, "c" * (SLICE_CHARS + 1))] == [
        0,
        3,
        SLICE_CHARS,
        SLICE_CHARS + 1,
    ]
    assert (tally.calls, tally.guesses) == (4, 0)


def test_a_text_beyond_the_cap_is_sampled_from_end_to_end() -> None:
    tally = Tally(Vocabulary("words", b"x", words_only))
    # The first half is one long word, the second half is words of three letters.
    text = "a" * EXACT_CHARS + " abc" * (EXACT_CHARS // 4)
    expected = EXACT_CHARS // 4
    assert tally.add(text) == pytest.approx(expected, rel=0.1)
    assert tally.calls == SAMPLE_SLICES
    assert tally.guesses == 0  # the same text gives the same answer whatever came before


def test_beyond_the_cap_texts_are_taken_at_the_ratio_so_far() -> None:
    tally = Tally(Vocabulary("words", b"x", words_only))
    text = "abc " * (EXACT_CHARS // 8)
    exact = [tally.add(text), tally.add(text[40_000:])]
    assert exact == [EXACT_CHARS // 8, EXACT_CHARS // 8 - 10_000]
    assert tally.guesses == 0
    calls = tally.calls
    assert tally.add("x" * 100_000) == 25_000
    assert (tally.calls, tally.guesses) == (calls, 1)


def test_a_million_tiny_texts_are_bounded_too() -> None:
    tally = Tally(Vocabulary("chars", b"x", chars))
    assert sum(tally.add("a") for _ in range(100_000)) == 100_000
    assert tally.calls < 40_000


def test_a_tally_stops_between_two_slices() -> None:
    stop = threading.Event()
    asked: list[str] = []

    def encode(text: str) -> list[int]:
        asked.append(text)
        if len(asked) == 3:
            stop.set()
        return []

    with pytest.raises(Abandoned):
        Tally(Vocabulary("stopping", b"x", encode), stop).add("a" * 1_000_000)
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("flood", "size"),
    [
        (" ", 1_100_000),
        ("\t", 1_100_000),
        ("\n", 1_100_000),
        (" \n", 300_000),
        ("a", 300_000),
        ("\u200b", 200_000),
        ("\u0301", 200_000),
        ("\u202e\u05d0", 100_000),
        ("😀", 100_000),
        ("<|endoftext|>", 20_000),
        ("\ud800", 100_000),
    ],
    ids=ascii,
)
def test_floods_get_a_count_and_no_panic(flood: str, size: int, capfd: pytest.CaptureFixture[str]) -> None:
    tally = Tally(SHARED.load("o200k_base"))
    text = flood * size
    assert 0 < tally.add(text) <= len(text) * 4
    assert "panicked" not in capfd.readouterr().err
