"""A run and what belongs to it: its processes end with it, nobody else writes where it does, nothing listens."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from raw import write_scan
from typer.testing import CliRunner

from photon_cli.data import app
from photon_data import files
from photon_data.files import Location
from photon_data.recipe import Recipe
from photon_pipelines.child import FIRST
from photon_pipelines.cluster import Workers
from photon_pipelines.plan import Callback
from photon_pipelines.prepare import prepare
from photon_pipelines.request import Request
from photon_pipelines.verify import verify_output

SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))
COMMAND = [sys.executable, "-m", "photon_cli.data", "prepare"]
SETTINGS = ["--set", "shape_zyx=40,32,32", "--set", "model_shape_zyx=14,28,28", "--pictures", "0"]


# Processes


PARENT = """
import subprocess, sys, os, time
command = [sys.executable, "-P", "-c", sys.argv[1], str(os.getpid()), "0"]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("head_start_s", [0, 0.02, 0.1, 0.4, 3])  # from its start on to (mostly) its first job
def test_the_real_child_ends_with_its_parent(head_start_s):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, FIRST], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(head_start_s)
    parent.kill()
    parent.wait()
    assert child.is_running()
    assert _are_gone([child], 10)  # within a second on a machine that has nothing else to do


@pytest.mark.parametrize("parent", ["another", "its own, which closes the pipe"])
def test_a_child_without_a_parent_reads_no_library(parent):
    first = FIRST.replace("sys.platform", "''") + "\nprint('lives')"  # as without Linux
    pid = os.getppid() if parent == "another" else os.getpid()
    child = subprocess.Popen(
        [sys.executable, "-c", first, str(pid), "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    if parent == "another":
        assert child.wait(20) == 1
    assert child.stdin is not None
    child.stdin.close()
    child.wait(20)


def _are_gone(processes, within_s):
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes if _exists(p)):
            return True
        time.sleep(0.02)
    return False


def _exists(process):
    try:
        process.status()
    except psutil.NoSuchProcess:
        return False
    return True


@pytest.mark.slow
def test_after_a_parent_is_killed_no_process_lives_and_no_store_is_written(tmp_path):
    for seed in range(12):
        write_scan(tmp_path / "raw" / f"s{seed}.nii.gz", seed, shape_zyx=(120, 160, 160))
    rng = random.Random(0)
    for number in range(10):
        out = tmp_path / f"out{number}"
        command = [*COMMAND, str(tmp_path / "raw"), str(out), *SETTINGS, "--workers", "2"]
        run = psutil.Popen(command, stdout=subprocess.DEVNULL)
        while not run.children(recursive=True) and run.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.choice([0, 0.05, 0.3, 1, 2]))
        own = run.children(recursive=True)
        run.kill()
        run.wait()
        assert _are_gone(own, 5)
        there = sorted(path.name for path in out.glob("volumes/[!.]*"))
        time.sleep(1)
        assert sorted(path.name for path in out.glob("volumes/[!.]*")) == there


@pytest.mark.slow
def test_a_closed_terminal_ends_a_run_as_ctrl_c_does_unless_it_runs_under_nohup(tmp_path):
    for seed in range(12):
        write_scan(tmp_path / "raw" / f"s{seed}.nii.gz", seed, shape_zyx=(120, 160, 160))
    for prefix, code in (([], 130), (["nohup"], 0)):
        out = tmp_path / f"out{code}"
        command = [*prefix, *COMMAND, str(tmp_path / "raw"), str(out), *SETTINGS, "--workers", "1"]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (out / "volumes.jsonl").exists() and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(signal.SIGHUP)
        assert run.wait(120) == code
        rows = {json.loads(line)["id"] for line in (out / "volumes.jsonl").read_text().splitlines()}
        assert rows
        assert rows <= {path.name.partition(".")[0] for path in out.glob("volumes/[!.]*")}


def test_a_local_run_listens_on_no_other_address_than_the_loopback(tmp_path):
    write_scan(tmp_path / "raw" / "a.nii.gz")
    found = []

    class Look(Callback):
        def on_record(self, record):
            own = psutil.Process()
            for process in [own, *own.children(recursive=True)]:
                found.extend(c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN)
            found.append(record.state)

    prepare(Request(tmp_path / "raw", Location(str(tmp_path / "out")), SMALL, pictures=0), Workers(1), Look())
    assert set(found) - {"127.0.0.1"} == {"prepared"}


# Clusters


