"""The page of `photon serve`: files of the package, as they are. What it shows, its scripts ask the API for."""

from __future__ import annotations

from pathlib import Path

from fastapi.responses import Response

from photon_pipelines.serving.gate import ApiError

FOLDER = Path(__file__).with_name("static")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# NiiVue keeps its font in a data: URL. Nothing is inline, and nothing comes from elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Page:
    """The files of the page, read once."""

    def __init__(self) -> None:
        self._files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}

    async def show(self) -> Response:
        """Return the page."""
        return self._response("index.html", {"content-security-policy": POLICY})

    async def file(self, name: str) -> Response:
        """Return a file of it."""
        if name not in self._files:
            remedy = "; make viewer builds it" if name == "niivue.js" else ""
            raise ApiError(404, f"expected a file of the page, found none of this name{remedy}", "not_found")
        return self._response(name)

    def _response(self, name: str, headers: dict[str, str] | None = None) -> Response:
        return Response(self._files[name], 200, headers, TYPES[Path(name).suffix])
