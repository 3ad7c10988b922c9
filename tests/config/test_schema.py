"""The JSON Schema says what the loader does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.config.schema import json_schema
from proxy.config.settings import Settings
from proxy.config.shape import Leaf, ListOf, MapOf, OneOrList, Record, Shape, Variants, WordOr, record
from proxy.settings import Section

SCHEMA = json_schema()


def test_it_is_closed_and_needs_providers() -> None:
    assert SCHEMA["additionalProperties"] is False
    assert SCHEMA["required"] == ["providers"]
    assert list(SCHEMA["properties"]) == list(Settings.model_fields)
    assert all(model["additionalProperties"] is False for model in SCHEMA["$defs"].values())


def properties(node: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, model in {"Settings": node, **node["$defs"]}.items():
        for key, value in model["properties"].items():
            section = value.get("anyOf", [{}])[0].get("$ref", "").rpartition("/")[2]
            yield f"{name}.{key}", node["$defs"].get(section, {}) | value


def test_every_key_is_documented() -> None:
    undocumented = [name for name, value in properties(SCHEMA) if len(value.get("description", "")) < 4]
    assert undocumented == []
    assert len(list(properties(SCHEMA))) > 40


def test_every_time_limit_names_its_unit() -> None:
    names = dict(properties(SCHEMA))
    limits = [value["description"] for name, value in names.items() if name.endswith("_ms")]
    assert len(limits) > 8
    assert all("illisecond" in text for text in limits)
    assert "in bytes" in names["ListenSettings.max_body_bytes"]["description"]


@pytest.mark.parametrize("name", ["ListenSettings.port", "ObservabilitySettings.scrub_secrets", "MockSettings.seed"])
def test_a_variable_may_stand_for_a_number_and_a_switch(name: str) -> None:
    choices = dict(properties(SCHEMA))[name]["anyOf"]
    (pattern,) = [choice["pattern"] for choice in choices if choice.get("type") == "string"]
    assert re.search(pattern, "${PORT:-1}")
    assert not re.search(pattern, "eighty")


def test_every_secret_may_come_from_a_file() -> None:
    def secrets(shape: Shape) -> int:
        if isinstance(shape, Leaf):
            return shape.type == "secret"
        if isinstance(shape, ListOf | MapOf | OneOrList):
            return secrets(shape.item)
        if isinstance(shape, WordOr):
            return secrets(shape.record)
        inner = shape.options if isinstance(shape, Variants) else shape.fields
        return sum(secrets(item) for item in inner.values())

    def files(node: Any) -> int:
        if isinstance(node, dict):
            secret = node.get("required") == ["file"] and set(node["properties"]) == {"file"}
            return secret + sum(files(value) for value in node.values())
        return sum(files(value) for value in node) if isinstance(node, list) else 0

    assert files(SCHEMA) == secrets(record(Settings)) == 6


def test_no_title_repeats_a_key() -> None:
    assert all("title" not in value for _, value in properties(SCHEMA))
    assert "title" not in SCHEMA["properties"]


def test_a_field_of_another_type_is_refused() -> None:
    class Odd(Section):
        value: complex

    class Two(Section):
        value: int | str

    for model in (Odd, Two):
        with pytest.raises(TypeError, match="a configuration cannot hold"):
            record(model)


def test_shapes_of_the_models() -> None:
    shape = record(Settings)
    listen, providers = shape.fields["listen"], shape.fields["providers"]
    assert isinstance(listen, Record)
    assert listen.fields["admin_port"] == Leaf("integer", nullable=True)
    assert isinstance(providers, MapOf)
    assert isinstance(providers.item, Variants)
    assert list(providers.item.options) == ["openai", "mock"]
    assert providers.item.options["openai"].fields["transport"] == Leaf("text", choices=("http1", "httpx"))
    assert providers.item.options["mock"].fields["script"] == Leaf("path", nullable=True)
