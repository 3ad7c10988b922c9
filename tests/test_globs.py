"""The one kind of pattern."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.globs import compiled, matches


@pytest.mark.parametrize(
    ("glob", "text", "matched"),
    [
        ("gpt-4o", "gpt-4o", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o*", "gpt-4o", True),
        ("*", "", True),
        ("org/*", "org/a/b", True),
        ("a*c", "abbc", True),
        ("*a*", "banana", True),
        ("a[b]?", "ab?", False),
        ("a[b]?", "a[b]?", True),
        ("a.c", "abc", False),
        ("*", "two\nlines", True),
    ],
)
def test_only_the_star_is_special(glob: str, text: str, matched: bool) -> None:
    assert matches(glob, text) is matched


def test_the_first_star_says_what_it_stood_for() -> None:
    match = compiled("a-*-*").fullmatch("a-b-c-d")
    assert match is not None
    assert match[1] == "b-c"


@given(st.text(alphabet="ab*[.\n", max_size=8))
def test_a_text_matches_itself_as_a_pattern(text: str) -> None:
    assert matches(text, text)
