"""The command line inside the process of the test, for what it refuses: a new process each would be all that it costs.

That a command is one of the installed script, and what a process of its own does, is tested with processes.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

from proxy.cli import main


def inside(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`breakwater` with `arguments`: exit code, stdout, stderr. What the command does not catch is raised."""
    words = [str(word) for word in arguments]
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["breakwater", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _exit_code()
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def _exit_code() -> int:
    try:
        main()
    except SystemExit as done:
        return int(done.code or 0)
    return 0
