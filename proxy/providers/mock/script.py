"""Scripted answers: a YAML list of steps that says what goes wrong, for which request, how often.

Read strictly: every mistake at once, each with its line and column.

Each request takes the first step, in the order of the file, that matches it and has uses left. A request that no such
step matches gets the mock's ordinary answer; so does every request once all steps are used up. `times` is 1 unless
the step says another number or `always`.

| key        | meaning                                                                                          |
|------------|--------------------------------------------------------------------------------------------------|
| `match`    | `path` and `model`, globs; both must match. Without it: every request                            |
| `times`    | how many requests the step serves: a number, or `always`                                         |
| `status`   | 200 to 599, default 200. Alone, from 400 on, it brings an error envelope                         |
| `headers`  | name: value, or name: [values]; framing headers are refused                                      |
| `delay_ms` | before the head                                                                                  |
| `body`     | text of the body; or `json`, any value; or `stream`, a list of events. None of these and no      |
|            | `status`: the ordinary answer, with the rest of the step applied to it                           |
| `split`    | cuts the body into pieces of so many bytes, each a chunk and a write of its own                  |
| `gap_ms`   | before every piece but the first                                                                 |
| `cut_at`   | only the first so many bytes of the body are sent                                                |
| `then`     | after the last byte: `complete`, `reset`, `close`, `stall`; unwritten it is `complete`, and      |
|            | after a `cut_at` it is `reset`                                                                   |

An event of `stream` is a text (sent as its data) or a mapping of `data` (a text or any JSON value), `event`,
`delay_ms`, or `raw` (bytes as they go out, instead of `data` and `event`). `script.example.yaml` shows each of them.
Scripted answers bill nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import orjson
import yaml

from proxy.providers.mock.draft import JSON, SSE, sse
from proxy.providers.mock.refusal import Refusal
from proxy.providers.mock.script_steps import ALWAYS, Problem, Script, ScriptError, Step
from proxy.transport.answer import End
from proxy.types import Headers

_STEP_KEYS: Final = (
    "match", "times", "status", "headers", "delay_ms", "body", "json", "stream", "split", "gap_ms", "cut_at", "then",
)  # fmt: skip
_EVENT_KEYS: Final = ("data", "event", "raw", "delay_ms")
_FRAMING: Final = (b"content-length", b"transfer-encoding", b"connection", b"x-request-id")
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LONGEST_WAIT_MS: Final = 3_600_000
_T = TypeVar("_T")

__all__ = ["Problem", "Script", "ScriptError", "parse_script", "read_script"]


def read_script(path: Path) -> Script:
    """Raises ScriptError, OSError."""
    return parse_script(path.read_bytes())


def parse_script(text: bytes | str) -> Script:
    """`text`: the YAML. Raises ScriptError."""
    reader = _Reader(text)
    steps = reader.steps()
    if reader.problems:
        raise ScriptError(sorted(reader.problems, key=lambda problem: (problem.line, problem.column)))
    return Script(steps)


class _Reader:
    """A method for each kind of value; each notes what is wrong and goes on with something harmless."""

    def __init__(self, text: bytes | str) -> None:
        self.problems: list[Problem] = []
        self._root: yaml.Node | None = None
        try:
            self._loader = yaml.SafeLoader(text)
            self._root = self._loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            self.problems.append(Problem(line, column, "steps", "this is not valid YAML"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
            self.problems.append(Problem(1, 1, "steps", "this is not a YAML text"))

    def steps(self) -> list[Step]:
        if self.problems:
            return []
        if not isinstance(self._root, yaml.SequenceNode) or not self._root.value:
            line, column = _place(self._root)
            self.problems.append(Problem(line, column, "steps", "a script is a list of at least one step"))
            return []
        return [self._step(node, f"steps[{i}]") for i, node in enumerate(self._root.value)]

    def _step(self, node: yaml.Node, path: str) -> Step:
        members = self._mapping(node, path, _STEP_KEYS)
        step = Step()
        self._match(members.get("match"), f"{path}.match", step)
        step.times = self._read(members, path, "times", self._times, 1)
        step.headers = self._read(members, path, "headers", self._headers, [])
        step.delay = self._read(members, path, "delay_ms", self._seconds, 0.0)
        step.gap = self._read(members, path, "gap_ms", self._seconds, None)
        step.split = self._read(members, path, "split", self._whole(1, 1 << 30), None)
        step.cut_at = self._read(members, path, "cut_at", self._whole(0, 1 << 30), None)
        step.then = self._read(members, path, "then", self._end, None)
        step.status = self._read(members, path, "status", self._whole(200, 599), 200)
        self._content(node, members, path, step)
        return step

    def _match(self, node: yaml.Node | None, path: str, step: Step) -> None:
        if node is None:
            return
        members = self._mapping(node, path, ("path", "model"))
        step.path = self._read(members, path, "path", self._text, "*")
        step.model = self._read(members, path, "model", self._text, "*")

    def _content(self, node: yaml.Node, members: dict[str, yaml.Node], path: str, step: Step) -> None:
        given = [key for key in ("body", "json", "stream") if key in members]
        for extra in given[1:]:
            self._wrong(members[extra], f"{path}.{extra}", f"'{given[0]}' is there already: one kind of body is enough")
        if not given:
            if "status" in members:
                step.content_type, step.pieces = JSON, _envelope(step.status)
            return
        if step.status in (204, 304):
            self._wrong(members[given[0]], f"{path}.{given[0]}", f"status {step.status} has no body")
        value = members[given[0]]
        if given[0] == "body":
            text = self._text(value, f"{path}.body")
            step.content_type, step.pieces = b"text/plain; charset=utf-8", (text.encode(),) if text else ()
        elif given[0] == "json":
            step.content_type, step.pieces = JSON, (self._json(value, f"{path}.json"),)
        else:
            step.content_type, step.streams = SSE, True
            events = [self._event(item, f"{path}.stream[{i}]") for i, item in enumerate(self._list(value, path))]
            step.pieces = tuple(data for _, data in events)
            step.gaps = tuple(delay for delay, _ in events)

    def _list(self, node: yaml.Node, path: str) -> list[yaml.Node]:
        if isinstance(node, yaml.SequenceNode):
            return list(node.value)
        self._wrong(node, f"{path}.stream", "must be a list of events")
        return []

    def _event(self, node: yaml.Node, path: str) -> tuple[float, bytes]:
        if isinstance(node, yaml.ScalarNode):
            return 0.0, sse("", self._text(node, path).encode())
        members = self._mapping(node, path, _EVENT_KEYS)
        delay = self._read(members, path, "delay_ms", self._seconds, 0.0)
        raw = self._read(members, path, "raw", self._text, None)
        if raw is not None:
            for key in ("data", "event"):
                if key in members:
                    self._wrong(members[key], f"{path}.{key}", "'raw' is the whole event already")
            if not raw:
                self._wrong(members["raw"], f"{path}.raw", "must not be empty")
            return delay, raw.encode()
        if "data" not in members:
            self._wrong(node, path, "an event needs 'data' or 'raw'")
            return delay, b""
        data = members["data"]
        encoded = self._text(data, path).encode() if _is_text(data) else self._json(data, f"{path}.data")
        return delay, sse(self._read(members, path, "event", self._text, ""), encoded)

    def _read(
        self, members: dict[str, yaml.Node], path: str, key: str, reader: Callable[[yaml.Node, str], _T], otherwise: Any
    ) -> Any:
        return reader(members[key], f"{path}.{key}") if key in members else otherwise

    def _mapping(self, node: yaml.Node, path: str, allowed: tuple[str, ...]) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            self._wrong(node, path, f"must be a mapping with keys among {', '.join(allowed)}")
            return {}
        out: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name not in allowed:
                self._wrong(key, f"{path}.{name}", f"is not a key; known are {', '.join(allowed)}")
            elif name in out:
                self._wrong(key, f"{path}.{name}", "is there twice")
            else:
                out[name] = value
        return out

    def _text(self, node: yaml.Node, path: str) -> str:
        if _is_text(node):
            return str(node.value)
        self._wrong(node, path, "must be a text")
        return ""

    def _json(self, node: yaml.Node, path: str) -> bytes:
        self._no_twins(node, path)
        try:
            return orjson.dumps(self._loader.construct_object(node, deep=True))
        except (yaml.YAMLError, TypeError, ValueError, RecursionError):
            self._wrong(node, path, "must be a value that JSON can hold")
            return b""

    def _no_twins(self, node: yaml.Node, path: str, above: tuple[int, ...] = ()) -> None:
        """Notes keys that are there twice, at any depth. `above`: the nodes around this one (aliases make circles)."""
        if id(node) in above:
            return
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                name = str(key.value)
                if name in seen:
                    self._wrong(key, f"{path}.{name}", "is there twice")
                seen.add(name)
                self._no_twins(value, f"{path}.{name}", (*above, id(node)))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                self._no_twins(value, f"{path}[{i}]", (*above, id(node)))

    def _number(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
            try:
                return self._loader.construct_object(node)
            except (yaml.YAMLError, ValueError):
                return None
        return None

    def _whole(self, low: int, high: int) -> Callable[[yaml.Node, str], int]:
        def read(node: yaml.Node, path: str) -> int:
            value = self._number(node)
            if isinstance(value, int) and low <= value <= high:
                return value
            self._wrong(node, path, f"must be a whole number from {low} to {high}")
            return low

        return read

    def _seconds(self, node: yaml.Node, path: str) -> float:
        value = self._number(node)
        if isinstance(value, int | float) and 0 <= value <= _LONGEST_WAIT_MS:
            return value / 1000
        self._wrong(node, path, f"must be milliseconds from 0 to {_LONGEST_WAIT_MS}")
        return 0.0

    def _times(self, node: yaml.Node, path: str) -> int:
        if isinstance(node, yaml.ScalarNode) and node.value == "always":
            return ALWAYS
        value = self._number(node)
        if isinstance(value, int) and value >= 1:
            return value
        self._wrong(node, path, "must be a whole number from 1, or 'always'")
        return 1

    def _end(self, node: yaml.Node, path: str) -> End:
        value = node.value if isinstance(node, yaml.ScalarNode) else None
        for end in End:
            if value == end.value:
                return end
        self._wrong(node, path, f"must be one of {', '.join(end.value for end in End)}")
        return End.COMPLETE

    def _headers(self, node: yaml.Node, path: str) -> Headers:
        if not isinstance(node, yaml.MappingNode):
            self._wrong(node, path, "must be a mapping of names to values")
            return []
        out: Headers = []
        for key, value in node.value:
            text = key.value if isinstance(key, yaml.ScalarNode) else ""
            name = text.lower().encode()
            if not _TOKEN.fullmatch(text):
                self._wrong(key, f"{path}.{text}", "is not a header name")
            elif name in _FRAMING:
                self._wrong(key, f"{path}.{text}", "is set by the mock itself")
            else:
                values = value.value if isinstance(value, yaml.SequenceNode) else [value]
                out += [(name, self._header(item, f"{path}.{text}")) for item in values]
        return out

    def _header(self, node: yaml.Node, path: str) -> bytes:
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        if text is None or not text.isascii() or any((c < " " and c != "\t") or c == "\x7f" for c in text):
            self._wrong(node, path, "must be a text of printable ASCII characters")
            return b""
        return str(text).encode()

    def _wrong(self, node: yaml.Node | None, path: str, message: str) -> None:
        line, column = _place(node)
        self.problems.append(Problem(line, column, path, message))


def _is_text(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str"


def _place(node: yaml.Node | None) -> tuple[int, int]:
    mark = node.start_mark if node is not None else None
    return (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)


def _envelope(status: int) -> tuple[bytes, ...]:
    if status < 400:
        return ()
    return (Refusal(status, "The mock was asked to fail.", kind="server_error", code="mock_error").envelope(),)
