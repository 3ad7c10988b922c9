"""Time series in memory, and their text exposition (format 0.0.4): counters, histograms, values read at scrape time.

Why not the client library's own classes: an `observe` of theirs searches the buckets one by one and takes two locks
(about 2 us), and their exposition builds every label string anew (10 us a line) while it holds the interpreter. Here
a cell belongs to one thread (the event loop's), its label strings are built once, and a scrape is two parts:
`snapshot` copies the numbers on the loop, so that they belong together, and `Snapshot.render` writes them elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Final

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Count:
    """One series that only rises. Add to `value`."""

    __slots__ = ("prefix", "value")

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.value: float = 0


class Distribution:
    """The buckets of one label set."""

    __slots__ = ("bounds", "counts", "prefixes", "sum")

    def __init__(self, prefixes: tuple[str, ...], bounds: Sequence[float]) -> None:
        self.prefixes = prefixes
        """Of each bucket, `+Inf` included, then of the sum and of the count."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Counter:
    """A family of counts under one name. `labels` are names; a child's values come in the same order.

    `divisor`: what is counted in a smaller unit than it is shown in, such as money in integers.
    """

    __slots__ = ("_children", "_divisor", "_labels", "_name", "header")

    def __init__(self, name: str, text: str, labels: Sequence[str], divisor: int = 1) -> None:
        self._divisor = divisor
        self.header = _header(name, text, "counter")
        self._name = name
        self._labels = labels
        self._children: dict[tuple[str, ...], Count] = {}

    def child(self, *values: str) -> Count:
        cell = self._children.get(values)
        if cell is None:
            cell = self._children[values] = Count(_series(self._name, self._labels, values))
        return cell

    def __len__(self) -> int:
        return len(self._children)

    def copy(self) -> list[tuple[str, float]]:
        if self._divisor != 1:
            return [(cell.prefix, cell.value / self._divisor) for cell in self._children.values()]
        return [(cell.prefix, cell.value) for cell in self._children.values()]


class Histogram:
    """A family of distributions under one name. `bounds` rise and leave out infinity."""

    __slots__ = ("_bounds", "_children", "_labels", "_name", "header")

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self.header = _header(name, text, "histogram")
        self._name = name
        self._labels = labels
        self._bounds = tuple(bounds)
        self._children: dict[tuple[str, ...], Distribution] = {}

    def child(self, *values: str) -> Distribution:
        cell = self._children.get(values)
        if cell is None:
            cell = self._children[values] = Distribution(self._prefixes(values), self._bounds)
        return cell

    def _prefixes(self, values: tuple[str, ...]) -> tuple[str, ...]:
        names = (*self._labels, "le")
        edges = [str(bound) for bound in self._bounds] + ["+Inf"]
        buckets = [_series(f"{self._name}_bucket", names, (*values, edge)) for edge in edges]
        rest = [_series(f"{self._name}_{part}", self._labels, values) for part in ("sum", "count")]
        return (*buckets, *rest)

    def __len__(self) -> int:
        return len(self._children) * (len(self._bounds) + 3)

    def copy(self) -> list[tuple[tuple[str, ...], list[int], float]]:
        return [(cell.prefixes, cell.counts.copy(), cell.sum) for cell in self._children.values()]


class Reading:
    """One value that somebody else owns, read at each scrape. `kind` is `gauge` or `counter`."""

    __slots__ = ("_prefix", "_read", "header")

    def __init__(self, name: str, text: str, kind: str, read: Callable[[], float], **labels: str) -> None:
        self.header = _header(name, text, kind)
        self._prefix = _series(name, tuple(labels), tuple(labels.values()))
        self._read = read

    def copy(self) -> list[tuple[str, float]]:
        return [(self._prefix, self._read())]


class Gauge:
    """A family of values that somebody else owns, and hands over as a whole before each scrape."""

    __slots__ = ("_labels", "_name", "_rows", "header")

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self.header = _header(name, text, "gauge")
        self._name = name
        self._labels = labels
        self._rows: list[tuple[str, float]] = []

    def replace(self, values: Mapping[tuple[str, ...], float]) -> None:
        self._rows = [(_series(self._name, self._labels, key), value) for key, value in values.items()]

    def copy(self) -> list[tuple[str, float]]:
        return self._rows


class Snapshot:
    """The numbers of one moment. `render` may run in any thread."""

    __slots__ = ("_plain", "_shaped")

    def __init__(self, plain: Sequence[Counter | Reading | Gauge], shaped: Sequence[Histogram]) -> None:
        self._plain = [(family.header, family.copy()) for family in plain]
        self._shaped = [(family.header, family.copy()) for family in shaped]

    def render(self) -> str:
        lines: list[str] = []
        for header, rows in self._plain:
            lines.append(header)
            lines.extend([f"{prefix}{value}\n" for prefix, value in rows])
        for header, children in self._shaped:
            lines.append(header)
            for prefixes, counts, total in children:
                running = list(accumulate(counts))
                values = (*running, total, running[-1])
                lines.extend([f"{prefix}{value}\n" for prefix, value in zip(prefixes, values, strict=True)])
        return "".join(lines)


def _header(name: str, text: str, kind: str) -> str:
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def _series(name: str, labels: Sequence[str], values: Sequence[str]) -> str:
    if not labels:
        return f"{name} "
    pairs = ",".join([f'{label}="{_escape(value)}"' for label, value in zip(labels, values, strict=True)])
    return f"{name}{{{pairs}}} "


def _escape(value: str) -> str:
    """As the format wants it; a lone surrogate, which UTF-8 cannot carry, becomes a question mark."""
    value = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return value if value.isprintable() else value.encode("utf-8", "replace").decode()
