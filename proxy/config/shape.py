"""What the settings models expect, as plain values: the models are the only description of the configuration.

Reading a file, naming environment variables, listing origins and writing the example all walk these shapes.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from proxy.settings import Made

LeafType = Literal["text", "secret", "integer", "number", "amount", "boolean", "path", "made path"]

_LEAVES: dict[object, LeafType] = {
    str: "text",
    SecretStr: "secret",
    int: "integer",
    float: "number",
    Decimal: "amount",
    bool: "boolean",
    Path: "path",
}


@dataclass(frozen=True, slots=True)
class Leaf:
    """A single value."""

    type: LeafType
    nullable: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ListOf:
    item: Shape
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class MapOf:
    """Entries under names that the user chooses."""

    item: Shape


@dataclass(frozen=True, slots=True)
class Record:
    """Entries under the fields of a model."""

    model: type[BaseModel]
    fields: dict[str, Shape]


@dataclass(frozen=True, slots=True)
class Variants:
    """One of several records: the entry `by` says which."""

    by: str
    options: dict[str, Record]


@dataclass(frozen=True, slots=True)
class WordOr:
    """A record, or one of a few words in its place."""

    words: tuple[str, ...]
    record: Record
    nullable: bool


@dataclass(frozen=True, slots=True)
class OneOrList:
    """A single value, or a list of such values in its place."""

    item: Leaf


Shape = Leaf | ListOf | MapOf | OneOrList | Record | Variants | WordOr
"""What may stand in one place of the file."""

TAGS: Final = ("one", "list")
"""How a model tells the two forms of a `OneOrList` apart. They show in the paths of pydantic's errors only."""


def one_or_list(value: object) -> str:
    """The tag of a value's form."""
    return TAGS[1] if isinstance(value, tuple) else TAGS[0]


@cache
def record(model: type[BaseModel]) -> Record:
    """The shape of a settings model. Raises TypeError for a field of a type that a configuration cannot hold."""
    return Record(model, {name: _field(field) for name, field in model.model_fields.items()})


def _field(field: FieldInfo) -> Shape:
    if any(isinstance(one, Made) for one in field.metadata):
        return Leaf("made path")
    return _shape(field.annotation, field.discriminator)


def _shape(annotation: Any, discriminator: object = None) -> Shape:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        found = [item.discriminator for item in arguments[1:] if isinstance(item, FieldInfo) and item.discriminator]
        return _shape(arguments[0], found[0] if found else discriminator)
    if origin in (Union, types.UnionType):
        return _union(arguments, discriminator)
    if origin is tuple:
        return ListOf(_shape(arguments[0]))
    if origin is dict:
        return MapOf(_shape(arguments[1]))
    if origin is Literal:
        return Leaf("text", choices=arguments)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return record(annotation)
    if annotation in _LEAVES:
        return Leaf(_LEAVES[annotation])
    raise TypeError(f"a configuration cannot hold {annotation}")


def _union(arguments: tuple[Any, ...], discriminator: object) -> Shape:
    members = [argument for argument in arguments if argument is not type(None)]
    if len(members) == 1:
        inner = _shape(members[0])
        if isinstance(inner, Leaf):
            return Leaf(inner.type, nullable=True, choices=inner.choices)
        if isinstance(inner, ListOf):
            return ListOf(inner.item, nullable=True)
        if isinstance(inner, Record):
            return inner  # An empty section and none at all are the same where nothing was written.
    words = [argument for argument in members if get_origin(argument) is Literal]
    if len(members) == 2 and len(words) == 1:
        (model,) = (argument for argument in members if argument not in words)
        return WordOr(get_args(words[0]), record(model), nullable=len(members) < len(arguments))
    if isinstance(discriminator, str) and len(members) == len(arguments):
        options: dict[str, Record] = {}
        for member in members:
            options |= dict.fromkeys(get_args(member.model_fields[discriminator].annotation), record(member))
        return Variants(discriminator, options)
    shapes = [_shape(argument) for argument in members]
    if len(shapes) == 2 and isinstance(shapes[0], Leaf) and shapes[1] == ListOf(shapes[0]):
        return OneOrList(shapes[0])
    raise TypeError(f"a configuration cannot hold a union of {arguments}")
