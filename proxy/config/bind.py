"""From a tree of text to plain values of the types that the models expect, with every fault and every place.

Here the text becomes typed: variables are replaced, scalars read as their key expects, `{file: PATH}` secrets read,
unknown keys refused. What is wrong becomes a problem and, in the values, BAD, which no model accepts: so the models can
judge the rest, and their complaint about BAD is known to be a repetition.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Final

from proxy.config import scalars
from proxy.config.interpolate import Uninterpolable, interpolate
from proxy.config.problems import NOWHERE, Path, Place, Problem, did_you_mean, problem
from proxy.config.shape import Leaf, LeafType, ListOf, MapOf, OneOrList, Record, Shape, Variants, WordOr
from proxy.config.tree import Broken, Items, Node, Scalar, Table

BAD: Final = object()

MAX_SECRET_BYTES = 65_536

_EXPECTED: dict[LeafType, str] = {
    "text": "text",
    "secret": "a secret: text, ${VAR} in quotes, or {file: PATH}",
    "integer": "a whole number",
    "number": "a number",
    "amount": "an amount in USD, such as 2.50",
    "boolean": "true or false",
    "path": "the path of a file",
    "made path": "the path of a file",
}
_SWITCHES = dict.fromkeys(("on", "yes", "y", "1"), "true") | dict.fromkeys(("off", "no", "n", "0"), "false")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class Binding:
    """One pass over a tree.

    `problems`: what was found. `places`: where each value was written, by path. `bad`: the paths that hold BAD.
    """

    def __init__(self, env: Mapping[str, str], directory: FilePath) -> None:
        self.env = env
        self.directory = directory
        self.problems: list[Problem] = []
        self.places: dict[Path, Place] = {}
        self.keys: dict[Path, Place] = {}
        self.bad: set[Path] = set()

    def place(self, path: Path) -> Place:
        """Where the value at `path` was written, or else the nearest section around it."""
        for length in range(len(path), -1, -1):
            if (found := self.places.get(path[:length])) is not None:
                return found
        return NOWHERE

    def bind(self, node: Node, shape: Shape, path: Path) -> object:
        """The value of `node`: text, bool, int, float, None, FilePath, dict, tuple, or BAD."""
        self.places[path] = node.place
        if isinstance(node, Broken):
            return self._bad(path)
        if isinstance(shape, Leaf):
            return self._leaf(node, shape, path)
        if isinstance(shape, ListOf):
            return self._list(node, shape, path)
        if isinstance(shape, OneOrList):
            if isinstance(node, Items):
                return self._list(node, ListOf(shape.item), path)
            return self._leaf(node, shape.item, path)
        if isinstance(shape, WordOr):
            return self._word_or(node, shape, path)
        if isinstance(node, Scalar) and node.style == "plain" and node.text in scalars.NULLS:
            node = Table({}, node.place)  # a section of which every line is commented out
        if isinstance(node, Scalar) and _switches_off(node, shape):
            return {"mode": "off"}
        if not isinstance(node, Table):
            return self._fault(node.place, path, f"expected a section with keys, got {_what(node)}")
        if isinstance(shape, Record):
            return self._record(node, shape, path)
        if isinstance(shape, MapOf):
            for key in node.nodes:
                self.keys[(*path, key)] = node.keys.get(key, node.place)
            return {key: self.bind(child, shape.item, (*path, key)) for key, child in node.nodes.items()}
        return self._variant(node, shape, path)

    def _record(self, table: Table, shape: Record, path: Path) -> object:
        values: dict[str, object] = {}
        for key, child in table.nodes.items():
            if key in shape.fields:
                values[key] = self.bind(child, shape.fields[key], (*path, key))
            else:
                message = f"unknown key: {did_you_mean(key, shape.fields)}"
                self.problems.append(problem(table.keys.get(key, child.place), (*path, key), message))
        return values

    def _word_or(self, node: Node, shape: WordOr, path: Path) -> object:
        if not isinstance(node, Scalar):
            return self.bind(node, shape.record, path)
        word = self._leaf(node, Leaf("text", nullable=shape.nullable), path)
        if word is None or word is BAD or word in shape.words:
            return word
        return self._fault(node.place, path, f"expected a section with keys, or {' or '.join(shape.words)}")

    def _variant(self, table: Table, shape: Variants, path: Path) -> object:
        at = (*path, shape.by)
        if shape.by not in table.nodes:
            options = " or ".join(f"'{shape.by}: {option}'" for option in shape.options)
            self._fault(table.place, at, f"is missing: add {options}")
            return self._bad(path)
        choice = self.bind(table.nodes[shape.by], Leaf("text", choices=tuple(shape.options)), at)
        if not isinstance(choice, str):
            return self._bad(path)
        rest = Table({key: node for key, node in table.nodes.items() if key != shape.by}, table.place, table.keys)
        values = self._record(rest, shape.options[choice], path)
        assert isinstance(values, dict)
        return {shape.by: choice, **values}

    def _list(self, node: Node, shape: ListOf, path: Path) -> object:
        if isinstance(node, Items):
            return tuple(self.bind(child, shape.item, (*path, index)) for index, child in enumerate(node.nodes))
        if isinstance(node, Scalar) and node.style != "quoted" and node.text in scalars.NULLS:
            return None if shape.nullable else ()
        return self._fault(node.place, path, f'expected a list, such as ["..."], got {_what(node)}')

    def _leaf(self, node: Node, shape: Leaf, path: Path) -> object:
        if shape.type == "secret" and isinstance(node, Table):
            return self._secret_file(node, path)
        if not isinstance(node, Scalar):
            return self._fault(node.place, path, f"expected {_EXPECTED[shape.type]}, got {_what(node)}")
        scalar = self._interpolated(node, path)
        if scalar is None:
            return self._bad(path)
        value = _typed(scalar, shape)
        if value is None and shape.nullable:
            return None
        if (complaint := _complaint(value, scalar, shape)) is not None:
            return self._fault(node.place, path, complaint)
        if shape.type in ("path", "made path"):
            directory = FilePath() if node.style == "raw" else self.directory
            find = self._file if shape.type == "path" else self._made_file
            return find(directory / str(value), node.place, path)
        return value

    def _interpolated(self, scalar: Scalar, path: Path) -> Scalar | None:
        if scalar.style == "raw" or "$" not in scalar.text:
            return scalar
        try:
            text = interpolate(scalar.text, self.env)
        except Uninterpolable as error:
            self.problems += [problem(scalar.place, path, message) for message in error.messages]
            return None
        return Scalar(text, "raw", scalar.place)  # quotes too: within [...] and {...} a variable needs them

    def _file(self, name: FilePath, place: Place, path: Path) -> object:
        try:
            found = name.exists() and not name.is_dir()  # a pipe, such as /dev/fd/63, is as good as a file
        except OSError:  # a name too long, a directory that may not be searched
            found = False
        return name if found else self._fault(place, path, "no such file")

    def _made_file(self, name: FilePath, place: Place, path: Path) -> object:
        try:
            if name.is_dir():
                return self._fault(place, path, "is a directory: expected the path of a file")
            found = name.parent.is_dir()
        except OSError:
            found = False
        return name if found else self._fault(place, path, "its directory does not exist: make it first")

    def _secret_file(self, table: Table, path: Path) -> object:
        if list(table.nodes) != ["file"]:
            return self._fault(table.place, path, f"expected {_EXPECTED['secret']}, got a section")
        name = self.bind(table.nodes["file"], Leaf("path"), (*path, "file"))
        if not isinstance(name, FilePath):
            return self._bad(path)
        try:
            with name.open("rb") as file:
                content = file.read(MAX_SECRET_BYTES + 1)
            text = content.decode().strip()
        except (OSError, ValueError) as error:
            reason = (error.strerror or "").lower() if isinstance(error, OSError) else "it is not text"
            return self._fault(table.place, path, f"the file of this secret cannot be read: {reason or 'unknown'}")
        if not text or len(content) > MAX_SECRET_BYTES:
            fault = "is empty" if not text else f"is larger than {MAX_SECRET_BYTES} bytes"
            return self._fault(table.place, path, f"the file of this secret {fault}")
        return text

    def _fault(self, place: Place, path: Path, message: str) -> object:
        self.problems.append(problem(place, path, message))
        return self._bad(path)

    def _bad(self, path: Path) -> object:
        self.bad.add(path)
        return BAD


def _switches_off(scalar: Scalar, shape: Shape) -> bool:
    """`SECTION: false` of a section that has modes."""
    mode = shape.fields.get("mode") if isinstance(shape, Record) else None
    can = isinstance(mode, Leaf) and "off" in mode.choices
    return can and scalar.style != "quoted" and scalars.resolve(scalar.text) is False


def _typed(scalar: Scalar, shape: Leaf) -> object:
    if scalar.style == "quoted":
        return scalar.text
    if scalar.style == "raw" and shape.type in ("text", "secret", "path", "made path"):
        return None if shape.nullable and scalar.text in scalars.NULLS else scalar.text
    return scalars.resolve(scalar.text)


def _complaint(value: object, scalar: Scalar, shape: Leaf) -> str | None:
    """What is wrong with a scalar's type. Never quotes the value: it may be a secret in the wrong place."""
    expected = f"expected {_EXPECTED[shape.type]}, got {scalars.kind(value)}"
    if shape.type in ("text", "secret", "path", "made path"):
        if value is None:
            return f"expected {_EXPECTED[shape.type]}, got nothing"
        if not isinstance(value, str):
            return f"{expected}: put it in quotes"
        if not value:
            return f"expected {_EXPECTED[shape.type]}, got an empty text"
        if shape.choices and value not in shape.choices:
            hint = did_you_mean(value, shape.choices)
            return f"expected {' or '.join(shape.choices)}" + (f": {hint}" if "?" in hint else "")
        return "must not hold a NUL character or half a character" if _NO_TEXT.search(value) else None
    if shape.type == "boolean":
        good = isinstance(value, bool)
    elif shape.type == "integer":
        good = isinstance(value, int) and not isinstance(value, bool)
    else:
        good = isinstance(value, int | float) and not isinstance(value, bool)
    if good:
        return None
    if scalar.style == "quoted" and not isinstance(scalars.resolve(scalar.text), str | None):
        return f"{expected}: take the quotes away"
    if shape.type == "boolean" and (word := _SWITCHES.get(scalar.text.lower())) is not None:
        return f"{expected}: write {word}"
    return expected


def _what(node: Node) -> str:
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Table):
        return "a section"
    return scalars.kind(scalars.resolve(node.text)) if isinstance(node, Scalar) and node.style == "plain" else "text"
