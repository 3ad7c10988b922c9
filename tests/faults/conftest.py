from __future__ import annotations

from tests.redis_server import redis_binary

__all__ = ["redis_binary"]  # a fixture, found here by pytest
