"""Clients that go away, clients by the hundred, a server that is stopped, and one that is used for a while."""

import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from askable import QUESTIONS, predictor, row
from live import COARSE, body, code_of, head, live, wait_until
from raw import write_scan
from test_engine import predicted

from photon_train.serving.question import Draft


@pytest.fixture
def stalled(monkeypatch):
    """Answers stop at their first token until this is set; `reached` is set once one does."""
    release, real = threading.Event(), Draft.add
    release.reached = threading.Event()

    def add(self, token, logits):
        real(self, token, logits)
        release.reached.set()
        assert release.wait(60)

    monkeypatch.setattr(Draft, "add", add)
    yield release
    release.set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(served, stalled, stream):
    content = json.dumps(body("v0", max_tokens=4096, stream=stream)).encode()
    host, port = served.base.removeprefix("http://").split(":")
    before = served.figures
    line = socket.create_connection((host, int(port)))
    line.sendall(
        head("/v1/chat/completions", host="localhost", content_length=len(content)).encode() + b"\r\n\r\n" + content
    )
    assert stalled.reached.wait(30)  # what comes until then is answered in the same batch
    if stream:
        received = b""
        while b"data:" not in received:
            more = line.recv(65536)
            assert more, f"the server closed after {received}"
            received += more
    waiting = socket.create_connection((host, int(port)))
    waiting.sendall(
        head("/v1/chat/completions", host="localhost", content_length=len(content)).encode() + b"\r\n\r\n" + content
    )
    wait_until(lambda: served.figures["waiting"] == 1)
    for one in (line, waiting):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # as if killed
        one.close()
    wait_until(lambda: served.figures["left"] == before["left"] + 2)
    assert served.figures["waiting"] == 0
    stalled.set()
    assert served.answer("v1")["choices"]
    assert served.figures["answered"] == before["answered"] + 1


def test_an_upload_whose_client_has_gone_keeps_no_place(served, tmp_path):
    content = write_scan(tmp_path / "a.nii.gz").read_bytes()
    start = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.nii.gz"\r\n\r\n'
    whole = start + content + b"\r\n--x--\r\n"
    sent = head(host="localhost", content_type="multipart/form-data; boundary=x", content_length=len(whole))
    host, port = served.base.removeprefix("http://").split(":")
    before = served.server.volumes.ids()
    for part in (whole, whole[: len(whole) // 2]):
        with socket.create_connection((host, int(port))) as line:
            line.sendall(sent.encode() + b"\r\n\r\n" + part)
            wait_until(lambda: served.server.uploading)
        wait_until(lambda: not served.server.uploading)
        wait_until(lambda: served.server.volumes.ids() == before and not list((served.private / "incoming").iterdir()))


def test_a_question_that_takes_too_long_is_given_up(model_dir, prepared, stalled):
    with live(model_dir, data=str(prepared.out), timeout_s=1) as served:
        streamed = served.ask("v0", stream=True)
        assert streamed.status_code == 200 and '"code": "timeout"' in streamed.text.split("\n\n")[-2]
        found = served.ask("v0")  # it waits behind the other
        assert (found.status_code, code_of(found)) == (504, "timeout")
        stalled.set()
        wait_until(lambda: served.ask("v1").status_code == 200)


def test_a_full_queue_says_when_to_come_again(model_dir, prepared):
    with live(model_dir, data=str(prepared.out), max_waiting=1) as served, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: served.ask(f"v{n % 4}", max_tokens=100), range(8)))
        statuses = {response.status_code for response in found}
        assert statuses == {200, 429}
        busy = next(response for response in found if response.status_code == 429)
        assert code_of(busy) == "busy" and int(busy.headers["retry-after"]) >= 1


def test_200_clients_at_once_get_the_right_answers_and_none_is_lost(served, model_dir, prepared):
    questions = [f"{QUESTIONS[n % 4]} {n % 7}" for n in range(28)]
    rows = [row(f"{v} {n}", questions[n], prepared.places[v]) for v in range(4) for n in range(28)]
    expected = {id: p.response for id, p in predicted(model_dir, rows, predictor(model_dir).settings).items()}
    asked = [(n % 4, n * 5 % 28) for n in range(200)]
    start, found = threading.Barrier(200), [None] * 200
    before, memory = served.figures, psutil.Process().memory_info().rss  # of the clients, too

    def client(number):
        v, n = asked[number]
        with httpx.Client(base_url=served.base, timeout=120) as http:
            start.wait(60)
            found[number] = http.post("/v1/chat/completions", json=body(f"v{v}", questions[n], max_tokens=6))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [response.status_code for response in found] == [200] * 200
    texts = [response.json()["choices"][0]["message"]["content"] for response in found]
    assert texts == [expected[f"{v} {n}"] for v, n in asked]
    assert len({response.json()["id"] for response in found}) == 200
    assert psutil.Process().memory_info().rss < memory + (400 << 20)
    after = served.figures
    assert after["answered"] - before["answered"] == 200 and after["waiting"] == 0
    assert after["prefix_misses"] - before["prefix_misses"] <= 4
    assert after["batches"] - before["batches"] < 100  # those that wait together are answered together


