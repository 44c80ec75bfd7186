"""What strangers and accidents do to the server: keys, hosts, sizes, archives, names, clients that go away, crowds."""

import errno
import io
import json
import logging
import os
import re
import socket
import struct
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import openai
import pytest
from dicom_files import write_series
from live import USUAL, body, code_of, head, live, request, wait_until
from raw import write_scan
from scans import ct_like

from photon_cli.serve import key_of
from photon_data.errors import Refused, UsageError
from photon_pipelines.child import Child

KEY = "0123456789abcdef-key"


# Who may come in


def test_a_key_is_needed_for_all_but_health(model_dir, tmp_path):
    (tmp_path / "key").write_text(f"{KEY}\n")
    with live(model_dir, key_file=tmp_path / "key") as served:
        ways = [
            None,
            "Bearer wrong",
            f"Bearer {KEY}x",
            f"Bearer {KEY[:-1]}",
            f"Token {KEY}",
            "Basic !",
            f"Bearer  {KEY} y",
        ]
        for path in ("/", "/v1/models", "/v1/volumes", "/metrics", "/nowhere"):
            for way in ways:
                found = served.http.get(path, headers={"Authorization": way} if way else {})
                assert (found.status_code, code_of(found)) == (401, "invalid_api_key"), (path, way)
                assert "Basic" in found.headers["www-authenticate"] and KEY not in found.text
        assert served.http.get("/health").status_code == served.http.get("/ready").status_code == 200
        assert served.http.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert served.http.get("/v1/models", auth=("anybody", KEY)).status_code == 200
        assert (
            served.http.get("/v1/models", headers={"Authorization": f"Bearer {KEY}", "Host": "ct.org"}).status_code
            == 200
        )
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{served.base}/v1", api_key="wrong", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{served.base}/v1", api_key=KEY).models.list().data


def test_other_machines_are_let_in_with_a_key_only(tmp_path):
    for host in ("0.0.0.0", "::", "192.168.0.7", "ct.example.org", "127.0.0.1.example.org"):
        with pytest.raises(UsageError, match="--api-key-file"):
            key_of(replace(USUAL, host=host))
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert key_of(replace(USUAL, host=host)) is None
    for text in ("", "short", "with space in the key", "kéykéykéykéykéykéy"):
        (tmp_path / "key").write_text(text)
        with pytest.raises(UsageError, match="--api-key-file"):
            key_of(replace(USUAL, key_file=tmp_path / "key"))
    with pytest.raises(UsageError, match="--api-key-file"):
        key_of(replace(USUAL, key_file=tmp_path / "none"))


def test_web_pages_of_others_cannot_use_a_server_without_a_key(served):
    port = served.base.rpartition(":")[2]
    for headers in (
        {"Host": f"evil.example:{port}"},  # a name that leads to this machine
        {"Host": "127.0.0.1.evil.example"},
        {"Host": ""},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{int(port) + 1}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        found = served.http.post("/v1/volumes", headers=headers)
        assert found.status_code == 403, headers
        assert "access-control-allow-origin" not in found.headers
    own = {"Origin": served.base, "Sec-Fetch-Site": "same-origin"}
    assert served.http.get("/v1/models", headers=own).status_code == 200
    assert served.http.options("/v1/models", headers={"Origin": served.base}).status_code == 405


def test_every_response_has_headers_that_close_it(served):
    for path in ("/v1/models", "/nowhere", "/v1/volumes/none", "/metrics", "/health"):
        headers = served.http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["cache-control"] == "no-store" and "server" not in headers


def test_headers_are_bounded(served):
    try:
        line, _ = request(served, head("/v1/models", "GET", host="localhost", x="y" * 3_000_000))
        assert line.split()[1] in ("400", "431")
    except ConnectionResetError:  # the line was closed while they were still coming
        pass
    assert served.http.get("/health").status_code == 200


# What is asked


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "expected a question"),
        ({"messages": [{"role": "assistant", "content": "Yes."}]}, 400, "user's message last"),
        ({"messages": [{"role": "tool", "content": "?"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": "<video>?"}]}, 400, "found <video>"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, 400, "expected plain text"),
        ({"messages": [{"role": "user", "content": "?" * 20_001}]}, 400, "at most 20,000 letters"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "type"),
        ({"model": "other"}, 404, "as model"),
        ({"n": 0}, 400, "n:"),
        ({"n": 17}, 400, "n: expected less than or equal to 16"),
        ({"max_tokens": 5000}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": float("1e400")}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
        ({"top_logprobs": 21}, 400, "top_logprobs"),
        ({"tools": []}, 400, "tools: expected no such field"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"<script>alert(1)</script>": 1}, 400, "script"),
    ],
)
def test_what_cannot_be_followed_is_refused_and_not_left_aside(served, change, status, said):
    found = served.http.post("/v1/chat/completions", content=json.dumps({**body("v0"), **change}))
    assert found.status_code == status and re.search(said, found.json()["error"]["message"]), found.text
    assert found.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "' + b"a" * 300_000 + b'"}', b"[" * 10_000]
)
def test_bodies_that_are_no_requests_are_refused(served, content):
    found = served.http.post("/v1/chat/completions", content=content)
    assert found.status_code in (400, 413) and code_of(found)


