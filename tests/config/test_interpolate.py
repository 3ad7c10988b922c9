from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.interpolate import Uninterpolable, interpolate

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
NO_DOLLAR = st.text().filter(lambda text: "$" not in text)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("", ""),
        ("plain", "plain"),
        ("${A}", "a"),
        ("x${A}y${B}z", "xaybz"),
        ("${EMPTY:-d}", "d"),
        ("${NONE:-}", ""),
        ("${NONE:-a:-b}", "a:-b"),
        ("${NONE:-$$5}", "$5"),
        ("${A:-d}", "a"),
        ("${A:?needed}", "a"),
        ("$$", "$"),
        ("$$$$", "$$"),
        ("$${A}", "${A}"),
        ("$$${A}", "$a"),
        ("pa$word", "pa$word"),
        ("$A", "$A"),
        ("end$", "end$"),
        ("${REF}", "${A}"),
    ],
)
def test_values(text: str, result: str) -> None:
    assert interpolate(text, {"A": "a", "B": "b", "EMPTY": "", "REF": "${A}"}) == result


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${NONE}", "variable NONE is not set, or empty: set it, or write ${NONE:-default}"),
        ("${EMPTY}", "variable EMPTY is not set, or empty: set it, or write ${EMPTY:-default}"),
        ("${EMPTY:?ask the operator}", "variable EMPTY is not set, or empty: ask the operator"),
        ("${NONE:?}", "variable NONE is not set, or empty: it is required"),
        ("${A:-${B}}", "variable A: a variable within a default or a message is not supported"),
    ],
)
def test_variables_that_cannot_be_replaced(text: str, message: str) -> None:
    with pytest.raises(Uninterpolable) as caught:
        interpolate(text, {"A": "a", "EMPTY": ""})
    assert caught.value.messages[0] == message


@pytest.mark.parametrize("text", ["${", "${A", "${}", "${1A}", "${A-b}", "${A:b}", "${A B}", "${A:=b}", "${ A}"])
def test_malformed_variables_are_errors(text: str) -> None:
    with pytest.raises(Uninterpolable, match=r"expected \$\{NAME\}"):
        interpolate(text, {"A": "a"})


def test_every_error_of_a_text_at_once() -> None:
    with pytest.raises(Uninterpolable) as caught:
        interpolate("${X} ${Y:?why} ${", {})
    assert len(caught.value.messages) == 3


@given(NO_DOLLAR)
def test_text_without_dollar_stays(text: str) -> None:
    assert interpolate(text, {}) == text


@given(st.text())
def test_any_text_can_be_written_with_doubled_dollars(text: str) -> None:
    assert interpolate(text.replace("$", "$$"), {}) == text


@given(NAMES, st.text(min_size=1), NO_DOLLAR, NO_DOLLAR)
def test_a_value_goes_in_as_it_is_and_is_not_looked_at_again(name: str, value: str, before: str, after: str) -> None:
    for form in (f"${{{name}}}", f"${{{name}:-other}}", f"${{{name}:?other}}"):
        assert interpolate(before + form + after, {name: value}) == before + value + after


@given(st.text(alphabet="${}A:-? x"), st.dictionaries(st.just("A"), st.text(max_size=3)))
def test_any_text_gives_text_or_messages(text: str, env: dict[str, str]) -> None:
    try:
        outcome = interpolate(text, env)
    except Uninterpolable as error:
        outcome = error.messages[0]
    assert isinstance(outcome, str)
