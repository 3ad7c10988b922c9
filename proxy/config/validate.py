"""Holds bound values against the models, part by part, so that a fault in one part hides none in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import SecretStr, ValidationError

from proxy.config import messages
from proxy.config.bind import BAD, Binding
from proxy.config.problems import Path, Problem, problem, render
from proxy.config.references import findings
from proxy.config.shape import TAGS, Leaf, ListOf, MapOf, OneOrList, Record, Shape, Variants, WordOr
from proxy.store.address import MEMORY

Pieces = dict[str, Any]
"""The sections as models. An invalid part is a model too, unvalidated, for what refers to it; None if unreadable."""


def validated(values: Mapping[str, object], shape: Record, binding: Binding) -> tuple[Pieces, list[Problem]]:
    """The sections of `values`, and what is wrong within them and between them."""
    wrong: list[Problem] = []

    def part(value: Any, shape: Shape, path: Path) -> Any:
        record = _chosen(shape, value)
        if record is None or value is BAD:
            return None if value is BAD else value
        try:
            return record.model.model_validate(value)
        except ValidationError as error:
            wrong.extend(translated(error, path, binding))
            return _salvaged(value, record)

    pieces: Pieces = {}
    for name, value in values.items():
        field = shape.fields[name]
        if isinstance(field, MapOf) and isinstance(value, dict):
            pieces[name] = {key: part(item, field.item, (name, key)) for key, item in value.items()}
        elif isinstance(field, ListOf) and isinstance(value, tuple):
            pieces[name] = tuple(part(item, field.item, (name, index)) for index, item in enumerate(value))
        else:
            pieces[name] = part(value, field, (name,))
    wrong.extend(_of_leaves(values, shape, binding))
    return pieces, wrong + _between(pieces, wrong, binding)


def _of_leaves(values: Mapping[str, object], shape: Record, binding: Binding) -> list[Problem]:
    """What is wrong with the single values at the top: they have no model of their own but the whole."""
    given = {name: value for name, value in values.items() if isinstance(shape.fields[name], Leaf) and value is not BAD}
    try:
        shape.model.model_validate(given)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        mine = [(detail["loc"], messages.describe(detail)) for detail in details if detail["loc"][0] in given]
        return [problem(binding.place(at), at, message) for at, message in mine]
    return []


def translated(error: ValidationError, path: Path, binding: Binding) -> list[Problem]:
    """Our own words for what pydantic found, less what only repeats another finding. Its texts can quote a value."""
    details = [
        (at, detail)
        for detail in error.errors(include_url=False, include_input=False)
        if (at := _written((*path, *detail["loc"]), binding)) is not None
    ]
    faults = [*binding.bad, *(at for at, _ in details)]
    found: list[Problem] = []
    for at, detail in details:
        known = any(at[: len(bad)] == bad for bad in binding.bad)
        # An invalid item does not count, so a list of one is reported as too short as well.
        follows = detail["type"] == "too_short" and any(len(b) > len(at) and b[: len(at)] == at for b in faults)
        if not known and not follows:
            found.append(problem(binding.place(at), at, messages.describe(detail)))
    return found


def _written(path: Path, binding: Binding) -> Path | None:
    """A path as the file has it: where a section or a word may stand, pydantic puts in which of them it tried. None for
    the word, which a section is not: the section's own faults are told."""
    at: Path = ()
    for step in path:
        if isinstance(step, str) and ("[" in step or step in TAGS) and (*at, step) not in binding.places:
            if step.startswith("literal["):
                return None
        else:
            at = (*at, step)
    return at


def _between(pieces: Pieces, wrong: list[Problem], binding: Binding) -> list[Problem]:
    providers = pieces.get("providers", {})
    if providers is None:
        return []  # there are no names to hold the references against
    known = {one.path for one in (*wrong, *binding.problems)}
    found = findings(
        providers,
        pieces.get("models") or (),
        pieces.get("tenants") or (),
        pieces.get("admin"),
        pieces.get("ledger"),
        pieces.get("fault_tolerance"),
        pieces.get("context"),
        makes_keys=pieces.get("state", MEMORY) != MEMORY,
    )
    return [
        problem(binding.keys.get(at) or binding.place(at), at, message)
        for at, message in found
        if render(at) not in known
    ]


def _chosen(shape: Shape, value: Any) -> Record | None:
    if isinstance(shape, Variants) and value is not BAD:
        return shape.options[value[shape.by]]
    return shape if isinstance(shape, Record) else None


def _salvaged(value: Any, shape: Shape) -> Any:
    """`value` in the types of its model though parts of it are invalid: BAD and missing texts are empty."""
    if isinstance(shape, Leaf):
        text = "" if value is BAD else value
        return SecretStr(text) if shape.type == "secret" and isinstance(text, str) else text
    if isinstance(shape, OneOrList):
        return _salvaged(value, ListOf(shape.item) if isinstance(value, tuple) else shape.item)
    if isinstance(shape, WordOr):
        return _salvaged(value, shape.record) if isinstance(value, dict) else None
    if isinstance(shape, ListOf):
        return () if value is BAD else value and tuple(_salvaged(item, shape.item) for item in value)
    if isinstance(shape, MapOf):
        return {} if value is BAD else {key: _salvaged(item, shape.item) for key, item in value.items()}
    record = _chosen(shape, value)
    if record is None or value is BAD:
        return None
    given = {name: _salvaged(item, record.fields[name]) for name, item in value.items()}
    for name, field in record.model.model_fields.items():
        if field.is_required() and name not in given:
            given[name] = () if isinstance(record.fields[name], ListOf) else ""
    return record.model.model_construct(**given)
