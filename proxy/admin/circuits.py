"""Circuits by hand: what they are, and opening or resetting one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, ValidationError

from proxy.errors import InvalidRequest, NotFound

Row = dict[str, Any]


class Command(BaseModel):
    """What to do with a circuit."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["open", "reset"]
    """open: nothing is sent there until a reset. reset: closed, and what led there is forgotten."""


def add_circuits(
    app: FastAPI,
    *,
    shown: Callable[[], list[Row]],
    command: Callable[[str, str, Literal["open", "reset"]], Awaitable[Row]],
    known: Callable[[str, str], bool],
) -> None:
    """`known`: whether a provider and model of these names are configured."""

    @app.get("/admin/circuits")
    async def circuits() -> list[Row]:
        """Every circuit that this process has met, with its evidence, its votes and its probe."""
        return shown()

    @app.post(
        "/admin/circuits/{provider}/{model:path}",
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": Command.model_json_schema()}}}
        },
    )
    async def by_hand(provider: str, model: str, request: Request) -> Row:
        """Opens or resets a circuit, in the whole fleet (`fleet`: false while the store is away: here alone)."""
        if not known(provider, model):
            raise NotFound("No circuit has this provider and model: both are named as in the configuration.")
        try:
            wanted = Command.model_validate_json(await request.body())
        except ValidationError:
            raise InvalidRequest('The body is {"action": "open"} or {"action": "reset"}.', param="action") from None
        return await command(provider, model, wanted.action)
