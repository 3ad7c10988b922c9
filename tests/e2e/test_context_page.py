"""The conversation that grows in docs/context.md: its commands as they stand there, and the lines that it promises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.stack import BREAKWATER
from tests.redis_server import free_port

PAGE = (Path(__file__).parents[2] / "docs" / "context.md").read_text()


def test_a_conversation_that_grows_is_cut_as_the_page_says(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl, which the page uses, is not here")
    section = PAGE.partition("## See it\n")[2].partition("\n## ")[0]
    (sh, commands), (plain, promised) = re.findall(r"^```(sh|)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert (sh, plain) == ("sh", "")
    commands = commands.replace("8083", str(free_port()))
    commands = commands.replace(".venv/bin/breakwater", str(BREAKWATER)).replace(".venv/bin/python", sys.executable)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env={**os.environ, "BREAKWATER_LISTEN__DRAIN_MS": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == promised