@pytest.fixture
def cluster(tmp_path):
    """Start a scheduler and a worker as a user does, with an environment each; yield them and the scheduler file."""
    started = []

    def start(scheduler_env, worker_env):
        file = tmp_path / "scheduler.json"
        place = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        of_scheduler = [sys.executable, "-m", "dask", "scheduler", *place, "--scheduler-file", str(file)]
        of_worker = [sys.executable, "-m", "dask", "worker", "--scheduler-file", str(file), "--nthreads", "1"]
        for command, env in ((of_scheduler, scheduler_env), ([*of_worker, "--no-nanny", "--no-dashboard"], worker_env)):
            log = (tmp_path / f"log{len(started)}").open("w")
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **env}))
        return (*started, file)

    yield start
    for process in started:
        process.kill()
        process.wait()


def _run_on(file, tmp_path, **more):
    command = [*COMMAND, str(tmp_path / "raw"), str(tmp_path / "out"), *SETTINGS, "--scheduler", str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


@pytest.mark.slow
def test_a_scheduler_that_is_lost_stops_the_run_in_a_sentence_and_its_work_is_kept(tmp_path, cluster):
    for seed in range(12):
        write_scan(tmp_path / "raw" / f"s{seed}.nii.gz", seed, shape_zyx=(120, 160, 160))
    scheduler, _, file = cluster({}, {})
    run = _run_on(file, tmp_path)
    while len(list(tmp_path.glob("out/volumes/[!.]*"))) < 3 and run.poll() is None:
        time.sleep(0.02)
    scheduler.kill()
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 3
    assert "expected a scheduler, but the connection" in said
    assert "Traceback" not in said
    assert len((tmp_path / "out" / "volumes.jsonl").read_text().splitlines()) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("who", ["worker", "both"])
def test_workers_without_the_package_stop_the_run_in_a_sentence(tmp_path, cluster, who):
    write_scan(tmp_path / "raw" / "a.nii.gz")
    stub = tmp_path / "stub" / "photon_pipelines"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ModuleNotFoundError('no photon_pipelines')\n")
    without = {"PYTHONPATH": str(stub.parent)}
    *_, file = cluster(without if who == "both" else {}, without)
    run = _run_on(file, tmp_path)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 3
    assert "on every worker, found ModuleNotFoundError: no photon_pipelines" in said
    assert "Traceback" not in said


# Full disks


class FullDisk:
    """Lets so many files be written whole, then none: what a disk that fills up in the middle does."""

    def __init__(self, monkeypatch):
        self.left = None
        write, append = files.write_whole, files.append_row

        @contextlib.contextmanager
        def write_whole(path, temporary=None):
            with write(path, temporary) as beside:
                yield beside
                self.count(path)

        def append_row(path, row):
            self.count(path)
            append(path, row)

        for module in [module for name, module in sys.modules.items() if name.startswith("photon_")]:
            for name, function in (("write_whole", write_whole), ("append_row", append_row)):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, function)

    def count(self, path):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write_stops_the_command_and_what_was_there_stays(tmp_path, monkeypatch):
    raw, out, small = tmp_path / "raw", tmp_path / "out", [*SETTINGS, "--workers", "1"]
    write_scan(raw / "a.nii.gz", 1)
    (raw / "bad.nii").write_text("no scan")
    table = tmp_path / "q.csv"
    table.write_text("volume,question,answer\na,Nodule?,no\n")
    commands = {
        ("prepare", raw, out, "--questions", table, "--retry-failed", *small): 1,
        ("export", out, "--format", "nifti", "--to", tmp_path / "nifti", "--overwrite"): 0,
        ("inspect", raw, "--json", tmp_path / "found.jsonl", "--workers", "1"): 1,
        ("show", out / "volumes" / "a.ome.zarr", "-o", tmp_path / "a.png"): 0,
    }
    for command, code in commands.items():
        assert cli(*command)[0] == code
    disk = FullDisk(monkeypatch)
    for command, code in commands.items():
        for left in range(100):
            disk.left = left
            found, said = cli(*command)
            assert (found, "No space left" in said, "Traceback" in said) == (
                (3, True, False) if disk.left < 0 else (code, False, False)
            )
            assert {row["id"] for row in files.from_jsonl((out / "volumes.jsonl").read_text())} == {"a", "bad"}
            if found == code:
                break
        assert left > 0
    disk.left = None
    assert list(verify_output(Location(str(out)))) == []
    assert list(tmp_path.rglob("*.partial")) == []


def cli(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})
    return result.exit_code, result.output
