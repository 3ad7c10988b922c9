"""The administration's JSON API, and its description at `/admin/openapi.json`.

It is reached only with an admin key; the edge has checked that before this application is even imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from proxy import __version__
from proxy.errors import InternalError, MethodNotAllowed, NotFound, envelope


class Status(BaseModel):
    """The state of this process."""

    version: str
    config_hash: str
    """Names the effective configuration; secrets do not enter."""
    uptime_seconds: float
    in_flight: int
    """Requests being served now."""


def create_admin(*, config_hash: str, effective: Callable[[], dict[str, Any]], in_flight: Callable[[], int]) -> FastAPI:
    """`effective` gives the configuration in force, secrets masked."""
    app = FastAPI(
        title="Breakwater administration",
        version=__version__,
        openapi_url="/admin/openapi.json",
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
    )
    app.router.redirect_slashes = False
    started = time.monotonic()

    @app.get("/admin/status")
    async def status() -> Status:
        """What runs here, and since when."""
        return Status(
            version=__version__,
            config_hash=config_hash,
            uptime_seconds=round(time.monotonic() - started, 1),
            in_flight=in_flight(),
        )

    @app.get("/admin/config")
    async def config() -> dict[str, Any]:
        """The effective configuration: every key with its value and where that came from, secrets masked."""
        return effective()

    @app.exception_handler(HTTPException)
    async def in_our_envelope(request: Request, error: HTTPException) -> Response:
        known = (
            MethodNotAllowed("This path takes another method.")
            if error.status_code == 405
            else NotFound("There is nothing here. /admin/openapi.json lists what there is.")
        )
        return Response(envelope(known), known.status, error.headers, media_type="application/json")

    @app.exception_handler(Exception)
    async def fault_of_ours(request: Request, error: Exception) -> Response:
        fault = InternalError()
        return Response(envelope(fault), fault.status, media_type="application/json")

    return app
