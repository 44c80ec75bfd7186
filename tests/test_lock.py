"""A folder has one writer: a lock of the system on disks, a claim that is renewed where nothing can be locked."""

import json
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from raw import write_scan

from photon_data import lock
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.lock import exclusive
from photon_data.prepare_file import Job, prepare_file
from photon_data.readers.find import find_scans
from photon_data.recipe import Recipe

SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))


class StandIn(LocalFileSystem):
    """An object store on the local disk. As some stores do, it knows no condition under which it writes."""

    protocol = "standin"

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("standin://").rstrip("/")

    def pipe_file(self, path, value, **condition):
        if condition:
            raise TypeError("unexpected condition")
        Path(self._strip_protocol(path)).parent.mkdir(parents=True, exist_ok=True)
        super().pipe_file(path, value)


fsspec.register_implementation("standin", StandIn, clobber=True)


@pytest.fixture(params=["memory", "standin", "a disk without locks"])
def store(request, tmp_path, monkeypatch):
    for name, seconds in (("REFRESH_S", 0.1), ("VOID_S", 1.0), ("SETTLE_S", 0.2)):
        monkeypatch.setattr(lock, name, seconds)
    if request.param == "a disk without locks":

        def flock(*_):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr("fcntl.flock", flock)
        yield Location(str(tmp_path / "out"))
        return
    out = Location(f"{request.param}://{tmp_path}/out")
    yield out
    out.remove("")


def test_a_claim_lives_as_long_as_its_run_however_silent_that_is(store, monkeypatch):
    monkeypatch.setattr(lock, "VOID_S", 3.0)  # a busy machine may keep the thread that renews it waiting for a second
    with exclusive(store) as hold:
        time.sleep(3.5)  # longer than a claim that is not renewed
        with pytest.raises(UsageError, match="to be free, but another run"), exclusive(store):
            pass
        hold.check()
    with exclusive(store):
        pass
    assert not store.exists(".lock")


@pytest.mark.parametrize(
    "left",
    [
        b'{"host": "gone", "pid": 1, "token": "a", "count": 7}',
        b'{"host": "gone", "pid": 1, "time": 99999999999}',  # of a version that trusted clocks
        b'{"time": "abc"}',
        b"[" * 100_000,
        b"\xff\xfe\x00garbage",
        b"3",
    ],
)
def test_what_a_dead_run_left_is_void_after_a_while_whatever_it_says(store, left):
    store.write(".lock", left)
    start_s = time.monotonic()
    with exclusive(store):
        assert time.monotonic() - start_s >= 1


def test_a_run_that_lost_its_claim_says_so_and_leaves_the_new_holders(store):
    new = json.dumps({"host": "b", "pid": 2, "token": "new"}).encode()
    with exclusive(store) as hold:
        store.write(".lock", new)
        while not hold.is_lost:
            time.sleep(0.05)
        with pytest.raises(OSError, match="another run took over"):
            hold.check()
    assert store.read(".lock") == new


def test_of_runs_that_start_at_once_one_gets_in(store, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_S", 1.0)
    monkeypatch.setattr(lock, "VOID_S", 3.0)
    start, let_in, end = threading.Barrier(5), [], threading.Event()

    def run():
        start.wait()
        try:
            with exclusive(store):
                let_in.append(1)
                end.wait(20)
        except UsageError:
            pass

    threads = [threading.Thread(target=run) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(4)
    end.set()
    for thread in threads:
        thread.join()
    assert let_in == [1]


def test_a_job_of_a_run_that_is_over_writes_nothing_where_another_run_is(tmp_path):
    write_scan(tmp_path / "raw" / "a.nii.gz")
    out = Location(str(tmp_path / "out"))
    (source,) = find_scans(tmp_path / "raw").sources
    with exclusive(out) as first:
        job = Job(source, out.at(""), SMALL, holder=first.token)
    with exclusive(out):
        record = prepare_file(job)
    assert (record.state, record.store, out.names("volumes")) == ("failed", None, [])
    assert "another run" in str(record.reason)
    with exclusive(out) as again:
        assert prepare_file(Job(source, out.at(""), SMALL, holder=again.token)).state == "prepared"
