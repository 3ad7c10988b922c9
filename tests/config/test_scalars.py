from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.scalars import kind, resolve


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("8080", 8080),
        ("-3", -3),
        ("+3", 3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
    ],
)
def test_core_types(text: str, value: object) -> None:
    resolved = resolve(text)
    assert resolved == value
    assert type(resolved) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *("on", "off", "yes", "No", "y", "tRue"),
        *("12:30", "1:2:3", "2024-01-01", "1_000", "0b1", "0x", "e3"),
        *("=", "<<", "-", "."),
        *("9" * 5000, "1." + "9" * 5000, "1e9999"),
    ],
)
def test_everything_else_is_text(text: str) -> None:
    assert resolve(text) == text


def test_not_a_number() -> None:
    assert math.isnan(resolve(".NaN"))  # type: ignore[arg-type]


@given(st.text())
def test_any_text_resolves(text: str) -> None:
    assert kind(resolve(text)) in ("null", "true or false", "a whole number", "a number", "text")