NO_IDS = [
    "../../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://example.org/a.nii.gz",
    "data:text/plain;base64,AAAA",
    "s3://bucket/a.ome.zarr",
    "",
    ".",
    "vol_" + "0" * 24,
    "v0.ome.zarr",
    "v0/../v1",
    "a\0b",
    "é" * 500,
]


def test_no_path_and_no_url_is_a_volume(served, prepared):
    for id in [*NO_IDS, str(prepared.places[0])]:
        for ask in (served.ask(id), served.http.post("/v1/chat/completions", json=video(id))):
            assert (ask.status_code, code_of(ask)) == (404, "unknown_volume"), id
        quoted = f"/v1/volumes/{quote(id, safe='')}/grid"
        line, text = request(served, head(quoted, "GET", host="localhost", connection="close"))
        assert line.split()[1] in ("404", "307", "400"), (id, line)
        assert "root:" not in text and str(prepared.out) not in text
    for raw in (
        "/v1/volumes/..%2f..%2fetc%2fpasswd/grid",
        "/v1/volumes/%2e%2e/grid",
        "/../../etc/passwd",
        "//etc/passwd",
    ):
        assert request(served, head(raw, "GET", host="localhost", connection="close"))[0].split()[1] == "404"
    assert served.http.get("/v1/volumes/v0/kept/..%2f..%2fx").status_code == 404
    mixed = body("v0")
    mixed["messages"][0]["content"].insert(0, {"type": "volume", "volume": "v0"})
    mixed["messages"][0]["content"] += [{"type": "volume", "volume": "v1"}] * 3
    found = served.http.post("/v1/chat/completions", json=mixed)
    assert (found.status_code, code_of(found)) == (400, "too-many-volumes")


def video(id):
    parts = [{"type": "video_url", "video_url": {"url": id}}, {"type": "text", "text": "?"}]
    return {"model": "served-model", "messages": [{"role": "user", "content": parts}]}


def test_a_line_on_which_no_request_or_no_question_comes_is_closed(model_dir, monkeypatch):
    monkeypatch.setattr("photon_cli.serve.HEADERS_S", 1)
    monkeypatch.setattr("photon_pipelines.serving.app.BODY_S", 1)
    with live(model_dir) as served:
        host, port = served.base.removeprefix("http://").split(":")

        def closed_after(*pieces):
            start = time.monotonic()
            with socket.create_connection((host, int(port)), timeout=30) as line:
                for piece in pieces:
                    line.sendall(piece)
                    time.sleep(0.4)
                found = b"".join(iter(lambda: line.recv(65536), b""))
            return time.monotonic() - start, found

        whole = head("/health", "GET", host="localhost").encode() + b"\r\n\r\n"
        for pieces in ([], [b"G", b"ET"], [whole, b"GET /he"]):  # nothing, half a request, half of a second one
            seconds, found = closed_after(*pieces)
            assert 0.8 < seconds < 20 and found.count(b"200 OK") == (pieces[:1] == [whole])
        question = head("/v1/chat/completions", host="localhost", content_length=100).encode() + b"\r\n\r\n{"
        seconds, found = closed_after(question)
        assert seconds < 20 and b" 408 " in found and b"body-timeout" in found
        assert served.http.get("/health").status_code == 200


# What is sent


def test_an_upload_of_5_gb_is_refused_before_it_is_sent(served):
    start = time.monotonic()
    line, text = request(
        served, head(host="localhost", content_type="multipart/form-data; boundary=x", content_length=5 * 10**9)
    )
    assert line.split()[1] == "413" and "too-large" in text and time.monotonic() - start < 5
    assert "connection: close" in text
    for length in ("-1", "a", "1" * 30):
        line, _ = request(served, head(host="localhost", content_length=length, connection="close"))
        assert line.split()[1] == "400"


FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.nii"\r\n\r\n'


