"""Values made from JSON Schemas, judged by pydantic models: the schema and the judge come from the same class."""

from __future__ import annotations

import enum
import time
from datetime import date, datetime
from random import Random
from typing import Annotated, Any, Literal, Optional, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mock_wire import CALM
from pydantic import BaseModel, Field, TypeAdapter

from proxy.providers.mock.schema import example


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    x: float
    y: Annotated[float, Field(gt=0, lt=0.001)]


class Tree(BaseModel):
    name: Annotated[str, Field(min_length=30, max_length=31)]
    children: list[Tree]
    parent: Optional[Tree] = None  # noqa: UP045


class Everything(BaseModel):
    colour: Colour
    kind: Literal["only"]
    points: Annotated[list[Point], Field(min_length=3, max_length=4)]
    pair: tuple[int, str]
    table: dict[str, int]
    size: Annotated[int, Field(ge=10, le=12)]
    above: Annotated[int, Field(gt=10, lt=12)]
    step: Annotated[int, Field(multiple_of=7, ge=50)]
    below: Annotated[int, Field(le=-5)]
    day: date
    moment: datetime
    choice: Union[int, Point]  # noqa: UP007
    maybe: Optional[str]  # noqa: UP045
    flag: bool
    tree: Tree


@pytest.mark.parametrize("seed", range(10))
def test_a_made_value_satisfies_its_schema(seed: int) -> None:
    made = example(Everything.model_json_schema(), Random(seed))
    Everything.model_validate(made)


@pytest.mark.parametrize("kind", [int, str, list[int], dict[str, str], bool | None, Point | None])
def test_so_does_one_of_a_bare_type(kind: Any) -> None:
    adapter = TypeAdapter(kind)
    adapter.validate_python(example(adapter.json_schema(), Random(1)))


def test_all_of_is_united() -> None:
    schema = {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"$ref": "#/$defs/b"},
        ],
        "$defs": {"b": {"properties": {"b": {"const": 5}}, "required": ["b"]}},
    }
    made = example(schema, Random(0))
    assert isinstance(made["a"], int)
    assert made["b"] == 5


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "https://example.com/schema"},
        {"type": "object", "properties": {c: {"$ref": "#"} for c in "abcdefghij"}, "required": list("abcdefghij")},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 50},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"allOf": [{"$ref": "#"}]},
        {"type": "array", "minItems": 10**9, "items": {}},
        {"type": "string", "minLength": 10**12},
        {"type": "number", "minimum": 1, "maximum": 0},
    ],
)
def test_a_schema_without_a_sensible_value_comes_to_an_end(schema: Any) -> None:
    before = time.process_time()
    example(schema, Random(0))
    assert time.process_time() - before < 5


KEYS = ("type", "properties", "required", "items", "enum", "anyOf", "allOf", "$ref", "minimum", "maximum", "minItems",
        "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "maxLength", "prefixItems", "format")  # fmt: skip
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from(["object", "array", "number", "#", "#/x", "integer"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@CALM
@given(ODD)
def test_what_is_no_schema_is_survived(schema: Any) -> None:
    example(schema, Random(0))
