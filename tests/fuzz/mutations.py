"""Damage to small files, drawn by Hypothesis: bytes, lines and words of texts, values of JSON. `--long` draws more."""

import contextlib
import copy
import json
import signal
import sys

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from photon_data.errors import UsageError

LONG = "--long" in sys.argv
SECONDS = 30  # no example takes a second where nothing hangs

NUMBERS = [b"\0" * 8, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0\0\0\x80" * 2, b"\0\0\xc0\x7f" * 2, b"\0\0\x80\x7f" * 2]
NUMBERS += [b"\x01\0\0\0" * 2, b"\0\0\0\x01" * 2, b"\0\0\x7a\x44" * 2]
WORDS = ["", "0", "-1", "1", "2", "nan", "inf", "1e309", "-1e-320", "9" * 5000, "true", "null", "~", "None"]
WORDS += ["../../x", "/etc/passwd", "a\x1b[31mb", "\0", "\u202e", "\ud800", '"', "'", "\n", "\t", "\\", "{", "}"]
WORDS += ["&a [*a]", "*a", "!!python/object:os.system", "!x", "- ", ": ", "<<", "2024-13-45", "<video>", ",", ";"]
WORDS += ["=", "LIST", "x" * 3000, "[" * 3000]
VALUES = [None, True, False, 0, -1, 3, 2**31, 10**30, 10**400, 1.5, float("nan"), float("inf"), "", "x", "../../x"]
VALUES += ["\0", "\ud800", "a\x1b[31mb", "9" * 5000, [], {}, [[]], [1, "a"], {"a": 1}, [None] * 3, {"": {}}]


def budget(examples: int) -> settings:
    """So many examples of a test, always the same; twenty times as many, and others each time, with `--long`."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    count = examples * (20 if LONG else 1)
    return settings(
        max_examples=count, derandomize=not LONG, database=None, deadline=None, suppress_health_check=checks
    )


@contextlib.contextmanager
def no_hang():
    """Fail an example that does not end."""

    def stop(*_):
        raise AssertionError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sentence_or(read, *parts):
    """What a reader returns, or None where it refuses: in a sentence, that no terminal obeys once it is printed."""
    with no_hang():
        try:
            return read(*parts)
        except UsageError as error:
            assert 10 < len(str(error)) < 30_000
            return None


def write(path, content):
    """Write a text, half surrogates too, or bytes; return the path."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


@st.composite
def damaged_bytes(draw, data: bytes, within: int | None = None):
    """Some bytes with one to three faults in their first `within` ones: bits, numbers, pieces lost, doubled, moved."""
    for _ in range(draw(st.integers(1, 3))):
        end = min(within or len(data), len(data))
        at = draw(st.integers(0, max(0, end - 1)))
        kind = draw(st.sampled_from(["bit", "byte", "number", "number", "cut", "drop", "double", "swap"]))
        length = draw(st.integers(1, 40))
        if kind == "bit":
            data = data[:at] + bytes([(data[at] if data else 0) ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
        elif kind == "byte":
            data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
        elif kind == "number":
            number = draw(st.sampled_from(NUMBERS))[: draw(st.sampled_from([1, 2, 4, 8]))]
            data = data[:at] + number + data[at + len(number) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[at + length :]
        elif kind == "double":
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        else:
            data = data[at : at + length] + data[:at] + data[at + length :]
    return data


@st.composite
def damaged_text(draw, text: str):
    """A text with one to three faults: lines lost, doubled, moved; words replaced by others, or by odd ones."""
    for _ in range(draw(st.integers(1, 3))):
        lines = text.split("\n")
        at, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["drop", "double", "move", "word", "word", "word", "insert"]))
        if kind == "drop":
            del lines[at]
        elif kind == "double":
            lines.insert(other, lines[at])
        elif kind == "move":
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == "word":
            words = lines[at].split(" ")
            words[draw(st.integers(0, len(words) - 1))] = draw(st.sampled_from([*WORDS, *text.split()[:40]]))
            lines[at] = " ".join(words)
        else:
            place = draw(st.integers(0, len(lines[at])))
            lines[at] = lines[at][:place] + draw(st.sampled_from(WORDS)) + lines[at][place:]
        text = "\n".join(lines)
    return text


@st.composite
def damaged_value(draw, value):
    """A JSON value with one or two faults: a part replaced, lost, renamed, or put around itself."""
    root = {"": copy.deepcopy(value)}
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(root))
        if not places:
            break
        parent, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["value", "value", "value", "drop", "wrap", "rename", "deep"]))
        if kind == "value":
            parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif kind == "drop" and parent is not root:
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict) and parent is not root:
            parent[draw(st.sampled_from(["x", "", "../x"]))] = parent.pop(key)
        elif kind == "deep":
            for _ in range(200):
                parent[key] = [parent[key]]
        else:
            parent[key] = draw(st.sampled_from([[parent[key]], {"a": parent[key]}, str(parent[key])[:50]]))
    return root[""]


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


@st.composite
def damaged_json(draw, value):
    """The bytes of a JSON value whose values or whose text are damaged."""
    if draw(st.integers(0, 3)):
        return json.dumps(draw(damaged_value(value)), indent=draw(st.sampled_from([None, 1]))).encode()
    return draw(damaged_bytes(json.dumps(value).encode()))