@pytest.fixture
def process(model_dir, prepared, tmp_path):
    """`photon serve` in a process of its own, and where it is."""
    words = ["serve", "--model", str(model_dir), "--port", "0", "--data", str(prepared.out), "--device", "cpu"]
    words += [word for each in COARSE for word in ("--set", each)]
    command = [sys.executable, "-c", "from photon_cli.photon import main; main()", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    opened = re.match(r"Open (http://\S+)", running.stdout.readline())
    assert opened
    yield running, opened[1]
    running.kill()
    running.wait()


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_server_that_is_stopped_answers_what_was_asked_and_leaves_nothing(process, tmp_path, sign):
    running, base = process
    with httpx.Client(base_url=base, timeout=60) as http, ThreadPoolExecutor(12) as pool:
        uploaded = http.post(
            "/v1/volumes", files={"file": ("a.nii.gz", write_scan(tmp_path / "a.nii.gz").read_bytes())}
        )
        id = uploaded.json()["id"]
        (private,) = tmp_path.glob("photon-serve-*")
        assert private.stat().st_mode & 0o777 == 0o700
        answers = [
            pool.submit(httpx.post, f"{base}/v1/chat/completions", json=body(id, f"{n}?", max_tokens=300), timeout=60)
            for n in range(12)
        ]
        wait_until(lambda: "photon_asked_total 12.0" in http.get("/metrics").text)
        running.send_signal(sign)
        assert [answer.result().status_code for answer in answers] == [200] * 12
    assert running.wait(30) == 0
    assert "closed; no questions were left" in running.stdout.read()
    assert not list(tmp_path.glob("photon-serve-*"))


@pytest.mark.parametrize(
    "seconds", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1800, marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_memory_does_not_grow_while_it_is_used_at_random(process, tmp_path, seconds):
    """Six rounds of random use at least, for at least so many seconds."""
    running, base = process
    start_s = time.monotonic()
    scan = write_scan(tmp_path / "a.nii.gz").read_bytes()
    draw, memory = random.Random(0), []
    me = psutil.Process(running.pid)

    def use(number):
        with httpx.Client(base_url=base, timeout=60) as http:
            kind = draw.randrange(6)
            if kind == 0:
                made = http.post("/v1/volumes", files={"file": ("a.nii.gz", scan)})
                if made.status_code == 201:
                    http.post("/v1/chat/completions", json=body(made.json()["id"]))
                    http.delete(f"/v1/volumes/{made.json()['id']}")
            elif kind == 1:
                with http.stream("POST", "/v1/chat/completions", json=body("v0", max_tokens=400, stream=True)) as found:
                    next(found.iter_bytes())
            elif kind == 2:
                http.post("/v1/volumes", files={"file": ("a.nii.gz", scan[: draw.randrange(len(scan))])})
            else:
                question = f"{QUESTIONS[draw.randrange(4)]} {number}"
                answer = http.post(
                    "/v1/chat/completions", json=body(f"v{draw.randrange(4)}", question, n=2, temperature=1.0)
                ).json()
                if kind == 3:
                    http.get(answer["photon"]["kept"][0], params={"format": draw.choice(["json", "nifti", "png"])})

    with ThreadPoolExecutor(6) as pool:
        while len(memory) < 6 or time.monotonic() < start_s + seconds:
            list(pool.map(use, range(24)))
            memory.append(me.memory_info().rss)
    half = len(memory) // 2
    assert max(memory[half:]) < max(memory[:half]) + (40 << 20), [size >> 20 for size in memory]
    with httpx.Client(base_url=base) as http:
        values = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(values["photon_waiting"]) == float(values["photon_uploads_running"]) == 0
    assert not list(next(tmp_path.glob("photon-serve-*")).glob("incoming/*"))
