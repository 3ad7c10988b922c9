from __future__ import annotations

from tests.redis_server import redis_binary, redis_server

__all__ = ["redis_binary", "redis_server"]  # fixtures, found here by pytest
