"""The server's three verbs as tools of the Model Context Protocol, for a program that talks over stdin and stdout.

prepare a scan -> a volume; ask about it -> an answer; show what the answer was made from -> a picture

Each is what a route of app.py does, within the same limits. A failure that is nobody's fault here comes back as its
sentence; of any other, the SDK tells the client nothing but that there was one.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import Request
from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from photon_data.errors import Refused, first_few
from photon_pipelines.serving.app import Server
from photon_pipelines.serving.gate import ApiError
from photon_pipelines.serving.upload import place_for, too_large, too_many
from photon_pipelines.serving.volumes import UnknownVolume

INTRODUCTION = "Ask a CT scan questions: prepare it once, ask about the volume, show what an answer was made from."


class Tools:
    """The tools. `scans` is the one folder that `prepare` reads from."""

    def __init__(self, server: Server, scans: Path) -> None:
        self.server, self.scans = server, scans.resolve()

    def protocol(self) -> MCPServer:
        """Return what speaks the protocol."""
        ids = self.server.volumes.ids()
        there = f" Volumes that are prepared already: {first_few(ids, 20)}." if ids else ""
        protocol = MCPServer("photon", instructions=INTRODUCTION + there)
        for tool in (self.prepare, self.ask, self.show):
            protocol.add_tool(tool)
        return protocol

    async def prepare(self, scan: str, series: str = "") -> dict[str, Any]:
        """Prepare a CT scan: a file (NIfTI, NRRD, MetaImage, DICOM, zip) or a folder of DICOM, by its path.

        Only scans in the folder that the server was given can be read. Where a folder has several series, say which.
        Returns the volume: its id, its grids in LPS mm, and what was cut off.
        """
        volumes = self.server.volumes
        with _sentences():
            with volumes.incoming() as folder:
                async with self.server.preparing:
                    await asyncio.to_thread(self._copy, scan, folder)
                    volume = await asyncio.to_thread(volumes.take_in, folder, series)
            return _read(await self.server.one_volume(volume.id))

    async def ask(self, volume: str, question: str) -> dict[str, Any]:
        """Ask a question about a volume, by its id.

        Returns the answer, the answer's id for `show`, and how many of the volume's visual tokens it was made from.
        """
        content = [{"type": "volume", "volume": volume}, {"type": "text", "text": question}]
        body = {"model": self.server.settings.model, "messages": [{"role": "user", "content": content}]}
        with _sentences():
            found = _read(await self.server.chat(_request(json.dumps(body).encode())))
        photon = {name: found["photon"][name] for name in ("visual_tokens", "kept_tokens")}
        return {"id": found["id"], "volume": volume, "answer": found["choices"][0]["message"]["content"], **photon}

    async def show(self, volume: str, answer: str) -> Image:
        """Show which regions of the volume an answer was made from, by the answer's id: three planes, them outlined."""
        with _sentences():
            response = await self.server.kept_tokens(volume, answer, _request(query=b"format=png"))
        return Image(data=bytes(response.body), format="png")

    def _copy(self, scan: str, folder: Path) -> None:
        """Copy the files of a scan into `folder`, but for links that lead out of our folder. Refused, ToolError."""
        place, limits = (self.scans / scan).resolve(), self.server.volumes.intake.limits
        found = [place] if place.is_file() else sorted(place.rglob("*")) if place.is_relative_to(self.scans) else []
        files = [path for path in found if path.is_file() and path.resolve().is_relative_to(self.scans)]
        if not files:
            raise ToolError("expected a file or folder in the folder of scans, found none of that name; see --mcp")
        if len(files) > limits.files:
            raise too_many(limits)
        if sum(path.stat().st_size for path in files) > limits.bytes:
            raise too_large(limits)
        for number, path in enumerate(files, start=1):
            shutil.copyfile(path, place_for(folder, path.name, number))


@contextmanager
def _sentences() -> Iterator[None]:
    """Raise what a client can do something about as the SDK's error, which it is told of."""
    try:
        yield
    except Refused as refused:
        raise ToolError(refused.message) from None
    except (ApiError, UnknownVolume) as error:
        raise ToolError(str(error)) from None


def _request(body: bytes = b"", query: bytes = b"") -> Request:
    """Return a request as a route gets it, of a client that does not go away."""
    events = iter([{"type": "http.request", "body": body}])

    async def receive() -> dict[str, Any]:
        for event in events:
            return event
        return await asyncio.Future()

    return Request({"type": "http", "method": "POST", "headers": [], "query_string": query}, receive)


def _read(response: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(response.body)
    return found
