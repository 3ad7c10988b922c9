"""What every test can ask for."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Async tests (`pytestmark = pytest.mark.anyio`) run on the loop that the program runs on."""
    return "asyncio", {"use_uvloop": True}
