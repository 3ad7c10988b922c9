"""The administration's JSON API, and its description at `/admin/openapi.json`.

It is reached only with an admin key; the edge has checked that before this application is even imported.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from proxy import __version__
from proxy.errors import InternalError, InvalidRequest, MethodNotAllowed, NotFound, ProxyError, envelope


class Status(BaseModel):
    """The state of this process."""

    version: str
    config_hash: str
    """Names the effective configuration; secrets do not enter."""
    uptime_seconds: float
    in_flight: int
    """Requests being served now."""


Document = dict[str, Any]
Rows = list[dict[str, Any]]


def create_admin(
    *,
    config_hash: str,
    effective: Callable[[], dict[str, Any]],
    in_flight: Callable[[], int],
    budgets: Callable[[str | None], Awaitable[Rows]],
    usage: Callable[[str, str], Awaitable[Document]],
    usage_csv: Callable[[Document], str],
    more: Iterable[Callable[[FastAPI], None]] = (),
) -> FastAPI:
    """`more`: add further routes. `effective` gives the configuration in force, secrets masked.

    `budgets`: the figures of all scopes, or of a tenant's. `usage`: what was used since a span of time, by a list of
    dimensions; it raises InvalidRequest."""
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

    _add_budgets(app, budgets, usage, usage_csv)
    for add in more:
        add(app)
    _add_errors(app)
    return app


def _add_budgets(
    app: FastAPI,
    budgets: Callable[[str | None], Awaitable[Rows]],
    usage: Callable[[str, str], Awaitable[Document]],
    usage_csv: Callable[[Document], str],
) -> None:
    @app.get("/admin/budgets")
    async def all_budgets() -> Rows:
        """What every scope has spent and reserved of each window, and by how much it can be overshot."""
        return await budgets(None)

    @app.get("/admin/budgets/{tenant}")
    async def budgets_of(tenant: str) -> Rows:
        """The same of one tenant and its keys."""
        found = await budgets(tenant)
        if not found:
            raise NotFound("No tenant of this name is configured, or has asked for anything yet.")
        return found

    @app.get("/admin/usage", response_model=None)
    async def used(
        since: str = "24h", by: str = "tenant,model", form: Annotated[str, Query(alias="format")] = "json"
    ) -> Document | Response:
        """Requests, tokens and cost in whole hours since then (30m, 24h, 7d), by a list of dimensions: tenant, key,
        model, provider, tags, quality. The format is json or csv."""
        if form not in ("json", "csv"):
            raise InvalidRequest("format is json or csv.", param="format")
        found = await usage(since, by)
        return found if form == "json" else Response(usage_csv(found), media_type="text/csv; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ProxyError)
    async def as_it_says(request: Request, error: ProxyError) -> Response:
        headers = {name.decode(): value.decode() for name, value in error.headers}
        return Response(envelope(error), error.status, headers, media_type="application/json")

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
