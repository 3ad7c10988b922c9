"""The standard library's `logging` as one more source of lines, so that nothing prints around the scrubber.

It takes the root's place: handlers that libraries (uvicorn above all) brought along are taken off, warnings and
uncaught exceptions of any thread come here too. An exception is written by type and place, never by its text, also
when a library passes it as an argument: `log.error("failed: %s", exc)`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final

from proxy.observability import tracebacks
from proxy.observability.lines import LEVELS, MAX_LINE, Lines, printable
from proxy.observability.writer import LineWriter

_log = logging.getLogger("breakwater")

_CHATTY: Final = ("httpx", "httpx2", "httpcore", "httpcore2", "h2", "hpack", "asyncio")
"""They log addresses and header values at their lower levels: never below a warning."""


class StdlibLog(logging.Handler):
    """A handler for the root logger. `plain`: `time level logger: message` in place of JSON."""

    def __init__(self, writer: LineWriter, lines: Lines, *, plain: bool = False) -> None:
        super().__init__()
        self._writer = writer
        self._lines = lines
        self._plain = plain
        self._undo: list[Callable[[], None]] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fault = record.exc_info[1] if record.exc_info else None
            line = self._line(record, _message(record), tracebacks.render(fault) if fault is not None else "")
        except Exception as exc:  # A wrong format string of anyone's must not break the caller, nor print around us.
            line = self._line(record, f"unprintable log record: {type(exc).__name__}", "")
        self._writer.write(line, urgent=record.levelno >= logging.ERROR)

    def _line(self, record: logging.LogRecord, message: str, trace: str) -> bytes:
        if self._plain:
            return self._plain_line(record, message, trace)
        fields = {"event": "log", "ts": self._lines.stamp(), "level": _level(record.levelno)}
        fields |= {"logger": record.name, "message": message}
        if trace:
            fields["traceback"] = trace
        return self._lines.encode(fields)

    def _plain_line(self, record: logging.LogRecord, message: str, trace: str) -> bytes:
        scrub = self._lines.scrubber.scrub_text
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        head = f"{at}  {_level(record.levelno)}  {record.name}: {message}"
        return ("\n    ".join([printable(scrub(row, MAX_LINE)) for row in (head, *trace.splitlines())]) + "\n").encode()

    def install(self, level: int) -> None:
        root = logging.getLogger()
        before = (root.handlers[:], root.level)
        root.handlers[:] = [self]
        root.setLevel(level)

        def restore() -> None:
            root.handlers[:] = before[0]
            root.setLevel(before[1])

        self._undo.append(restore)
        self._take_over_loggers()
        self._take_over_hooks()

    def uninstall(self) -> None:
        """Puts back what `install` replaced. Idempotent."""
        while self._undo:
            self._undo.pop()()

    def _take_over_loggers(self) -> None:
        for name in _CHATTY:
            logger = logging.getLogger(name)
            self._undo.append(_setter(logger.setLevel, logger.level))
            logger.setLevel(max(logger.level, logging.WARNING))
        for name in list(logging.root.manager.loggerDict):
            logger = logging.getLogger(name)
            if logger.handlers:
                self._undo.append(_restore_handlers(logger, logger.handlers[:], logger.propagate))
                logger.handlers.clear()
                logger.propagate = True

    def _take_over_hooks(self) -> None:
        before = (sys.excepthook, threading.excepthook, sys.unraisablehook)
        sys.excepthook = self._uncaught
        threading.excepthook = _uncaught_in_thread
        sys.unraisablehook = _unraisable
        logging.captureWarnings(True)

        def restore() -> None:
            sys.excepthook, threading.excepthook, sys.unraisablehook = before
            logging.captureWarnings(False)

        self._undo.append(restore)

    def _uncaught(self, kind: type[BaseException], exc: BaseException, tb: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            _log.critical("uncaught exception", exc_info=(kind, exc, tb))
        self._writer.flush()


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = args.thread.name if args.thread else "?"
        _log.error("uncaught exception in thread %s", name, exc_info=args.exc_value)


def _unraisable(args: sys.UnraisableHookArgs) -> None:
    if args.exc_value is not None:
        _log.error("exception in a destructor of %s", type(args.object).__qualname__, exc_info=args.exc_value)


def log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """For `loop.set_exception_handler`: the loop's own prints the `repr` of tasks, which holds their exception's text.

    What was cancelled or hung up by design never comes here; what does is a fault that nobody awaited.
    """
    exc = context.get("exception")
    task = context.get("task") or context.get("future")
    name = task.get_name() if isinstance(task, asyncio.Task) else "-"
    _log.error("event loop: %s (task %s)", context.get("message", "unhandled"), name, exc_info=exc)


def _level(number: int) -> str:
    """The nearest of our five levels below a number, which libraries may choose freely."""
    return max((name for name in LEVELS if LEVELS[name] <= number), key=LEVELS.__getitem__, default="debug")


def _message(record: logging.LogRecord) -> str:
    """As `record.getMessage`, but with exceptions by type and place."""
    message = tracebacks.describe(record.msg) if isinstance(record.msg, BaseException) else str(record.msg)
    args = record.args
    if not args:
        return message
    if isinstance(args, Mapping):
        return message % {name: _argument(value) for name, value in args.items()}
    return message % tuple(map(_argument, args))


def _argument(value: Any) -> Any:
    return tracebacks.describe(value) if isinstance(value, BaseException) else value


def _setter(put: Callable[[int], None], value: int) -> Callable[[], None]:
    return lambda: put(value)


def _restore_handlers(logger: logging.Logger, handlers: list[logging.Handler], propagate: bool) -> Callable[[], None]:
    def restore() -> None:
        logger.handlers[:] = handlers
        logger.propagate = propagate

    return restore
