"""The picture says what the series says."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.faults.plot import Frame, main, svg

ROWS = [
    {"strategy": name, "window": 1000, "turn": turn, "client": 100 * turn, "upstream": sent, "cut": cut}
    for name in ("oldest", "per-turn", "masked")
    for turn in range(31)
    for sent, cut in [(100 * turn if turn <= 10 else 700 + 100 * (turn % 3), turn > 10 and turn % 3 == 0)]
]


def paths(picture: str, kind: str) -> list[str]:
    root = ElementTree.fromstring(picture)
    return [each.get("d", "") for each in root.iter() if each.get("class") == kind and each.tag.endswith("path")]


def test_the_lines_are_those_of_the_series() -> None:
    picture = svg(ROWS, 20)
    frame = Frame(20, 1333)
    sent, legend = paths(picture, "upstream")
    assert sent == frame.path((row["turn"], row["upstream"]) for row in ROWS[:21])
    assert legend.count(" ") == 1
    assert len(paths(picture, "cut")) == 3  # 12, 15, 18
    client = paths(picture, "client")[0].split(" ")
    assert len(client) == 15  # up to the edge of the paper, between two turns
    assert float(client[-1].split(",")[1]) == frame.y(1333)
    assert "sent by the client (at turn 30: 3,000)" in picture
    assert "tokens of the prompt" in picture
    assert "prefers-color-scheme: dark" in picture


def test_a_series_without_what_is_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="per-turn"):
        svg([row for row in ROWS if row["strategy"] == "oldest"])


def test_the_command_writes_the_file(tmp_path: Path) -> None:
    series, target = tmp_path / "series.jsonl", tmp_path / "picture.svg"
    series.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    main([str(series), str(target), "20"])
    assert target.read_text() == svg(ROWS, 20)
