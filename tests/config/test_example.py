"""`config.example.yaml` shows every key, runs as it stands, and so does every line in it that is commented out.

A commented-out alternative is a run of lines that begin with `#` and no space, at one indentation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from proxy.config.advice import FORGETS
from proxy.config.interpolate import interpolate
from proxy.config.loader import Loaded, load
from proxy.config.settings import Settings
from proxy.config.shape import Leaf, ListOf, MapOf, Record, Shape, Variants, WordOr, record
from proxy.config.tree import Items, Node, Scalar, Table
from proxy.config.yaml import read
from proxy.edge.settings import ListenSettings
from proxy.observability.settings import ObservabilitySettings
from proxy.providers.settings import OpenAISettings

EXAMPLE = Path(__file__).resolve().parents[2] / "config.example.yaml"
LINES = EXAMPLE.read_text().splitlines()
STARTS = re.compile(r" *#[^ #]")
FILES = ("secrets/openai.key", "secrets/state.url", "certificates/ca.pem", "replies/faults.yaml")
AUTHORITY = trustme.CA()
VARIABLES = {"OPENAI_API_KEY": "sk-example", "OPENAI_API_KEY_2": "sk-another", "OUTSIDE_API_KEY": "sk-outside"} | {
    name: f"{name}-at-least-16-characters".lower().replace("_", "-")
    for name in ("BREAKWATER_ADMIN_KEY", "ACME_KEY", "REDIS_PASSWORD")
}


def alternatives() -> Iterator[tuple[int, int]]:
    """First and last line of each, counted from 0."""
    start: int | None = None
    for number, line in enumerate([*LINES, ""]):
        inside = start is not None and re.match(r" *#  +\S", line)
        if start is not None and not inside:
            yield start, number - 1
            start = None
        if start is None and STARTS.match(line):
            start = number


ALTERNATIVES = list(alternatives())


def uncommented(first: int, last: int) -> str:
    """The example with one alternative in use, instead of an active line or an earlier form of the same key."""
    lines = list(LINES)
    lines[first : last + 1] = [line.replace("#", "", 1) for line in lines[first : last + 1]]
    if re.match(r" *#api_key", LINES[first]):
        lines = [line for line in lines if not line.startswith("    api_key: ${")]
    if LINES[first].startswith("#state:"):
        lines = [line for line in lines if not line.startswith("state: memory")]
    return "\n".join(lines)


def loaded(text: str, directory: Path) -> Loaded:
    for name in FILES:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("redis://:from-a-file@localhost" if name.endswith("url") else "sk-from-a-file")
    AUTHORITY.cert_pem.write_to_path(str(directory / "certificates/ca.pem"))
    file = directory / "config.yaml"
    file.write_text(text)
    return load(file, VARIABLES)


def test_it_is_valid_without_any_variable_and_points_at_the_mock() -> None:
    result = load(EXAMPLE, {})
    provider = result.settings.providers["openai"]
    assert isinstance(provider, OpenAISettings)
    assert provider.base_url == "http://127.0.0.1:8089/v1"
    assert [key.get_secret_value() for key in provider.credentials] == ["sk-anything-works-with-the-mock"]
    assert result.warnings == ()


def test_what_is_not_commented_is_the_default() -> None:
    settings = load(EXAMPLE, {}).settings
    provider = settings.providers["openai"]
    assert settings.listen == ListenSettings()
    assert settings.observability == ObservabilitySettings()
    assert settings.models == Settings(providers=settings.providers).models
    default = OpenAISettings(kind="openai")
    given = {name for name in OpenAISettings.model_fields if getattr(provider, name) != getattr(default, name)}
    assert given == {"base_url", "api_key"}


def test_there_are_alternatives() -> None:
    keys = {LINES[first].strip().lstrip("#").split(":")[0] for first, _ in ALTERNATIVES}
    one = {"api_key", "api_keys", "organization", "project", "outside", "mock", "models", "- name"}
    assert keys == {"state", "admin", "tenants", "budget", "ledger"} | one


@pytest.mark.parametrize(("first", "last"), ALTERNATIVES, ids=lambda line: f"line-{line + 1}")
def test_every_alternative_is_valid(first: int, last: int, tmp_path: Path) -> None:
    plain = loaded("\n".join(LINES), tmp_path)
    other = loaded(uncommented(first, last), tmp_path)
    assert other.settings != plain.settings
    assert {one.message for one in other.warnings} <= {FORGETS}  # until the alternative `ledger` is taken too


def test_every_key_of_the_models_appears() -> None:
    shown = set(keys_of("\n".join(LINES)))
    for first, last in ALTERNATIVES:
        shown |= set(keys_of(uncommented(first, last)))
    assert shown == set(expected(record(Settings), ()))


def test_every_line_of_the_models_has_a_comment() -> None:
    active = [line for line in LINES if re.match(r" *(- )?[a-z_]+:", line)]
    without = [line for line in active if "  #" not in line and not re.match(r" +openai:$", line)]
    assert len(active) > 30
    assert without == []


def test_the_sections_stand_in_the_order_of_the_models() -> None:
    sections = [found[1] for line in LINES if (found := re.match(r"#?([a-z_]+):", line))]
    assert list(dict.fromkeys(sections)) == list(Settings.model_fields)


def expected(shape: Shape, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every key; for a provider's with its kind, for a name that the user chooses with a star."""
    if isinstance(shape, Record):
        for name, field in shape.fields.items():
            yield (*path, name)
            yield from expected(field, (*path, name))
    elif isinstance(shape, MapOf | ListOf):
        yield from expected(shape.item, (*path, "*"))
    elif isinstance(shape, WordOr):
        yield from expected(shape.record, path)
    elif isinstance(shape, Variants):
        for kind, option in shape.options.items():
            yield from expected(option, (*path[:-1], kind))


def keys_of(text: str) -> Iterator[tuple[str, ...]]:
    tree, problems = read(text, "example")
    assert not problems
    return found(tree, record(Settings), ())


def found(node: Node, shape: Shape, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(shape, WordOr):
        shape = shape.record
    if isinstance(shape, Variants):
        assert isinstance(node, Table)
        kind = node.nodes[shape.by]
        assert isinstance(kind, Scalar)
        chosen = interpolate(kind.text, {})
        yield from found(node, shape.options[chosen], (*path[:-1], chosen))
    elif isinstance(shape, Record) and isinstance(node, Table):
        for name, child in node.nodes.items():
            yield (*path, name)
            yield from found(child, shape.fields[name], (*path, name))
    elif isinstance(shape, MapOf) and isinstance(node, Table):
        for child in node.nodes.values():
            yield from found(child, shape.item, (*path, "*"))
    elif isinstance(shape, ListOf) and isinstance(node, Items):
        for child in node.nodes:
            if not isinstance(shape.item, Leaf):
                yield from found(child, shape.item, (*path, "*"))
