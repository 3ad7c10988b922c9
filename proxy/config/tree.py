"""A configuration as written: text with its places, before anything is known of what it should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from proxy.config.problems import Place

Style = Literal["plain", "quoted", "raw"]
"""plain: unquoted in a file, its type follows from its looks. quoted: text.

raw: from a variable or a flag, where quotes have no meaning: it is read as whatever its key expects.
"""


@dataclass(slots=True)
class Scalar:
    text: str
    style: Style
    place: Place


@dataclass(slots=True)
class Items:
    nodes: list[Node]
    place: Place


@dataclass(slots=True)
class Table:
    nodes: dict[str, Node]
    place: Place
    keys: dict[str, Place] = field(default_factory=dict)
    """Where each key was written."""


@dataclass(slots=True)
class Broken:
    """Holds the place of a value whose fault is reported already."""

    place: Place


Node = Scalar | Items | Table | Broken


def native(value: object, place: Place) -> Node:
    """A Python value (None, bool, number, text, path, mapping, sequence) as a tree, every leaf at `place`."""
    if isinstance(value, Mapping):
        nodes = {str(key): native(item, place) for key, item in value.items()}
        return Table(nodes, place, dict.fromkeys(nodes, place))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return Items([native(item, place) for item in value], place)
    if value is None:
        return Scalar("null", "raw", place)
    if isinstance(value, bool):
        return Scalar("true" if value else "false", "raw", place)
    return Scalar(str(value), "raw", place)
