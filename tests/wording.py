"""Reads the program's source with `ast` and tells what must not stand in a module. Rules as in `architecture.py`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.architecture import ROOT, Function, Layout, Sources, module, under


def exception_texts(sources: Sources, layout: Layout) -> Iterator[str]:
    """The text of a caught exception may hold a key: it goes into no string, no error of ours and no log."""
    for source in sources.values():
        if under(source.name, *layout.own_errors):
            continue
        for scope, name in exceptions(source.tree):
            for node in ast.walk(scope):
                if any(quotes(part, name) for part in spoken(node)):
                    yield f"{source.name}:{getattr(node, 'lineno', 0)}: the text of '{name}' gets out"


def exceptions(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Where a name is an exception: a handler that binds it, a function whose parameter is annotated as one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.name:
            yield node, node.name
        elif isinstance(node, Function):
            arguments = (each for each in ast.walk(node.args) if isinstance(each, ast.arg) and each.annotation)
            annotated = ((each.arg, ast.unparse(each.annotation or each)) for each in arguments)
            yield from ((node, name) for name, kind in annotated if re.search(r"(Error|Exception)\b", kind))


SAYERS = re.compile(r"^(str|repr|format|ascii)$|\.(format|format_exception|format_exception_only)$")
LOGGERS = re.compile(r"\.(debug|info|warning|error|exception|critical|log)$")


def spoken(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node that become text which leaves us."""
    if isinstance(node, ast.FormattedValue):
        yield node.value
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.Add):
        yield from (node.left, node.right)
    elif isinstance(node, ast.Call):
        function = ast.unparse(node.func)
        if SAYERS.search(function) or LOGGERS.search(function) or function in ERRORS:
            yield from node.args
            yield from (keyword.value for keyword in node.keywords if keyword.arg != "exc_info")


TEXTS = frozenset({"args", "strerror", "msg", "reason_phrase", "verify_message", "__notes__"})


def quotes(node: ast.AST, name: str) -> bool:
    """Whether an expression holds the exception itself or one of its texts.

    Its type may stand there, and other attributes, and what a function makes of it: that one is judged for itself.
    """
    if isinstance(node, ast.Call) and not SAYERS.search(ast.unparse(node.func)):
        return isinstance(node.func, ast.Attribute) and quotes(node.func.value, name)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name:
        return node.attr in TEXTS
    if isinstance(node, ast.Name):
        return node.id == name
    return any(quotes(child, name) for child in ast.iter_child_nodes(node))


ERRORS = frozenset(
    node.name for node in module("", (ROOT / "proxy/errors.py").read_text()).tree.body if isinstance(node, ast.ClassDef)
)


def broad_excepts(sources: Sources, layout: Layout) -> Iterator[str]:
    """A handler of everything raises again or says why not; one of cancellation raises it or hands it over."""
    for source in sources.values():
        lines = source.text.splitlines()
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = {ast.unparse(each) for each in ast.walk(node.type)} if node.type else {"BaseException"}
            raises = any(isinstance(each, ast.Raise) for each in ast.walk(node))
            reason = "#" in "".join(lines[node.lineno - 2 : node.lineno + 1])
            if caught & {"Exception", "BaseException"} and not raises and not reason:
                yield f"{source.name}:{node.lineno}: a broad except without its reason"
            if "BaseException" in caught and not raises and not hands_over(node):
                yield f"{source.name}:{node.lineno}: swallows cancellation"


def hands_over(handler: ast.ExceptHandler) -> bool:
    """Whether the caught exception is an argument of some call, such as `future.set_exception`."""
    words = [word for node in ast.walk(handler) if isinstance(node, ast.Call) for word in node.args]
    return any(isinstance(word, ast.Name) and word.id == handler.name for word in words)


def sizes(sources: Sources, layout: Layout) -> Iterator[str]:
    for source in sources.values():
        if (length := len(source.text.splitlines())) >= layout.max_file:
            yield f"{source.name}: {length} lines"
        for node in ast.walk(source.tree):
            if (
                isinstance(node, Function)
                and (length := (node.end_lineno or 0) - node.lineno + 1) > layout.max_function
            ):
                yield f"{source.name}:{node.lineno}: {node.name} has {length} lines"


MARKS = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")


def marks(sources: Sources, layout: Layout) -> Iterator[str]:
    for source in sources.values():
        for number, line in enumerate(source.text.splitlines(), 1):
            if MARKS.search(line):
                yield f"{source.name}:{number}: unfinished"
