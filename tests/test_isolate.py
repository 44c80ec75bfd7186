"""A child that dies in any way costs its own job; the next one finds a new child."""

import os
import signal
import sys

import pytest
from raw import write_scan

from photon_data.prepare_file import Job
from photon_data.readers.find import find_scans
from photon_data.recipe import Recipe
from photon_pipelines.child import Child, ChildError, child_of

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


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_job_does_not_end_the_one_that_reads_a_scan(tmp_path, sign):
    (source,) = find_scans(write_scan(tmp_path / "a.nii.gz")).sources
    recipe = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))
    job, child = Job(source, str(tmp_path), recipe).to_json(), child_of("photon_pipelines.scan_job", 8 << 30)
    try:
        assert child.ask(job, 60)["state"] == "prepared"
        pid = child.process.pid
        os.kill(pid, sign)
        assert child.ask(job, 60)["state"] == "unchanged"
        assert child.process.pid == pid
    finally:
        child.kill()


def test_a_long_reply_arrives_whole(child):
    assert len(child.ask({"do": "long"}, 20)["padding"]) == 200_000


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_AS, ({hard}, {hard}))
from photon_pipelines.child import main
main({asked}, lambda job: {{"limit": resource.getrlimit(resource.RLIMIT_AS)[0]}})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has no such limit")
@pytest.mark.parametrize(("hard", "asked", "limit"), [(8 << 30, 16 << 30, 8 << 30), (16 << 30, 8 << 30, 8 << 30)])
def test_a_limit_of_the_shell_that_is_below_the_limit_of_a_child_holds(hard, asked, limit):
    child = Child("-c", LIMITED.format(hard=hard, asked=asked))
    try:
        assert child.ask({}, 20) == {"limit": limit}
    finally:
        child.kill()
