"""The Dockerfile, as far as it can be judged without building it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from proxy.cli.health import DEFAULT_URL, parse
from tests.e2e.stack import BREAKWATER

ROOT = Path(__file__).resolve().parents[2]


class Instruction(NamedTuple):
    name: str
    text: str


def instructions(text: str) -> list[Instruction]:
    """Each on one line, without comments."""
    lines = "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


ALL = instructions((ROOT / "Dockerfile").read_text())
STARTS = [index for index, one in enumerate(ALL) if one.name == "FROM"]
FINAL = ALL[STARTS[-1] :]


def last(name: str) -> str:
    return next(one.text for one in reversed(FINAL) if one.name == name)


def kept(path: str, patterns: list[str]) -> bool:
    """Whether a .dockerignore lets a path at the top in: its last matching line decides."""
    result = True
    for pattern in patterns:
        if pattern.lstrip("!") in ("*", path):
            result = pattern.startswith("!")
    return result


def copied() -> list[str]:
    """The sources that come from the repository."""
    texts = [one.text for one in ALL if one.name == "COPY" and "--from=" not in one.text]
    return [source for text in texts for source in text.split()[:-1]]


def test_there_are_two_stages_on_the_same_named_version() -> None:
    bases = [ALL[index].text.split()[0] for index in STARTS]
    assert len(bases) == 2
    assert len(set(bases)) == 1, "the environment is a virtual one: it needs the interpreter that it was made with"
    assert re.fullmatch(r"python:3\.1[1-9]-slim-[a-z]+", bases[0])


def test_what_is_copied_is_there_and_not_ignored() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and line[0] != "#"]
    assert patterns[0] == "*", "what is not named stays out"
    sources = copied()
    assert {"requirements.lock", "pyproject.toml", "proxy"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert kept(source, patterns), f"{source} is kept out by .dockerignore"
    assert {line[1:] for line in patterns if line.startswith("!")} == set(sources), "nothing else gets in"


def test_the_build_needs_all_that_the_project_names() -> None:
    """What pyproject.toml reads while a wheel is built."""
    named = re.findall(r'^(?:readme = |license-files = \[)"([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert sorted(named) == ["LICENSE", "README.md"]
    assert set(named) <= set(copied())


def test_everything_is_installed_under_its_hash_and_nothing_is_compiled() -> None:
    install = next(one.text for one in ALL if "requirements.lock" in one.text and one.name == "RUN")
    assert {"--require-hashes", "--only-binary"} <= set(install.split())
    assert not [one for one in ALL if re.search(r"\b(apt-get|gcc|make|curl|wget)\b", one.text)]
    assert not [one for one in FINAL if one.name == "RUN"], "the second stage only takes what the first has made"


def test_it_runs_as_a_number_that_is_not_root() -> None:
    user, _, group = last("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_signals_reach_the_process() -> None:
    assert last("STOPSIGNAL") == "SIGTERM"
    assert json.loads(last("ENTRYPOINT")) == ["breakwater"]
    assert isinstance(json.loads(last("CMD")), list)


def test_the_commands_are_ours() -> None:
    command = json.loads(last("CMD"))
    options = {word for word in command if word.startswith("-")}
    done = subprocess.run([BREAKWATER, command[0], "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert options <= set(re.findall(r"(?<!\S)--?[a-z-]+", done.stdout))
    health = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    assert health[:2] == ["breakwater", "health"]
    assert subprocess.run([*[BREAKWATER], *health[1:], "--help"], capture_output=True, timeout=60).returncode == 0


def test_the_probe_asks_where_the_image_listens() -> None:
    command = json.loads(last("CMD"))
    port = command[command.index("--port") + 1]
    assert parse(DEFAULT_URL) == ("127.0.0.1", int(port))
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert last("EXPOSE") == port


@pytest.mark.parametrize(("path", "expected"), [("proxy", True), (".env", False), ("tests", False)])
def test_the_patterns_are_read_as_meant(path: str, expected: bool) -> None:
    assert kept(path, ["*", "!proxy", "!LICENSE"]) is expected
