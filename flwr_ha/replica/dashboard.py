"""The pages of a replica: the dashboard and the page about the API, with all they need."""

from __future__ import annotations

import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".svg": "image/svg+xml",
}
_PAGES = {"/": "dashboard.html", "/docs": "docs.html"}


def page_routes() -> list[Route]:
    """Return the routes of the pages and of the files that they load; all is read once, here."""
    folder = resources.files("flwr_ha.replica") / "static"
    files = {entry.name: entry.read_bytes() for entry in folder.iterdir() if _suffix(entry.name) in _TYPES}
    table = {**_PAGES, **{f"/static/{name}": name for name in files if not name.endswith(".html")}}
    return [_route(path, name, files[name]) for path, name in table.items()]


def _route(path: str, name: str, content: bytes) -> Route:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}  # a browser asks again, and mostly gets 304

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=_TYPES[_suffix(name)])

    return Route(path, endpoint, methods=["GET"], name=name)


def _suffix(name: str) -> str:
    return name[name.rindex(".") :] if "." in name else ""
