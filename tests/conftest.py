"""What every test can ask for, and what every report goes through."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Async tests (`pytestmark = pytest.mark.anyio`) run on the loop that the program runs on."""
    return "asyncio", {"use_uvloop": True}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tests log hostile text, and a report with half a surrogate pair cannot travel between processes."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the campaigns of `make faults` measured, in one place: promise, number, observed, bound."""
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, ())]
    figures = [str(line) for each in reports for name, line in each.user_properties if name == "figure"]
    if figures and os.environ.get("BREAKWATER_FAULTS"):
        terminalreporter.section("figures")
        for line in figures:
            terminalreporter.write_line(line)
