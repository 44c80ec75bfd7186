"""The plain page: what a person does with it, and that no name or text is taken for markup."""

import base64
import hashlib
import re

import pytest
from askable import store
from live import live
from raw import write_scan

from photon_data.files import Location
from photon_data.records import PREPARED, VolumeRecord, store_name, write_records

EVIL = "<script>alert('x')<script>"


@pytest.fixture(scope="module")
def served(model_dir, tmp_path_factory):
    """A server with a prepared volume whose id is markup."""
    out = tmp_path_factory.mktemp("prepared")
    store(out, EVIL, 0)
    write_records(Location(str(out)), [VolumeRecord(EVIL, "v", PREPARED, 0, 0, store=store_name(EVIL))])
    with live(model_dir, data=str(out)) as server:
        yield server


def test_a_person_uploads_asks_and_sees_what_was_kept(served, tmp_path):
    scan = write_scan(tmp_path / "Doe.nii.gz", 1, (30, 40, 44), (9.0, 7.0, 6.5))
    own = {"Origin": served.base, "Sec-Fetch-Site": "same-origin"}
    found = served.http.post("/upload", files={"file": ("Doe.nii.gz", scan.read_bytes())}, headers=own)
    assert found.status_code == 303
    place = found.headers["location"]
    id = place.removeprefix("/?volume=")
    assert f"<option selected>{id}</option>" in served.http.get(place).text
    page = served.http.post("/ask", data={"volume": id, "question": "Is there a nodule?"}, headers=own)
    assert page.status_code == 200 and "Is there a nodule?" in page.text
    assert re.search(r"\d+ of 125 visual tokens were kept", page.text)
    picture = served.http.get(re.search(r'<img src="([^"]+)"', page.text)[1])
    assert picture.headers["content-type"] == "image/png" and picture.content[:4] == b"\x89PNG"
    assert [served.http.get(link).status_code for link in re.findall(r'<a href="([^"]+)"', page.text)] == [200, 200]
    refused = served.http.post("/upload", files={"file": ("Doe.nii.gz", b"\x1f\x8bno")}, headers=own)
    assert refused.status_code == 400 and 'role="alert"' in refused.text and "Doe" not in refused.text


def test_no_header_name_or_text_is_taken_for_markup(served):
    asked = {"volume": EVIL, "question": f'"><img src=x onerror=alert(1)>{EVIL}'}
    pages = [
        served.http.get("/"),
        served.http.get("/", params={"volume": EVIL}),
        served.http.post("/ask", data=asked),
        served.http.post("/ask", data={**asked, "volume": f"x{EVIL}"}),
        served.http.post("/ask", data={**asked, "question": f"<video>{EVIL}"}),
        served.http.post("/ask", content=b"\xff&volume=%ff%00"),
        served.http.post("/upload", files={EVIL: (EVIL, b"no scan")}),
        served.http.get("/", headers={"Accept-Language": EVIL, "User-Agent": EVIL}),
    ]
    for page in pages:
        assert "<script" not in page.text and "onerror=alert" not in re.sub(
            "&[a-z#0-9]+;.*?&[a-z#0-9]+;", "", page.text
        )
        assert page.headers["content-type"].startswith("text/html")
    assert "&lt;script&gt;" in pages[0].text
    answer = served.answer(EVIL)
    assert served.http.get(answer["photon"]["kept"][0]).status_code == 200


def test_the_page_runs_nothing_and_its_style_is_the_one_that_is_allowed(served):
    page = served.http.get("/")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "script-src" not in policy
    style = re.search("<style>(.*?)</style>", page.text, re.DOTALL)[1]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in policy
    assert not re.search(r"https?://|<script|javascript:| on\w+=", page.text)