@pytest.mark.parametrize(
    ("path", "kind", "start", "pieces"),
    [
        ("/v1/volumes", "multipart/form-data; boundary=x", FORM, 40),  # 2.6 MB; the limit of an upload is 2 MB
        ("/v1/chat/completions", "application/json", b'{"model": "', 5),  # 330 kB; that of a question is 256 KiB
    ],
)
def test_a_chunked_body_is_counted_and_refused_after_its_limit(served, path, kind, start, pieces):
    asked = served.figures["asked"]
    chunks = [start, *[b"0" * 0x10000] * pieces, b""]
    line, text = request(
        served,
        head(path, host="localhost", content_type=kind, transfer_encoding="chunked"),
        *(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks),
    )
    assert line.split()[1] == "413" and '"too-large"' in text
    assert served.figures["asked"] == asked


def bomb(megabytes=100):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.nii", b"\0" * (megabytes << 20))
    return ("bomb.zip", buffer.getvalue())


def lying(content):
    """The archive, which says of its files that they are of 10 bytes."""
    found = bytearray(content)
    at = found.rindex(b"PK\x01\x02")
    found[at + 24 : at + 28] = struct.pack("<L", 10)
    return bytes(found)


def encrypted():
    name, content = bomb(1)
    found = bytearray(content)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        found[found.index(mark) + place] |= 1
    return name, bytes(found)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (bomb, "too-large"),
        (lambda: ("b.zip", lying(bomb()[1])), "damaged-zip"),
        (encrypted, "encrypted"),
        (lambda: ("a.zip", b"PK\x03\x04" + os.urandom(5000)), "damaged-zip"),
        (lambda: ("a.zip", bomb()[1][:-50]), "damaged-zip"),
        (lambda: ("a.nii.gz", bomb(1)[1]), "not-a-scan"),
    ],
    ids=["bomb", "lying", "encrypted", "garbage", "cut", "named-nifti"],
)
def test_archives_of_strangers_are_refused_and_leave_nothing(served, make, code):
    before = disk(served)
    found = served.upload(make())
    assert found.status_code in (413, 422), found.text
    if code != "not-a-scan":
        assert code_of(found) == code
    assert disk(served) == before
    assert served.http.get("/health").status_code == 200


def disk(served):
    """The files in the private folder of the server."""
    return sorted(str(path.relative_to(served.private)) for path in served.private.rglob("*"))


def test_names_that_lead_elsewhere_lead_nowhere(served, tmp_path):
    scan = write_scan(tmp_path / "a.nii").read_bytes()
    for name in (
        "../../../tmp/escaped.nii",
        "/tmp/escaped.nii",
        "C:\\escaped.nii",
        "..",
        ".nii",
        "a\0.nii",
        "CON.nii",
        "x" * 500 + ".nii",
    ):
        found = served.upload((name, scan))
        if name != "..":
            assert found.status_code == 201, (name, found.text)
            assert served.http.delete(f"/v1/volumes/{found.json()['id']}").status_code == 200
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(zipfile.ZipInfo(name), scan)
            link = zipfile.ZipInfo("link.nii")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
        found = served.upload(("a.zip", buffer.getvalue()))
        has_name = name not in ("..", "a\0.nii")  # a name in an archive ends at a null
        assert found.status_code == (201 if has_name else 422), (name, found.text)
        if has_name:
            served.http.delete(f"/v1/volumes/{found.json()['id']}")
    assert not Path("/tmp/escaped.nii").exists()
    assert [name for name in disk(served) if "escaped" in name] == []


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "multipart/form-data; boundary=x", 400),
        (b"nonsense", "multipart/form-data; boundary=x", 400),
        (b"--x\r\n", "multipart/form-data", 415),
        (b"abc", "application/octet-stream", 415),
        (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.nii"\r\n\r\nabc',
            "multipart/form-data; boundary=x",
            400,
        ),
        (b"--x\r\n" + b"A: b\r\n" * 5000 + b"\r\n--x--", "multipart/form-data; boundary=x", 400),
        (
            b'--x\r\nContent-Disposition: form-data; name="series"\r\n\r\n' + b"k" * 5000 + b"\r\n--x--",
            "multipart/form-data; boundary=x",
            413,
        ),
    ],
    ids=["empty", "nonsense", "no boundary", "no form", "cut off", "headers", "long field"],
)
def test_bodies_that_are_no_uploads_are_refused_and_leave_nothing(served, content, kind, status):
    before = disk(served)
    found = served.http.post("/v1/volumes", content=content, headers={"content-type": kind})
    assert found.status_code == status and code_of(found), found.text
    assert disk(served) == before


