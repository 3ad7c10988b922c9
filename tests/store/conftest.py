from __future__ import annotations

import pytest

from tests.conformance.stores import Clock
from tests.redis_server import redis_binary, redis_server

__all__ = ["redis_binary", "redis_server"]  # fixtures, found here by pytest


@pytest.fixture
def clock() -> Clock:
    return Clock()
