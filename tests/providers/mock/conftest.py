"""Servers that end with the module that started them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mock_wire import Running, words

from proxy.providers.mock.handler import Mock


@pytest.fixture(scope="module")
def running() -> Iterator[Callable[..., Running]]:
    """Starts servers: `running(slow_ms=10)`; the arguments are Mock's."""
    started: list[Running] = []

    def start(**options: Any) -> Running:
        one = Running(Mock(words, **options))
        started.append(one)
        return one

    yield start
    for one in started:
        one.stop()
