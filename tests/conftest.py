"""What every test can ask for, and what every report goes through."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from typing import Final

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

FAULTS: Final = "tests/faults/"


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Async tests (`pytestmark = pytest.mark.anyio`) run on the loop that the program runs on."""
    return "asyncio", {"use_uvloop": True}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several workers start with the files that hold slow tests, so that none is left alone with one at the end.

    First of all the faults, which are the longest of what one worker does: see `Files`.
    """
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (not item.nodeid.startswith(FAULTS), item.path not in slow))


def pytest_collection_finish() -> None:
    """What was imported stays: a collection that a test asks for need not look at it again, which takes 0.2 s."""
    gc.collect()
    gc.freeze()


class Files(LoadScopeScheduling):
    """Gives a worker a file at a time: what its tests share, such as a running process, is started once.

    The faults are one piece: they compare latencies, and two of them at once would compete for the processors.
    """

    def _split_scope(self, nodeid: str) -> str:
        return FAULTS if nodeid.startswith(FAULTS) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Files | None:
    if config.option.dist != "load":  # what `-n` alone means; who names another way gets that
        return None
    config.option.loadscopereorder = False  # else the files with the most tests would come first
    return Files(config, log)


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
