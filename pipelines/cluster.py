"""Jobs -> records on Dask: a local cluster of threads, or a running cluster. Only this file uses Dask."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from asyncio import CancelledError
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import CancelledError as FutureCancelledError
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, wait
from distributed.comm import CommClosedError
from distributed.system import MEMORY_LIMIT

from photon_data.errors import UsageError
from photon_data.records import FAILED, OUT_FULL, UNABLE, NoSpace, SomeWork, VolumeRecord, Work, record_of

# A worker needs about 0.4 GB for axis-aligned scans and 1.5 GB for oblique or float ones.
WORKER_BYTES = 1_500_000_000
MIN_ADDRESS_SPACE_BYTES = 4 << 30
MIN_MEMORY_GB = 1.0
NO_WORKERS_S = 120

# What says that a scheduler, or the connection to it, is gone. FuturesCancelledError of distributed is the second.
LOST = (CancelledError, FutureCancelledError, CommClosedError, TimeoutError, OSError)
# A local cluster is this process's own: it serves no pages, keeps no long logs, takes no samples of its threads.
LOCAL = {
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.worker.profile.enabled": False,
    "distributed.admin.low-level-log-length": 100,
}
LOOPBACK = "127.0.0.1:0"

# (job as JSON, timeout_s, address_space_bytes) -> record as JSON, or what there is instead (see `run_isolated`). Dask
# pickles it: a function of a module.
Task = Callable[[dict[str, Any], float, int], dict[str, Any]]


class Stopped(RuntimeError):
    """The run cannot go on; what is done is kept."""


@dataclass(frozen=True)
class Workers:
    """Where jobs run and what each may use."""

    count: int | None = None  # local workers; None: from cores and memory
    scheduler: str | None = None  # address ("tcp://host:8786") or scheduler file of a cluster to use instead
    timeout_s: float = 1800  # a file that takes longer has failed
    # Address space of one worker's process. None: its share of the memory, at least 4 GiB; 0: no limit.
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        """UsageError for a memory limit under which no worker could start."""
        if 0 < (self.memory_gb or 0) < MIN_MEMORY_GB:
            expected = f"at least {MIN_MEMORY_GB} GB (or 0 for no limit)"
            raise UsageError(f"--memory: expected {expected}, found {self.memory_gb}")

    def local_count(self) -> int:
        """Return how many local workers there are."""
        by_memory = int(0.8 * MEMORY_LIMIT / WORKER_BYTES)
        return self.count or max(1, min(dask.system.CPU_COUNT, by_memory))  # it knows affinity and control groups

    def address_space_bytes(self) -> int:
        """Return the limit of each worker's process, 0 for none."""
        if self.memory_gb is not None:
            return int(self.memory_gb * 1e9)
        return max(MIN_ADDRESS_SPACE_BYTES, MEMORY_LIMIT // self.local_count())


def execute(
    jobs: list[SomeWork], task: Task, workers: Workers, session: contextlib.AbstractContextManager[None]
) -> Generator[VolumeRecord, None, None]:
    """Yield the record of every job as it ends. Large jobs start first; two jobs per thread are in flight.

    The list is used up: a job takes memory until it is done. A local cluster runs the task within `session`. It is left
    when the loop ends; leaving it must end what still runs. Raises NoSpace when the output is full, and Stopped when no
    worker is left, when the scheduler is gone, and when a worker cannot run the task.
    """
    if not jobs:
        return
    jobs.sort(key=lambda job: job.source.bytes)
    limits = workers.timeout_s, workers.address_space_bytes()
    in_flight: dict[Future, SomeWork] = {}
    try:
        with _client(workers, session) as client:
            most = 2 * _threads(client)
            while jobs or in_flight:
                while jobs and len(in_flight) < most:
                    job = jobs.pop()
                    in_flight[client.submit(task, job.to_json(), *limits, pure=False)] = job
                for future in _finished(client, in_flight):
                    yield _record(future, in_flight.pop(future))
    except NoSpace:
        raise
    except LOST as error:
        if workers.scheduler is None:
            raise
        found = f"the connection to {workers.scheduler} was lost ({type(error).__name__})"
        raise Stopped(f"expected a scheduler, but {found}; start one and run the same command again") from None


@contextlib.contextmanager
def _client(workers: Workers, session: contextlib.AbstractContextManager[None]) -> Iterator[Client]:
    """Yield a client of the cluster that `workers` names. A local cluster ends with the block."""
    if workers.scheduler is not None:
        for name in ("distributed", "distributed.client"):  # a lost connection is told in a sentence
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with _connect(workers.scheduler) as client:
            _refuse_other_versions(client)
            yield client
        return
    with (
        tempfile.TemporaryDirectory(prefix="photon-workers-") as scratch,
        dask.config.set(LOCAL),
        LocalCluster(
            local_directory=scratch,  # else Dask leaves a folder behind
            n_workers=1,
            threads_per_worker=workers.local_count(),
            processes=False,
            memory_limit=0,  # the memory is the children's, and they are limited
            dashboard_address=LOOPBACK,  # without an address, Dask listens on all interfaces
            worker_dashboard_address=LOOPBACK,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
        session,
    ):
        yield client


def _connect(scheduler: str) -> Client:
    """Return a client of a running cluster that has workers; UsageError where there is none."""
    where = {"scheduler_file": scheduler} if Path(scheduler).exists() else {"address": scheduler}
    try:
        client = Client(**where, timeout=30)
    except (ValueError, AssertionError, OSError, TimeoutError) as error:
        expected = "the address (tcp://host:8786) or the file of a running Dask scheduler"
        found = f"{scheduler!r} ({type(error).__name__})"
        raise UsageError(f"--scheduler: expected {expected}, found {found}") from None
    try:
        client.wait_for_workers(1, timeout=NO_WORKERS_S)
    except TimeoutError:
        client.close()
        raise _no_workers(scheduler) from None
    return client


def _refuse_other_versions(client: Client) -> None:
    """Stopped where a worker lacks this version of photon-ct: it could not run the task, or would make other bytes."""

    def version_there() -> str:  # a function of a function: Dask sends its code, not the name of its module
        import importlib

        try:
            importlib.import_module("photon_pipelines.child")
            return importlib.metadata.version("photon-ct")
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    here = version("photon-ct")
    others = {address: found for address, found in client.run(version_there).items() if found != here}
    if others:
        address, found = next(iter(others.items()))
        raise Stopped(f"expected photon-ct {here} on every worker, found {found} on {address}; install it there")


def _threads(client: Client) -> int:
    return sum(client.nthreads().values())


def _finished(client: Client, in_flight: Mapping[Future, Work]) -> list[Future]:
    """Wait until some of the futures are done and return those; Stopped if there was no worker for NO_WORKERS_S."""
    last_worker_s = time.monotonic()
    while time.monotonic() - last_worker_s <= NO_WORKERS_S:
        try:
            return list(wait(list(in_flight), timeout=2, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            if _threads(client):
                last_worker_s = time.monotonic()
    raise _no_workers("the scheduler")


def _no_workers(scheduler: str) -> Stopped:
    found = f"none connected to {scheduler} for {NO_WORKERS_S} s"
    return Stopped(f"expected workers, found {found}; start some and run it again")


def _record(future: Future, job: Work) -> VolumeRecord:
    """Return the record of a finished future; NoSpace where it found the output full, Stopped where it cannot run."""
    found = None
    if future.status == "finished":
        reply = future.result()
        if OUT_FULL in reply:
            raise NoSpace(*reply[OUT_FULL])
        if UNABLE not in reply:
            return VolumeRecord.from_json(reply)
        found = reply[UNABLE]
    elif future.status == "error" and not isinstance(error := future.exception(), KilledWorker):
        found = f"{type(error).__name__}: {error}"
    if found:
        remedy = "the same photon-ct has to be installed there as here; then run the same command again"
        found = " ".join(found.split())[:300]
        raise Stopped(f"expected that every worker and the scheduler can run the task, found {found}; {remedy}")
    reason = "its Dask worker was lost, more than once, or refused it; run the same command again"
    return record_of(job, FAILED, code="worker-lost", reason=reason)
