"""The page's files: none of them is read from elsewhere, runs text or takes text for markup."""

import re
from pathlib import Path

import pytest

from photon_pipelines.serving.app import FOLDER

OURS = sorted(path for path in FOLDER.iterdir() if path.name not in ("niivue.js", "licences.txt"))


def test_the_page_and_its_files_are_there_and_nothing_else_is(served):
    page = served.http.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    for name in re.findall(r'(?:src|href)="/page/([^"]+)"', page.text):
        if (FOLDER / name).exists():
            assert served.http.get(f"/page/{name}").content == (FOLDER / name).read_bytes()
    for name in ("..%2Fapp.py", "%2Fetc%2Fpasswd", "app.py", "", ".", "%00", "static/page.js"):
        assert served.http.get(f"/page/{name}").status_code in (404, 307), name


def test_the_page_allows_its_own_files_only(served):
    policy = dict(
        part.strip().split(" ", 1) for part in served.http.get("/").headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["style-src"] == "'self'" and policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert served.http.get("/page/page.js").headers["content-security-policy"].startswith("default-src 'none'")


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_no_file_of_ours_names_another_site_or_takes_text_for_markup(path: Path):
    text = path.read_text()
    assert not re.search(r"(?<!xmlns=\")https?://|//cdn|@import|url\(", text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|setTimeout\([\"']", text
    )
    if path.suffix == ".html":
        assert not re.search(r"<style|\son\w+=|\sstyle=|javascript:|<script(?![^>]*\ssrc=)", text)
    assert len(text.splitlines()) <= 400
