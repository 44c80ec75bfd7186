"""Jobs on a Dask cluster that was there before: it grows, workers differ and are lost, and nothing of a run stays."""

import hashlib
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
from distributed import LocalCluster
from raw import write_scan

from photon_data.files import Location
from photon_data.lock import exclusive
from photon_data.prepare_file import Job, prepare_file
from photon_data.readers.find import find_scans
from photon_data.recipe import Recipe
from photon_pipelines.child import Child
from photon_pipelines.cluster import Needs, Stopped, Workers, execute, lacking_here
from photon_pipelines.prepare import prepare
from photon_pipelines.request import Request

SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))


class Number:
    """A job that says which one it is."""

    def __init__(self, number):
        self.number = number

    def to_json(self):
        return {"number": self.number}


@pytest.fixture
def cluster():
    """A cluster of one thread in this process, as if it had been there before."""
    place = {"processes": False, "protocol": "tcp", "dashboard_address": None}
    with LocalCluster(n_workers=1, threads_per_worker=1, memory_limit="5GiB", **place) as cluster:
        yield cluster


def replies(cluster, task, count, needs=None):
    workers = Workers(scheduler=cluster.scheduler_address)
    return [reply for _, reply in execute([Number(number) for number in range(count)], task, workers, needs)]


running, most = set(), []


def slow(job, *_):
    running.add(job["number"])
    most.append(len(running))
    time.sleep(0.15)
    running.remove(job["number"])
    return job


def limit(job, timeout_s, address_space_bytes, run):
    return {"limit": address_space_bytes}


def test_a_cluster_that_grows_is_used_within_seconds(cluster):
    threading.Timer(1.0, lambda: cluster.scale(8)).start()
    start_s = time.monotonic()
    found = replies(cluster, slow, 150)
    assert sorted(reply["number"] for reply in found) == list(range(150))
    assert most[0] == 1
    assert max(most) == 8
    assert time.monotonic() - start_s < 150 * 0.15  # what the first thread alone would take


def test_the_memory_of_a_child_is_its_workers_and_not_the_clients(cluster):
    assert replies(cluster, limit, 1) == [{"limit": 5 << 30}]


def test_a_worker_that_lacks_source_or_out_is_named_before_any_work(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("photon_pipelines.cluster.SEEN_S", 0)
    scan, out = write_scan(tmp_path / "raw" / "a.nii.gz"), Location(str(tmp_path / "out"))
    size = scan.stat().st_size
    with exclusive(out) as hold:
        assert lacking_here(Needs(((str(scan), size, str(scan)),), out.at(""), hold.token)) == ""
        for needs, said in (
            (Needs(((str(tmp_path / "elsewhere.nii"), 1, "x/elsewhere.nii"),)), "cannot see x/elsewhere.nii"),
            (Needs(((str(scan), size + 1, "a file of SOURCE"),)), "sees another file as a file of SOURCE "),
            (Needs((), str(tmp_path / "another"), hold.token), "does not see OUT"),
            (Needs((), out.at(""), "of a folder of the same name there"), "does not see OUT"),
        ):
            with pytest.raises(Stopped, match=rf"every worker sees SOURCE and OUT, but \S+ {said}.*\(on tcp://"):
                replies(cluster, limit, 1, Needs(*needs))


def test_a_store_that_does_not_answer_is_told_as_what_a_worker_lacks(monkeypatch):
    def denied(*_, **__):
        raise PermissionError("Forbidden")

    monkeypatch.setattr("photon_pipelines.cluster.is_held_by", denied)
    assert "cannot read OUT, s3://bucket/out (PermissionError: Forbidden)" in lacking_here(
        Needs((), "s3://bucket/out", "token")
    )


def test_nothing_of_a_run_stays_on_the_cluster(cluster, tmp_path):
    write_scan(tmp_path / "raw" / "a.nii.gz")
    before = psutil.Process().children()
    request = Request(tmp_path / "raw", Location(str(tmp_path / "out")), SMALL, pictures=0)
    assert prepare(request, Workers(scheduler=cluster.scheduler_address)).states["prepared"] == 1
    left = [child for child in psutil.Process().children() if child not in before]
    psutil.wait_procs(left, 5)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in left)


def test_a_child_that_left_before_it_saw_a_job_costs_nothing(tmp_path):
    script = "import os, sys\nif not os.path.exists(sys.argv[1]): open(sys.argv[1], 'w'); os._exit(79)\n"
    child = Child("-c", script + "print(sys.stdin.readline(), flush=True)", str(tmp_path / "seen"))
    assert child.ask({"do": 1}, 20) == {"do": 1}
    child.kill()


def _stores(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_a_node_that_is_lost_costs_its_scans_one_retry(tmp_path):
    for seed in range(10):
        write_scan(tmp_path / "raw" / f"s{seed}.nii.gz", seed, shape_zyx=(120, 160, 160))
    file = tmp_path / "scheduler.json"
    place = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "dask", "scheduler", *place, "--scheduler-file", str(file)], stderr=subprocess.DEVNULL
    )
    of_worker = ["--scheduler-file", str(file), "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    nodes = [
        psutil.Popen([sys.executable, "-m", "dask", "worker", *of_worker], stderr=subprocess.DEVNULL, env=os.environ)
        for _ in range(2)
    ]
    lost = []

    def lose():  # as soon as a store is being written
        while not ended.is_set() and not list((tmp_path / "out" / "volumes").glob("*")):
            time.sleep(0.01)
        lost.extend(nodes[0].children())
        nodes[0].kill()

    ended, killer = threading.Event(), threading.Thread(target=lose)
    killer.start()
    try:
        while not file.exists():
            time.sleep(0.05)
        request = Request(tmp_path / "raw", Location(str(tmp_path / "out")), SMALL, pictures=0)
        states = prepare(request, Workers(scheduler=str(file))).states
    finally:
        ended.set()
        killer.join()
        for process in (*nodes, scheduler):
            process.kill()
            process.wait()
    assert states["prepared"] + states["unchanged"] == 10
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in lost)
    for source in find_scans(tmp_path / "raw").sources:
        prepare_file(Job(source, str(tmp_path / "bare"), SMALL))
    assert _stores(tmp_path / "out" / "volumes") == _stores(tmp_path / "bare" / "volumes")
