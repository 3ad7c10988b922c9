"""An exception for the log: its types, its causes, and where it happened, but not its text.

The text of a foreign exception can hold anything: a header with a key, the body of a request, a URL with a password.
What is worth knowing stands in the type and the place. Two kinds of text are safe and stay: that of our own errors,
and the operating system's name for an error number.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from pathlib import PurePath
from types import CodeType, TracebackType
from typing import Final

from proxy.errors import ProxyError

_MAX_FRAMES: Final = 16
"""The innermost ones."""

_MAX_EXCEPTIONS: Final = 6


def describe(exc: BaseException) -> str:
    """One line: type, and the text where that is safe."""
    name = type(exc).__qualname__
    module = type(exc).__module__
    if module not in ("builtins", "__main__"):
        name = f"{module}.{name}"
    if isinstance(exc, ProxyError):
        return f"{name}: {exc.message}"
    if isinstance(exc, OSError) and module == "builtins" and exc.errno is not None and exc.errno in errno.errorcode:
        return f"{name}: [{errno.errorcode[exc.errno]}] {os.strerror(exc.errno)}"
    return name


def render(exc: BaseException) -> str:
    """Several lines, outermost exception first, each with its innermost frames as `path:line in function`."""
    lines: list[str] = []
    _walk(exc, "", lines, set())
    return "\n".join(lines)


def _walk(exc: BaseException, how: str, lines: list[str], seen: set[int]) -> None:
    if id(exc) in seen or len(seen) >= _MAX_EXCEPTIONS:
        return
    seen.add(id(exc))
    lines.append(how + describe(exc))
    lines.extend(_frames(exc.__traceback__))
    if isinstance(exc, BaseExceptionGroup):
        for member in exc.exceptions:
            _walk(member, "one of: ", lines, seen)
    if exc.__cause__ is not None:
        _walk(exc.__cause__, "caused by: ", lines, seen)
    elif exc.__context__ is not None and not exc.__suppress_context__:
        _walk(exc.__context__, "while handling: ", lines, seen)


def _frames(tb: TracebackType | None) -> list[str]:
    places: deque[tuple[CodeType, int]] = deque(maxlen=_MAX_FRAMES)
    depth = 0
    while tb is not None:
        places.append((tb.tb_frame.f_code, tb.tb_lineno))
        depth += 1
        tb = tb.tb_next
    frames = [f"  {_short(code.co_filename)}:{line} in {code.co_qualname}" for code, line in places]
    return frames if depth <= _MAX_FRAMES else [f"  ({depth - _MAX_FRAMES} outer frames)", *frames]


def _short(path: str) -> str:
    """Without where it is installed: from the package on, or the last two parts."""
    parts = PurePath(path).parts
    for root, skip in (("site-packages", 1), ("dist-packages", 1), ("proxy", 0)):
        if root in parts:
            return "/".join(parts[parts.index(root) + skip :])
    return "/".join(parts[-2:])
