"""The official client in its two forms, so that one test holds for both."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import httpx2
from openai import AsyncOpenAI, OpenAI, Stream

from tests import clear

KINDS = ("sync", "async")


class Sdk:
    """One official client. `call("chat.completions.create", …)` is `client.chat.completions.create(…)`."""

    def __init__(self, kind: str, base_url: str, api_key: str = "sk-anything", **options: Any) -> None:
        self.kind = kind
        options = {"max_retries": 0, "timeout": 30, **options}
        self._runner = asyncio.Runner() if kind == "async" else None
        if self._runner is None:
            self._client: Any = OpenAI(base_url=base_url, api_key=api_key, **options, http_client=clear.client())
        else:
            self._client = self._run(
                _made(
                    lambda: AsyncOpenAI(base_url=base_url, api_key=api_key, **options, http_client=clear.async_client())
                )
            )

    def _run(self, awaitable: Any) -> Any:
        assert self._runner is not None
        return self._runner.run(awaitable)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """What the method returns; of a stream, the list of all that it yields."""
        bound = attrgetter(method)(self._client)
        if self._runner is not None:
            return self._run(_whole(bound, arguments, options))
        result = bound(*arguments, **options)
        return list(result) if isinstance(result, Stream) else result

    def altered(self, **options: Any) -> Sdk:
        """The same client with other options. It shares the connections, and is closed with this one."""
        other = Sdk.__new__(Sdk)
        other.kind = self.kind
        other._runner = self._runner
        other._client = self._client.with_options(**options)
        return other

    def get(self, path: str) -> httpx2.Response:
        """A path that the client has no method for."""
        answer: httpx2.Response = self.call("get", path, cast_to=httpx2.Response)
        return answer

    def close(self) -> None:
        if self._runner is None:
            self._client.close()
        else:
            self._run(self._client.close())
            self._runner.close()

    def __enter__(self) -> Sdk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _made(make: Callable[[], Any]) -> Any:
    return make()


async def _whole(method: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    result = method(*arguments, **options)
    if hasattr(result, "__await__"):
        result = await result
    return [item async for item in result] if hasattr(result, "__aiter__") else result
