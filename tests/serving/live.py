"""A server that is put together as `photon serve` does it, and runs in a thread of the test."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx

from photon_cli.serve import Options, assembled

COARSE = ("shape_zyx=91,91,91", "spacing_mm=4,4,4")
USUAL = Options("127.0.0.1", 0, None, None, None, 32, 1.0, 0.2, 256, 60, 60, 4, "chest_ct", COARSE)


class Live:
    def __init__(self, base, server):
        self.base, self.server, self.engine, self.private = base, server, server.engine, server.volumes.private
        self.http = httpx.Client(base_url=base, timeout=60)

    @property
    def figures(self):
        return self.engine.figures()

    def upload(self, *files, **fields):
        """The response to an upload of paths or (name, bytes)."""
        pairs = [(f.name, f.read_bytes()) if isinstance(f, Path) else f for f in files]
        return self.http.post("/v1/volumes", files=[("file", pair) for pair in pairs], data=fields)

    def uploaded(self, *files):
        found = self.upload(*files)
        assert found.status_code == 201, found.text
        return found.json()["id"]

    def ask(self, id, question="Is there a nodule?", **more):
        """The response to a question about a volume."""
        return self.http.post("/v1/chat/completions", json=body(id, question, **more))

    def answer(self, id, question="Is there a nodule?", **more):
        found = self.ask(id, question, **more)
        assert found.status_code == 200, found.text
        return found.json()


def body(id, question="Is there a nodule?", **more):
    parts = [{"type": "volume", "volume": id}, {"type": "text", "text": question}]
    return {"model": "served-model", "max_tokens": 5, "messages": [{"role": "user", "content": parts}], **more}


@contextmanager
def live(model_dir, **changes):
    load = {"device": "cpu", "dtype": "auto", "revision": None}
    with assembled(str(model_dir), load, 16, replace(USUAL, **changes)) as (http, server, listening):
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not http.started:
                time.sleep(0.01)
            yield Live(f"http://127.0.0.1:{listening.getsockname()[1]}", server)
        finally:
            http.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def code_of(response):
    """The code of an error in OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error["code"]


def events_of(text):
    """The chunks of a stream, without its end."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def request(served, head, *chunks, stop_after=None):
    """The status line and the text that come back to a raw request."""
    host, port = served.base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        try:
            line.sendall(head.encode() + b"\r\n\r\n")
            for chunk in chunks:
                line.sendall(chunk)
        except OSError:  # the server has closed
            pass
        found = b""
        while data := line.recv(65536):
            found += data
            if b"\r\n\r\n" in found and found.endswith(b"}"):
                break
    return found.split(b"\r\n")[0].decode(), found.decode()


def head(path="/v1/volumes", method="POST", **more):
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in more.items())]
    return "\r\n".join(lines)
