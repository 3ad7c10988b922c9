from __future__ import annotations

import pytest

from tests.conformance.stores import Clock, Driver, Make, make_memory, make_redis
from tests.redis_server import redis_binary, redis_server

__all__ = ["redis_binary", "redis_server"]  # fixtures, found here by pytest


@pytest.fixture(params=["memory", "redis"])
def make(request: pytest.FixtureRequest) -> Make:
    if request.param == "memory":
        return make_memory
    return make_redis(request.getfixturevalue("redis_server").url)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def drive():
    driver = Driver()
    yield driver
    driver.close()
