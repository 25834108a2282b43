"""Headers that every answer of a replica carries: what a browser may do with it."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from flwr_ha.settings import Settings

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")


def api_origins(settings: Settings) -> tuple[str, ...]:
    """Return the web origins of the replicas' APIs; those on loopback under each of its names."""
    scheme = "https" if settings.tls.is_on else "http"
    origins: dict[str, None] = {}
    for replica in settings.replicas:
        origins[f"{scheme}://{replica.api}"] = None
        if replica.api.is_loopback:
            origins.update({f"{scheme}://{name}:{replica.api.port}": None for name in LOOPBACK_NAMES})
    return tuple(origins)


class BrowserHeaders:
    """Let pages of this cluster, and no others, read answers; let them load nothing from elsewhere.

    Only the origin of a replica is allowed to read what another replica answers to a simple GET, so that
    the dashboard goes on when the replica that it came from dies. There is no answer to a preflight:
    no page can send the secret across origins.

    Parameters
    ----------
    app : ASGIApp
        The API.
    origins : sequence of str
        See `api_origins`.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)
        reachable = " ".join(origin for origin in origins if "[" not in origin)  # the grammar has no IPv6 addresses
        self._policy = (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
            f"connect-src 'self' {reachable}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        origin = Headers(scope=scope).get("origin", "")

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = self._policy
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers.append("Vary", "Origin")
                if origin in self._origins:
                    headers["Access-Control-Allow-Origin"] = origin
            await send(message)

        await self._app(scope, receive, send_with_headers)
