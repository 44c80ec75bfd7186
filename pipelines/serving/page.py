"""A plain page to try the server with: upload a scan, ask, see the answer and what was kept. Forms, and no scripts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs

from fastapi import Request
from fastapi.responses import RedirectResponse, Response

from photon_data.errors import Refused
from photon_data.report.page import render
from photon_pipelines.serving.gate import CLIENT_GONE, ApiError
from photon_pipelines.serving.volumes import Stored, UnknownVolume, Volumes

TEMPLATE = Path(__file__).with_name("page.html.j2")
STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
form { margin: 1rem 0; } input[type=text] { width: 60%; } img { width: 100%; }
.problem { border-left: .3rem solid #b00; padding-left: 1rem; } .answer { font-size: 1.2rem; white-space: pre-wrap; }"""
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; img-src 'self'; form-action 'self'; frame-ancestors 'none'"
)
SHOWN = 200  # volumes


class Behind(Protocol):
    """What the page needs of the server."""

    volumes: Volumes
    settings: Any

    async def take_in(self, request: Request) -> Stored:
        """Return the volume that an upload has become."""

    async def answer(self, body: bytes, request: Request) -> dict[str, Any] | None:
        """Return the answer to a conversation; None where the client has gone."""


class Page:
    """The page, and what its two forms do."""

    def __init__(self, server: Behind) -> None:
        self.server = server

    async def show(self, request: Request) -> Response:
        """Return the page, with a volume chosen."""
        return self._page({"chosen": request.query_params.get("volume", "")})

    async def upload(self, request: Request) -> Response:
        """Take a scan in, and lead back to the page; with a sentence where it was refused."""
        try:
            volume = await self.server.take_in(request)
        except (Refused, ApiError) as error:
            return self._page({"problem": str(error)}, 400)
        return RedirectResponse(f"/?volume={volume.id}", 303)

    async def ask(self, request: Request) -> Response:
        """Return the page with the answer to a question, or with a sentence that says why there is none."""
        form = {name: values[0] for name, values in parse_qs((await request.body()).decode("utf-8", "replace")).items()}
        chosen, question = form.get("volume", ""), form.get("question", "")
        shown = {"chosen": chosen, "question": question}
        parts = [{"type": "volume", "volume": chosen}, {"type": "text", "text": question}]
        body = {"model": self.server.settings.model, "messages": [{"role": "user", "content": parts}]}
        try:
            answer = await self.server.answer(json.dumps(body).encode(), request)
        except (UnknownVolume, ApiError) as error:
            return self._page({**shown, "problem": str(error)}, getattr(error, "status", 404))
        if answer is None:
            return Response(status_code=CLIENT_GONE)
        more = {"answer": answer["choices"][0]["message"]["content"], **answer["photon"]}
        return self._page({**shown, **more})

    def _page(self, values: Mapping[str, Any], status: int = 200) -> Response:
        ids = self.server.volumes.ids()
        usual: dict[str, Any] = {
            "chosen": "",
            "question": "",
            "problem": "",
            "answer": None,
            "kept": [],
            "kept_tokens": 0,
        }
        about = {"model": self.server.settings.model, "volumes": ids[:SHOWN], "more": max(0, len(ids) - SHOWN)}
        content = render(TEMPLATE, {**usual, "visual_tokens": 0, "style": STYLE, **about, **values}, {})
        return Response(content, status, {"content-security-policy": POLICY}, "text/html; charset=utf-8")
