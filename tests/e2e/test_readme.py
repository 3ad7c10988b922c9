"""The README's example of a shared budget: its commands as they stand there, and the answer that it promises.

Only what belongs to the machine is put in place: where the command lies, and which ports are free.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.stack import BREAKWATER
from tests.redis_server import Unavailable, binary, free_port

README = (Path(__file__).parents[2] / "README.md").read_text()
HEADING = "## Two processes, one budget\n"


def blocks() -> tuple[str, str]:
    """The commands, and what is said of their last answer."""
    _, _, section = README.partition(HEADING)
    found = re.findall(r"^```(sh|)\n(.*?)^```$", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    (sh, commands), (plain, answer) = found
    assert (sh, plain) == ("sh", "")
    return commands, answer


def on_this_machine(commands: str) -> str:
    ports = sorted(set(re.findall(r"\b(?:6399|808\d)\b", commands)))
    assert ports == ["6399", "8081", "8082"]
    taken: set[int] = set()
    for port in ports:
        while (free := free_port()) in taken:
            pass
        taken.add(free)
        commands = commands.replace(port, str(free))
    return commands.replace(".venv/bin/breakwater", str(BREAKWATER))


def test_two_processes_share_one_budget(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl, which the README uses, is not here")
    try:
        (tmp_path / "redis-server").symlink_to(binary())
    except Unavailable as reason:
        pytest.skip(str(reason))
    commands, promised = blocks()
    shell = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", on_this_machine(commands)],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "BREAKWATER_LISTEN__DRAIN_MS": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, error = shell.communicate(timeout=90)  # all that it started has our pipes: they have ended too
    finally:
        try:
            os.killpg(shell.pid, signal.SIGKILL)  # after a failure: what it started and did not end
        except ProcessLookupError:
            pass
    logs = "".join((tmp_path / name).read_text() for name in ("one.log", "two.log"))
    first, second, third = out.splitlines()
    assert shell.returncode == 0, error + logs
    for answer in (first, second):
        assert answer.startswith('{"id":"chatcmpl-'), logs
    assert third == promised.rstrip("\n")
    events = [json.loads(line) for line in (tmp_path / "two.log").read_text().splitlines()]
    (refused,) = [event for event in events if event["event"] == "budget.refused"]
    assert (refused["window"], refused["mode"]) == ("usd_per_day", "enforce")
