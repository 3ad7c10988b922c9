"""Reads the program's source with `ast` and tells which imports leave its shape. Pure: text in, findings out.

A rule takes the modules by name and the layout, and yields one line for each violation. The layout, and the proof that
each rule finds what it is there for, stand in `test_architecture.py`.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef
ROOT = Path(__file__).resolve().parent.parent


class Layout(NamedTuple):
    """Who may import whom. A place such as `proxy.edge` stands for the module and everything under it."""

    ranks: tuple[tuple[int, str], ...]
    """Rank and patterns, separated by blanks. In a pattern, `*` is one word; the most particular one that fits wins."""
    shared: int
    """Up to this rank a module is a meeting place; above it, a room's own affair."""
    free: tuple[str, ...]
    """Stand outside the rooms, and may look into all that is lower."""
    late: tuple[str, ...]
    """May import inside a function."""
    only_in: Mapping[str, str]
    """Library, and the one place that may import it."""
    own_errors: tuple[str, ...]
    """Here a caught exception is one of our own, whose text is meant for the user."""
    max_file: int
    max_function: int

    def rank(self, name: str) -> int | None:
        fits = [
            (pattern.count("."), len(pattern), value)
            for value, patterns in self.ranks
            for pattern in patterns.split()
            if under(name, pattern) or (fnmatchcase(name, pattern) and name.count(".") == pattern.count("."))
        ]
        return max(fits)[-1] if fits else None


class Module(NamedTuple):
    """A module of ours; a package's own file is called `package.__init__`."""

    name: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.rpartition(".")[0]


class Import(NamedTuple):
    """`late`: inside a function. `typing`: under `if TYPE_CHECKING`, so it never runs."""

    target: str
    line: int
    late: bool
    typing: bool


Sources = Mapping[str, Module]
Rule = Callable[[Sources, Layout], Iterator[str]]


def module(name: str, text: str) -> Module:
    return Module(name, text, ast.parse(text, filename=name))


@functools.cache
def read(folder: str) -> Sources:
    """Every module below a folder of the repository."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    return {name: module(name, path.read_text()) for name, path in zip(names, paths, strict=True)}


def room(name: str) -> str:
    return ".".join(name.split(".")[:2])


def under(name: str, *places: str) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


@functools.cache
def imports(source: Module) -> tuple[Import, ...]:
    """Absolute names, also of relative imports and of `import_module` with a literal."""
    found: list[Import] = []

    def walk(node: ast.AST, late: bool, typing: bool) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
            found.extend(Import(target, node.lineno, late, typing) for target in targets(node, source.package))
        late = late or isinstance(node, Function | ast.Lambda)
        typing = typing or (isinstance(node, ast.If) and last_word(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            walk(child, late, typing)

    walk(source.tree, False, False)
    return tuple(found)


def targets(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        words = package.split(".")
        base = words[: len(words) - node.level + 1] if node.level else []
        stem = ".".join([*base, *([node.module] if node.module else [])])
        yield from (f"{stem}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and last_word(node.func).endswith(("import_module", "__import__")):
        yield from (str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant))


def last_word(node: ast.expr) -> str:
    """Of a dotted name; empty for what is none."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def resolve(sources: Sources, target: str) -> str | None:
    """The module of ours that an imported name means: itself, a package, or the module that holds the name."""
    while target:
        for name in (target, f"{target}.__init__"):
            if name in sources:
                return name
        target = target.rpartition(".")[0]
    return None


def edges(source: Module, sources: Sources) -> Iterator[tuple[str, Import]]:
    """The modules of ours that a module imports, each line once."""
    found: dict[tuple[str, int], Import] = {}
    for each in imports(source):
        target = resolve(sources, each.target)
        if target is not None and target != source.name:
            found.setdefault((target, each.line), each)
    return ((target, each) for (target, _), each in found.items())


def ranks(sources: Sources, layout: Layout) -> Iterator[str]:
    """A module imports lower ranks only, or its own room at its own rank."""
    for source in sources.values():
        own = layout.rank(source.name)
        if own is None:
            yield f"{source.name}: has no row in the table of ranks"
            continue
        for target, each in edges(source, sources):
            other = layout.rank(target)
            highest = own if room(source.name) == room(target) or own == 0 else own - 1
            if other is not None and other > highest:
                yield f"{source.name}:{each.line}: rank {own} imports {target} of rank {other}"


def rooms(sources: Sources, layout: Layout) -> Iterator[str]:
    """What two rooms share stands in a shared module, and neither looks into the other."""
    for source in sources.values():
        for target, each in edges(source, sources):
            private = (layout.rank(target) or 0) > layout.shared and room(source.name) != room(target)
            if private and not under(source.name, *layout.free) and not under(target, *layout.free):
                yield f"{source.name}:{each.line}: looks into the room of {target}"


def cycles(sources: Sources, layout: Layout) -> Iterator[str]:
    graph: dict[str, list[str]] = {}
    for source in sources.values():
        graph[source.name] = [target for target, each in edges(source, sources) if not each.typing]
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> Iterator[str]:
        if name in path:
            yield " -> ".join([*path[path.index(name) :], name])
        elif name not in done:
            for target in graph[name]:
                yield from visit(target, [*path, name])
            done.add(name)

    for name in graph:
        yield from visit(name, [])


def late_imports(sources: Sources, layout: Layout) -> Iterator[str]:
    for source in sources.values():
        if not under(source.name, *layout.late):
            yield from (f"{source.name}:{each.line}: imports late" for each in imports(source) if each.late)


def libraries(sources: Sources, layout: Layout) -> Iterator[str]:
    for source in sources.values():
        for each in imports(source):
            if under(each.target, "unittest.mock", "mock"):
                yield f"{source.name}:{each.line}: a mock"
            for library, place in layout.only_in.items():
                if under(each.target, library) and source.name.startswith("proxy.") and not under(source.name, place):
                    yield f"{source.name}:{each.line}: {library} belongs to {place}"


def settings_places(sources: Sources, layout: Layout) -> Iterator[str]:
    """A layer's settings stand beside it; `config` only assembles them. (`admin` describes its own API.)"""
    for source in sources.values():
        if under(source.name, "proxy.config", "proxy.admin") or source.name.endswith(".settings"):
            continue
        for each in imports(source):
            if under(each.target, "pydantic", "pydantic_settings"):
                yield f"{source.name}:{each.line}: settings models stand in a room's settings.py"
