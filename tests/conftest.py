"""What every test can ask for, and what every report goes through."""

from __future__ import annotations

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