def test_no_more_uploads_are_taken_than_allowed(served, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz")
    ids = [served.uploaded(scan), served.uploaded(scan)]
    assert len(set(ids)) == 2  # each client has its own, of one content: and one encoding
    misses = served.figures["prefix_misses"]
    assert len({served.answer(id)["choices"][0]["message"]["content"] for id in ids}) == 1
    assert served.figures["prefix_misses"] == misses + 1
    found = served.upload(scan)
    assert (found.status_code, code_of(found)) == (507, "full")
    for id in ids:
        served.http.delete(f"/v1/volumes/{id}")
    served.http.delete(f"/v1/volumes/{served.uploaded(scan)}")


def test_an_upload_that_stops_coming_is_given_up(model_dir):
    with live(model_dir, upload_timeout_s=1) as served:
        start = head(host="localhost", content_type="multipart/form-data; boundary=x", content_length=1000)
        line, text = request(served, start, b"--x\r\n")
        assert line.split()[1] == "408" and "upload-timeout" in text
        wait_until(lambda: not list((served.private / "incoming").iterdir()))


def test_a_scan_that_takes_too_much_memory_costs_itself(model_dir, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz")
    with live(model_dir, memory_gb=0.05) as served:  # no interpreter starts in it
        found = served.upload(scan)
        assert found.status_code == 422 and code_of(found) in ("crashed", "killed")
        assert served.http.get("/ready").status_code == 200
        assert not list((served.private / "incoming").iterdir())


# The process of uploads, whose first job takes a minute.
SLOW_ONCE = """
import sys, time
from pathlib import Path
begun = Path(sys.argv[1])
if not begun.exists():
    begun.touch()
    sys.stdin.readline()
    time.sleep(60)
from photon_pipelines.serving import intake
intake.main(0)
"""


def test_a_scan_that_takes_too_long_costs_itself(model_dir, tmp_path, monkeypatch):
    scan, begun = write_scan(tmp_path / "a.nii.gz"), tmp_path / "begun"
    monkeypatch.setattr("photon_cli.serve.child_of", lambda module, memory: Child("-c", SLOW_ONCE, str(begun)))
    with live(model_dir) as served:
        before, volumes, usual = disk(served), served.server.volumes, served.server.volumes.intake
        volumes.intake = replace(usual, limits=usual.limits._replace(seconds=1))
        found = served.upload(scan)
        assert (found.status_code, code_of(found)) == (422, "timeout") and begun.exists()
        assert disk(served) == before
        volumes.intake = usual
        assert served.upload(scan).status_code == 201


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("Doe^John"), 500),
        (OSError(errno.EIO, "Doe^John"), 500),
        (OSError(errno.ENOSPC, "Doe^John"), 507),
        (Refused("series", "Doe^John"), 422),
    ],
    ids=["bug", "bad disk", "full disk", "refused"],
)
def test_a_request_that_fails_here_is_logged_once_and_one_that_is_refused_never(
    served, monkeypatch, caplog, error, status
):
    def find(id):
        raise error

    monkeypatch.setattr(served.server.volumes, "find", find)
    caplog.set_level(logging.INFO)
    assert served.http.get("/v1/volumes/v0").status_code == status
    wait_until(lambda: any("GET /v1/volumes/{id}" in one.getMessage() for one in caplog.records))  # its last line
    logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(logged) == (1 if status >= 500 else 0) and not any("Doe" in text for text in logged), logged


def test_no_patients_data_are_in_logs_ids_or_errors(served, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    series = tmp_path / "DOE^SECRET" / "s"
    write_series(series, ct_like((16, 24, 28)), rescale=(1, 0))
    files = sorted(series.iterdir())
    good = served.upload(*[(f"Doe Secret/{path.name}", path.read_bytes()) for path in files])
    texts = [good.text, served.http.get("/v1/volumes").text]
    id = good.json()["id"]
    texts += [served.http.get(f"/v1/volumes/{id}").text, served.ask(id, "How is Mr Secret?", stream=True).text]
    holes = [("Secret.dcm", path.read_bytes()) for path in files[:3] + files[8:]]
    texts += [served.upload(*holes).text, served.upload(("Secret Doe.nii.gz", b"\x1f\x8bSecret")).text]
    texts += [
        served.upload(("Secret.nii", files[0].read_bytes())).text,
        served.upload(("a.dcm", files[0].read_bytes()[:300])).text,
    ]
    texts += [served.http.get("/v1/volumes/Secret").text, served.http.get("/metrics").text]

    def logged():
        return [record.getMessage() for record in caplog.records if not record.name.startswith(("http", "asyncio"))]

    wait_until(lambda: len(logged()) >= 10)  # the last line comes after its response
    ours = logged()
    for text in [*texts, *ours, (served.private / "volumes" / f"{id}.ome.zarr" / "zarr.json").read_text()]:
        assert not re.search("secret|doe", text, re.IGNORECASE), text
    assert not any(id in text for text in ours)
    served.http.delete(f"/v1/volumes/{id}")
