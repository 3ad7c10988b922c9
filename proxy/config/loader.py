"""From a file, the environment and flags to the settings, or to everything that is wrong with them.

Precedence: defaults < file < environment < flags. Nothing is read but the file, the files it names, and what is given;
nothing is remembered between two calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

from pydantic import ValidationError

from proxy.config import advice, environment, yaml
from proxy.config.bind import Binding
from proxy.config.effective import digest, leaves
from proxy.config.problems import NOWHERE, ConfigErrors, Path, Place, Problem, problem, render
from proxy.config.settings import Settings
from proxy.config.shape import Record, record
from proxy.config.tree import Node, Table, native
from proxy.config.validate import translated, validated

MAX_FILE_BYTES = 1_048_576


@dataclass(frozen=True, slots=True)
class Loaded:
    """Valid settings, and what there is to know of how they came about."""

    settings: Settings
    hash: str
    """16 hex digits that name the effective configuration. Secrets do not enter: a rotated key keeps the hash."""
    warnings: tuple[Problem, ...]
    """What is allowed, and probably not meant."""
    origins: Mapping[str, str]
    """For every leaf, by path: `default`, `file:line`, `environment NAME` or `flag`."""


def load(path: FilePath | None, env: Mapping[str, str], overrides: Mapping[str, object] | None = None) -> Loaded:
    """Reads the file at `path` (None: no file).

    `overrides` are the flags, by dotted path of keys (`listen.port`), as Python values; None means that the flag was
    not given, and a mapping changes the keys that it names. Relative paths in the file start at its directory, all
    others at the current one.
    Raises ConfigErrors with all problems; KeyError for an override of a path that does not exist.
    """
    shape = record(Settings)
    tree, wrong = _read(path)
    if not tree.nodes and wrong:
        raise ConfigErrors(wrong)
    _override(tree, overrides or {}, shape)  # first for the names that it brings, again because flags win
    wrong += environment.apply(env, tree, shape)
    _override(tree, overrides or {}, shape)
    binding = Binding(env, path.parent if path else FilePath())
    values = binding.bind(tree, shape, ())
    assert isinstance(values, dict)
    pieces, invalid = validated(values, shape, binding)
    wrong += binding.problems + invalid
    if wrong:
        raise ConfigErrors(sorted(dict.fromkeys(wrong), key=lambda one: (one.line == 0, one.line, one.column)))
    try:
        settings = Settings.model_validate(pieces)
    except ValidationError as error:
        raise ConfigErrors(translated(error, (), binding)) from None
    return Loaded(
        settings=settings,
        hash=digest(settings),
        warnings=tuple(problem(binding.place(at), at, message) for at, message in advice.warnings(settings)),
        origins={render(at): _origin(at, binding) for at, _ in leaves(settings)},
    )


def _read(path: FilePath | None) -> tuple[Table, list[Problem]]:
    if path is None:
        return Table({}, NOWHERE), []
    source = str(path)
    empty = Table({}, Place(source, 1, 1))
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or "unknown reason").lower()
        return empty, [problem(Place(source), (), f"cannot be read: {reason}")]
    if len(data) > MAX_FILE_BYTES:
        return empty, [problem(Place(source), (), f"larger than {MAX_FILE_BYTES} bytes")]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        place = Place(source, before.count(b"\n") + 1, error.start - before.rfind(b"\n"))
        return empty, [problem(place, (), "not UTF-8: save the file in that encoding")]
    return yaml.read(text, source)


def _override(tree: Table, overrides: Mapping[str, object], shape: Record) -> None:
    place = Place("flag")
    for dotted, value in overrides.items():
        if value is None:
            continue
        *sections, last = dotted.split(".")
        at, fields = tree, shape.fields
        for step in sections:
            inner = fields[step]
            if not isinstance(inner, Record):
                raise KeyError(dotted)
            fields = inner.fields
            child = at.nodes.get(step)
            if not isinstance(child, Table):
                child = at.nodes[step] = Table({}, place)
            at = child
        if last not in fields:
            raise KeyError(dotted)
        _merge(at, last, native(value, place))


def _merge(table: Table, key: str, node: Node) -> None:
    below = table.nodes.get(key)
    if isinstance(below, Table) and isinstance(node, Table):
        for name, child in node.nodes.items():
            _merge(below, name, child)
    else:
        table.nodes[key] = node
        table.keys[key] = node.place


def _origin(path: Path, binding: Binding) -> str:
    place = binding.places.get(path)
    return place.origin if place is not None else "default"
