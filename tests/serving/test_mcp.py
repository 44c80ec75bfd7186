"""`photon serve --mcp` as a program sees it: the SDK's own client starts it, and talks to it over stdin and stdout."""

import asyncio
import base64
import io
import os
import sys
from contextlib import asynccontextmanager

import pytest
from live import COARSE
from PIL import Image
from raw import write_scan

mcp = pytest.importorskip("mcp")
COMMAND = "from photon_cli.photon import main; main()"


@asynccontextmanager
async def talking_to(model_dir, scans, *more):
    words = ["serve", "--model", str(model_dir), "--mcp", str(scans), *(f"--set={one}" for one in COARSE), *more]
    command = mcp.StdioServerParameters(command=sys.executable, args=["-c", COMMAND, *words], env=dict(os.environ))
    async with mcp.Client(command, read_timeout_seconds=120) as client:
        yield client


async def said(client, tool, **given):
    """Whether a tool failed, and its texts."""
    result = await client.call_tool(tool, given)
    return result.is_error, "".join(part.text for part in result.content if part.type == "text")


@pytest.mark.slow
def test_a_program_prepares_asks_and_shows_and_reads_only_scans_of_its_folder(model_dir, prepared, tmp_path):
    scans, outside = tmp_path / "scans", tmp_path / "outside"
    (scans / "deep").mkdir(parents=True)
    outside.mkdir()
    inside, other = write_scan(scans / "deep" / "one.nii.gz"), write_scan(outside / "secret.nii.gz")
    (scans / "link.nii.gz").symlink_to(other)
    (scans / "linked").symlink_to(outside)
    (scans / "broken.nii.gz").write_bytes(inside.read_bytes()[:3000])

    async def talk():
        async with talking_to(model_dir, scans, "--data", str(prepared.out), "--max-upload-gb=0.1") as client:
            assert [tool.name for tool in (await client.list_tools()).tools] == ["prepare", "ask", "show"]
            assert "v0, v1, v2" in client.instructions
            ids = []
            for name in ("deep/one.nii.gz", str(inside), "deep"):
                made = await client.call_tool("prepare", {"scan": name})
                assert not made.is_error, made
                ids.append(made.structured_content["id"])
            assert len(set(ids)) == 3
            answers = []
            for volume in (*ids, "v1"):
                asked = await client.call_tool("ask", {"volume": volume, "question": "Is there a nodule?"})
                assert not asked.is_error and asked.structured_content["kept_tokens"] > 0
                answers.append(asked.structured_content)
            assert len({one["answer"] for one in answers[:3]}) == 1 and answers[0]["answer"] != answers[3]["answer"]
            shown = await client.call_tool("show", {"volume": ids[0], "answer": answers[0]["id"]})
            (part,) = shown.content
            assert Image.open(io.BytesIO(base64.b64decode(part.data))).format == "PNG"
            for scan in (str(other), "../outside/secret.nii.gz", "link.nii.gz", "linked", "/etc/passwd", "none", ".."):
                failed, text = await said(client, "prepare", scan=scan)
                assert failed and "none of that name" in text and str(tmp_path) not in text, (scan, text)
            refused = [
                await said(client, "prepare", scan="broken.nii.gz"),
                await said(client, "ask", volume="vol_none", question="?"),
                await said(client, "ask", volume=prepared.places[0], question="?"),
                await said(client, "show", volume=ids[0], answer="none"),
            ]
            for failed, text in refused:
                assert failed and "expected" in text and "found" in text and str(tmp_path) not in text, text

    asyncio.run(talk())
