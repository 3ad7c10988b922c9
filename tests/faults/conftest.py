"""What the campaigns measured goes into the report of their test, and from there into the summary of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.faults.fleet import reporting
from tests.redis_server import redis_binary

__all__ = ["redis_binary"]  # a fixture, found here by pytest


@pytest.fixture(autouse=True)
def _figures(record_property: Callable[[str, object], None]) -> Iterator[None]:
    with reporting(lambda line: record_property("figure", line)):
        yield
