"""Keys that are made at run time, over the administration's API: made, listed, revoked, and given new secrets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response

from proxy.errors import InvalidRequest, RequestTooLarge

MAX_BODY_BYTES: Final = 65_536
_ONCE: Final = {"cache-control": "no-store"}
"""An answer with a secret in it is nobody's to keep."""


class Keys(Protocol):
    """Everything as JSON. Every verb raises ProxyError."""

    async def create(self, wanted: Mapping[str, Any]) -> dict[str, Any]: ...

    async def list(self, tenant: str | None) -> dict[str, Any]: ...

    async def revoke(self, key_id: str) -> dict[str, Any]: ...

    async def rotate(self, key_id: str, wanted: Mapping[str, Any]) -> dict[str, Any]: ...


def add_keys(app: FastAPI, keys: Keys) -> None:
    """Adds the routes. Bodies are read here and not by the framework, whose complaints have a shape of their own."""

    @app.post("/admin/keys", status_code=201)
    async def create(request: Request) -> Response:
        """Makes a key. JSON: `tenant`, and if wanted `name`, `expires` (90d), `models` (globs), `budget` (as in the
        configuration). The answer's `key` is the secret, which is shown this once."""
        made = await keys.create(await _read(request))
        return Response(orjson.dumps(made), 201, _ONCE, media_type="application/json")

    @app.get("/admin/keys")
    async def all_keys(tenant: str | None = None) -> dict[str, Any]:
        """All keys, or a tenant's, without their secrets; those that are over for a while too."""
        return await keys.list(tenant)

    @app.delete("/admin/keys/{key_id}")
    async def revoke(key_id: str) -> dict[str, Any]:
        """Ends a key for good. One that was revoked already stays so."""
        return await keys.revoke(key_id)

    @app.post("/admin/keys/{key_id}/rotate")
    async def rotate(key_id: str, request: Request) -> Response:
        """Gives a key a new secret. JSON, if wanted: `overlap` (24h), for which the secrets of before stay valid."""
        made = await keys.rotate(key_id, await _read(request))
        return Response(orjson.dumps(made), 200, _ONCE, media_type="application/json")


async def _read(request: Request) -> dict[str, Any]:
    """The members of the body; none of an empty one."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise RequestTooLarge(f"The body is larger than {MAX_BODY_BYTES} bytes.")
    try:
        found = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise InvalidRequest("The body is not JSON.", code="invalid_json") from error
    if not isinstance(found, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    return found
