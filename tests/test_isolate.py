"""A child that dies in any way costs its own job; the next one finds a new child."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from photon_pipelines.child import Child, ChildError

# Answers {"do": ...}: says its pid, or dies in the way it is told.
SCRIPT = """
import json, os, sys, time
for line in sys.stdin:
    do = json.loads(line)["do"]
    if do == "segfault":
        import ctypes; ctypes.string_at(0)
    if do == "killed":
        os.kill(os.getpid(), 9)
    if do == "exit":
        sys.exit(3)
    if do == "hang":
        time.sleep(60)
    if do == "half a line":
        sys.stdout.write('{"pid"'); sys.stdout.flush(); os._exit(1)
    print(json.dumps({"pid": os.getpid(), "padding": "x" * 200_000 if do == "long" else ""}), flush=True)
"""


@pytest.fixture
def child():
    child = Child("-c", SCRIPT)
    yield child
    child.kill()


@pytest.mark.parametrize(
    ("do", "code", "said"),
    [
        ("segfault", "crashed", "SIGSEGV"),
        ("killed", "killed", "lack of memory"),
        ("exit", "crashed", "exit code 3"),
        ("half a line", "crashed", "exit code 1"),
        ("hang", "timeout", "not done after 1 s"),
    ],
)
def test_a_child_that_dies_is_named_and_replaced(child, do, code, said):
    first = child.ask({"do": "live"}, 20)["pid"]
    with pytest.raises(ChildError, match=said) as error:
        child.ask({"do": do}, 1 if do == "hang" else 20)
    assert error.value.code == code
    second = child.ask({"do": "live"}, 20)["pid"]
    assert second != first
    assert child.ask({"do": "live"}, 20)["pid"] == second


def test_a_long_reply_arrives_whole(child):
    assert len(child.ask({"do": "long"}, 20)["padding"]) == 200_000


@pytest.mark.parametrize("head_start_s", [0, 3])  # while the child imports its libraries, and (mostly) after it
def test_the_real_child_ends_with_its_parent(head_start_s):
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            "p = subprocess.Popen([sys.executable, '-P', '-m', 'photon_pipelines.child', '0'], stdin=subprocess.PIPE)\n"
            "print(p.pid, flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(head_start_s)
    parent.kill()
    parent.wait()
    for _ in range(600):
        if not _is_alive(pid):
            return
        time.sleep(0.1)
    pytest.fail("the child outlived its parent")


def _is_alive(pid):
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return False
