"""The picture of a long session, from the series that the campaign writes:

    BREAKWATER_PLOT=series.jsonl make faults
    python -m tests.faults.plot series.jsonl docs/context.svg [TURNS]

Tokens by turn: what the client sent, what was sent upstream, and where the cut moved. Drawn by hand, so that it is
small, the same wherever it is made, and readable on light and dark pages.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

WIDTH: Final = 900
HEIGHT: Final = 430
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 64, 84
TURNS: Final = 400
"""Of the session that are drawn: more, and nobody can tell the cuts apart."""
STYLE: Final = """\
text { font: 13px system-ui, sans-serif; fill: #24292f; }
.axis { stroke: #57606a; stroke-width: 1; }
.grid { stroke: #8c959f; stroke-opacity: .3; stroke-width: 1; }
path { fill: none; stroke-linejoin: round; }
.client { stroke: #8250df; stroke-width: 2; stroke-dasharray: 2 4; }
.window { stroke: #cf222e; stroke-width: 1.5; stroke-dasharray: 8 5; }
.each { stroke: #bf8700; stroke-width: 1; }
.upstream { stroke: #0969da; stroke-width: 2; }
.cut { stroke: #0969da; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .axis { stroke: #9198a1; }
  .client { stroke: #ab7df8; }
  .window { stroke: #ff7b72; }
  .each { stroke: #d29922; }
  .upstream, .cut { stroke: #58a6ff; }
}
"""

Point = tuple[float, float]
Row = dict[str, Any]


class Frame:
    """Where a turn and a number of tokens are on the paper."""

    def __init__(self, turns: int, tokens: int) -> None:
        self.turns = turns
        self.tokens = tokens

    def x(self, turn: float) -> float:
        return round(LEFT + turn / self.turns * (WIDTH - LEFT - RIGHT), 1)

    def y(self, tokens: float) -> float:
        return round(HEIGHT - BOTTOM - tokens / self.tokens * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, points: Iterable[Point]) -> str:
        return "M" + " ".join(f"{self.x(turn):g},{self.y(tokens):g}" for turn, tokens in points)


def svg(rows: Sequence[Row], turns: int = TURNS) -> str:
    """`rows`: the lines of the series, with the strategies `oldest` and `per-turn` among them. Raises ValueError."""
    kept = [row for row in rows if row["turn"] <= turns]
    own = [row for row in kept if row["strategy"] == "oldest"]
    each = [row for row in kept if row["strategy"] == "per-turn"]
    if not own or not each:
        raise ValueError("the series lacks the strategy 'oldest' or 'per-turn'")
    window = int(own[0]["window"])
    last = max(row["turn"] for row in own)
    frame = Frame(last, window * 4 // 3)
    whole = max(row["client"] for row in rows)
    parts = [
        *_axes(frame),
        f'<path class="each" d="{frame.path((row["turn"], row["upstream"]) for row in each)}"/>',
        f'<path class="client" d="{frame.path(_below(own, frame.tokens))}"/>',
        f'<path class="window" d="{frame.path([(0, window), (last, window)])}"/>',
        f'<path class="upstream" d="{frame.path((row["turn"], row["upstream"]) for row in own)}"/>',
        *(_mark(frame, row["turn"]) for row in own if row["cut"]),
        *_legend(window, sum(row["cut"] for row in own), whole, max(row["turn"] for row in rows)),
    ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Tokens of each prompt of a long session, turn by turn">\n'
        f"<style>\n{STYLE}</style>\n{body}\n</svg>\n"
    )


def _below(rows: Sequence[Row], most: int) -> list[Point]:
    """The client's own line as far as there is paper for it."""
    points: list[Point] = []
    for row in rows:
        if row["client"] > most:
            (turn, tokens), more = points[-1], row["client"]
            points.append((turn + (row["turn"] - turn) * (most - tokens) / (more - tokens), most))
            break
        points.append((row["turn"], row["client"]))
    return points


def _axes(frame: Frame) -> list[str]:
    low, high = HEIGHT - BOTTOM, TOP
    parts = []
    step = _step(frame.tokens)
    for tokens in range(0, frame.tokens + 1, step):
        y = frame.y(tokens)
        parts.append(f'<path class="grid" d="M{LEFT},{y:g} {WIDTH - RIGHT},{y:g}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:g}" text-anchor="end">{tokens:,}</text>')
    for turn in range(0, frame.turns + 1, _step(frame.turns)):
        x = frame.x(turn)
        parts.append(f'<path class="axis" d="M{x:g},{low} {x:g},{low + 5}"/>')
        parts.append(f'<text x="{x:g}" y="{low + 20}" text-anchor="middle">{turn}</text>')
    middle = (low + high) / 2
    parts.append(f'<path class="axis" d="M{LEFT},{high} {LEFT},{low} {WIDTH - RIGHT},{low}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{low + 42}" text-anchor="middle">turn</text>')
    turned = f'transform="rotate(-90 18 {middle:g})"'
    parts.append(f'<text x="18" y="{middle:g}" text-anchor="middle" {turned}>tokens of the prompt</text>')
    return parts


def _step(most: int) -> int:
    """Between two labels of an axis: 1, 2 or 5 times a power of ten, and four to nine of them."""
    size = 1
    while True:
        for times in (1, 2, 5):
            if most // (size * times) < 10:
                return size * times
        size *= 10


def _mark(frame: Frame, turn: int) -> str:
    x, low = frame.x(turn), HEIGHT - BOTTOM
    return f'<path class="cut" d="M{x:g},{low} {x:g},{low - 9}"/>'


def _legend(window: int, cuts: int, whole: int, turns: int) -> list[str]:
    entries = (
        ("client", f"sent by the client (at turn {turns:,}: {whole:,})", 0, 0),
        ("window", f"window of the model ({window:,})", 0, 1),
        ("upstream", f"sent upstream, cut to 70 % (marks: {cuts} cuts)", 1, 0),
        ("each", "sent upstream, cut at every turn (trim_to: 1.0)", 1, 1),
    )
    parts = []
    for kind, text, column, line in entries:
        x, y = LEFT + column * 400, 20 + line * 22
        parts.append(f'<path class="{kind}" d="M{x},{y} {x + 34},{y}"/><text x="{x + 42}" y="{y + 4}">{text}</text>')
    return parts


def main(arguments: Sequence[str]) -> None:
    source, target, *more = arguments
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    Path(target).write_text(svg(rows, int(more[0]) if more else TURNS))


if __name__ == "__main__":
    main(sys.argv[1:])
