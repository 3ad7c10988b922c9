"""From YAML text to a tree with the place of every key and value, and every fault of the text.

PyYAML composes; nothing is constructed, so no tag can create anything. Bounds: nesting, and the number of nodes with
every alias written out, so that a few lines of aliases cannot become gigabytes.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from proxy.config.problems import Path, Place, Problem, problem
from proxy.config.tree import Broken, Items, Node, Scalar, Table

MAX_DEPTH = 32
MAX_NODES = 50_000

_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))
_QUOTED_WORD = re.compile(r" '[^'<]{2,}'")


class _TooDeep(Exception):
    def __init__(self, mark: yaml.Mark) -> None:
        self.mark = mark


class _Composer(yaml.SafeLoader):
    """Composes nodes without guessing types: `scalars.resolve` does that, later and by YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML declares it so)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _TooDeep(self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def read(text: str, source: str) -> tuple[Table, list[Problem]]:
    """The tree of `text` and what is wrong with the text. `source` names it in places.

    With a fault of syntax the tree is empty; a value with any other fault is Broken in it.
    """
    empty = Table({}, Place(source, 1, 1))
    try:
        root = _compose(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _place(source, mark) if mark else empty.place
        return empty, [problem(place, (), f"not valid YAML: {_reason(error, text)}")]
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = Place(source, before.count("\n") + 1, len(before) - before.rfind("\n"))
        return empty, [problem(place, (), "not valid YAML: a control character is not allowed here")]
    except _TooDeep as error:
        return empty, [problem(_place(source, error.mark), (), f"nested deeper than {MAX_DEPTH} levels")]
    except (ValueError, OverflowError, IndexError):
        # PyYAML's scanner lets these out for escapes beyond Unicode ("\UFFFFFFFF") and malformed directives.
        return empty, [problem(empty.place, (), "not valid YAML: an escape or a directive is malformed")]
    if root is None:
        return empty, []
    conversion = _Conversion(source)
    tree = conversion.convert(root, ())
    if isinstance(tree, Scalar) and tree.style == "plain" and tree.text in ("", "~", "null"):
        return empty, conversion.problems
    if not isinstance(tree, Table):
        expected = problem(tree.place, (), "expected sections at the top, such as: providers: {openai: {kind: openai}}")
        return empty, conversion.problems or [expected]
    return tree, conversion.problems


def read_flow(text: str, source: str) -> Node | None:
    """A single value in flow form, such as `[a, "b"]`, as a tree of raw scalars. None if it is malformed."""
    try:
        root = _compose(text)
    except (yaml.YAMLError, _TooDeep, ValueError, OverflowError, IndexError):  # for the last three see `read`
        return None
    if root is None:
        return None
    conversion = _Conversion(source, raw=True)
    node = conversion.convert(root, ())
    return None if conversion.problems else node


def _compose(text: str) -> yaml.Node | None:
    composer = _Composer(text)
    try:
        return composer.get_single_node()
    finally:
        composer.dispose()


class _Conversion:
    """One walk over PyYAML's nodes. Aliases are written out: each use has nodes of its own."""

    def __init__(self, source: str, *, raw: bool = False) -> None:
        self.source = source
        self.raw = raw
        self.problems: list[Problem] = []
        self.count = 0
        self.open: set[int] = set()

    def convert(self, node: yaml.Node, path: Path) -> Node:
        place = Place(self.source) if self.raw else _place(self.source, node.start_mark)
        self.count += 1
        if self.count > MAX_NODES:
            return self._fault(place, path, f"more than {MAX_NODES} values, with aliases written out")
        if id(node) in self.open:
            return self._fault(place, path, "an alias must not hold itself")
        if node.tag not in _TAGS:
            return self._fault(place, path, "tags (!name) are not supported: write the value alone")
        if isinstance(node, yaml.ScalarNode):
            return Scalar(node.value, "raw" if self.raw else "quoted" if node.style else "plain", place)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return self._items(node, place, path)
            assert isinstance(node, yaml.MappingNode)
            return self._table(node, place, path)
        finally:
            self.open.discard(id(node))

    def _items(self, node: yaml.SequenceNode, place: Place, path: Path) -> Items:
        items = Items([], place)
        for index, child in enumerate(node.value):
            if self.count > MAX_NODES:
                break
            items.nodes.append(self.convert(child, (*path, index)))
        return items

    def _table(self, node: yaml.MappingNode, place: Place, path: Path) -> Table:
        table = Table({}, place)
        for key_node, child in node.value:
            if self.count > MAX_NODES:
                break
            at = Place(self.source) if self.raw else _place(self.source, key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                self._fault(at, path, "a key must be plain text")
                continue
            key = key_node.value
            if key == "<<" and not key_node.style:
                self._fault(at, path, "merge keys (<<) are not supported: use an alias for a whole value")
            elif key in table.keys:
                self._fault(at, (*path, key), f"given twice; the first is on line {table.keys[key].line}")
            else:
                table.keys[key] = at
                table.nodes[key] = self.convert(child, (*path, key))
        return table

    def _fault(self, place: Place, path: Path, message: str) -> Broken:
        self.problems.append(problem(place, path, message))
        return Broken(place)


def _place(source: str, mark: yaml.Mark) -> Place:
    return Place(source, mark.line + 1, mark.column + 1)


def _reason(error: yaml.MarkedYAMLError, text: str) -> str:
    """What PyYAML says, without the words it quotes from the text: they can be part of a secret."""
    reason = error.problem or error.context or "malformed"
    if error.context and reason.startswith("but "):
        reason = f"{error.context}, {reason}"
    reason = _QUOTED_WORD.sub("", reason)
    mark = error.problem_mark
    if mark is not None and text[max(mark.index - 1, 0) : mark.index + 1] == "${":
        return f'{reason}; within [...] or {{...}} write a variable in quotes: "${{NAME}}"'
    return reason
