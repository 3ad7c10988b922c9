"""Settings from the environment: `BREAKWATER_LISTEN__PORT=9000`.

A name is the prefix and the path of a key, upper-case, joined by two underscores; in the names of providers every
character that a variable cannot hold becomes one underscore. A value is a scalar; of a list, items divided by commas,
or a flow list (`["a", "b"]`). A name with two underscores that matches no key is an error; other names are left alone,
for Kubernetes sets such as BREAKWATER_PORT beside a service of that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from proxy.config.problems import Path, Place, Problem, did_you_mean, problem
from proxy.config.shape import Leaf, ListOf, MapOf, Record, Shape, Variants, WordOr
from proxy.config.tree import Items, Node, Scalar, Table
from proxy.config.yaml import read_flow

PREFIX = "BREAKWATER_"


def apply(env: Mapping[str, str], tree: Table, shape: Record) -> list[Problem]:
    """Writes the settings of `env` over those of `tree`. Returns what is wrong with their names and values."""
    names = [name for name in env if name.startswith(PREFIX)]
    if not names:
        return []
    known: dict[str, list[tuple[Path, Shape]]] = {}
    for words, path, at in _keys(shape, tree, (), ()):
        known.setdefault(PREFIX + "__".join(words).upper(), []).append((path, at))
    wrong: list[Problem] = []
    for name in sorted(names):
        place = Place(f"environment {name}")
        found = known.get(name.upper(), [])
        if "__" not in name and not (found and isinstance(found[0][1], Leaf)):
            continue
        if len(found) != 1:
            wrong.append(_unmatched(name, found, known, place))
            continue
        path, at = found[0]
        node = _node(env[name], at, place)
        if isinstance(node, str):
            wrong.append(problem(place, path, node))
        else:
            _put(tree, path, node)
    return wrong


def _unmatched(
    name: str, found: list[tuple[Path, Shape]], known: Mapping[str, list[tuple[Path, Shape]]], place: Place
) -> Problem:
    if found:
        return problem(place, found[0][0], "matches more than one name: set this one in the file")
    keys = [key.removeprefix(PREFIX) for key, places in known.items() if isinstance(places[0][1], Leaf | ListOf)]
    hint = did_you_mean(name.removeprefix(PREFIX), keys)
    hint = hint.replace("'", f"'{PREFIX}", 1) if "?" in hint else "see breakwater config schema"
    return problem(place, (), f"matches no key: {hint}")


def _keys(
    shape: Shape, node: Node | None, words: tuple[str, ...], path: Path
) -> Iterator[tuple[tuple[str, ...], Path, Shape]]:
    """Every key that a variable can name, sections included: the words of its name, its path and its shape."""
    if words:
        yield words, path, shape
    inner = node.nodes if isinstance(node, Table) else {}
    if isinstance(shape, Record):
        for name, field in shape.fields.items():
            yield from _keys(field, inner.get(name), (*words, name), (*path, name))
    elif isinstance(shape, WordOr):
        inside = _keys(shape.record, node, words, path)
        yield from (found for found in inside if found[1] != path)
    elif isinstance(shape, Variants):
        fields: dict[str, Shape] = {}
        for option in shape.options.values():
            fields = option.fields | fields
        for name, field in fields.items():
            yield from _keys(field, inner.get(name), (*words, name), (*path, name))
    elif isinstance(shape, MapOf):
        for name, child in inner.items():
            yield from _keys(shape.item, child, (*words, re.sub(r"[^A-Za-z0-9]", "_", name)), (*path, name))
    elif isinstance(shape, Leaf) and shape.type == "secret":
        yield (*words, "file"), (*path, "file"), Leaf("path")


def _node(text: str, shape: Shape, place: Place) -> Node | str:
    """The value as a tree, or what is wrong with it."""
    if isinstance(shape, Leaf | WordOr):
        return Scalar(text, "raw", place)
    if not isinstance(shape, ListOf):
        return "names a section, not a value: add two underscores and one of its keys"
    if text.lstrip().startswith("["):
        node = read_flow(text, place.source)
        return node if isinstance(node, Items) else 'expected items divided by commas, or a list such as ["a", "b"]'
    if not text.strip() or text.strip() == "null":
        return Scalar("null", "raw", place)
    return Items([Scalar(item.strip(), "raw", place) for item in text.split(",")], place)


def _put(tree: Table, path: Path, node: Node) -> None:
    at = tree
    for step in path[:-1]:
        name = str(step)
        child = at.nodes.get(name)
        if not isinstance(child, Table):
            child = at.nodes[name] = Table({}, node.place)
            at.keys[name] = node.place
        at = child
    last = str(path[-1])
    at.nodes[last] = node
    at.keys[last] = node.place
