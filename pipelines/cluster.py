"""Jobs -> records on Dask: a local cluster of threads, or a running cluster. Only this file uses Dask."""

from __future__ import annotations

import contextlib
import logging
import time
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Future, LocalCluster, wait
from distributed.comm import CommClosedError
from distributed.system import MEMORY_LIMIT

from photon_data.errors import UsageError
from photon_data.records import FAILED, NoSpace, VolumeRecord, Work, record_of

# A worker needs about 0.4 GB for axis-aligned scans and 1.5 GB for oblique or float ones.
WORKER_BYTES = 1_500_000_000
MIN_ADDRESS_SPACE_BYTES = 4 << 30
MIN_MEMORY_GB = 1.0
NO_WORKERS_S = 120

# (job as JSON, timeout_s, address_space_bytes) -> record as JSON, or NoSpace. Dask pickles it: a function of a module.
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
    jobs: Iterable[Work], task: Task, workers: Workers, session: contextlib.AbstractContextManager[None]
) -> Generator[VolumeRecord, None, None]:
    """Yield the record of every job as it ends. Large jobs start first; two jobs per thread are in flight.

    A local cluster runs the task within `session`. It is left when the loop ends; leaving it must end what still runs.
    Raises NoSpace when the output is full and Stopped when no worker is left.
    """
    queue = deque(sorted(jobs, key=lambda job: job.source.bytes, reverse=True))
    limits = workers.timeout_s, workers.address_space_bytes()
    in_flight: dict[Future, Work] = {}
    with _client(workers, session) as client:
        most = 2 * _threads(client)
        while queue or in_flight:
            while queue and len(in_flight) < most:
                job = queue.popleft()
                in_flight[client.submit(task, job.to_json(), *limits, pure=False)] = job
            for future in _finished(client, in_flight):
                yield _record(future, in_flight.pop(future))


@contextlib.contextmanager
def _client(workers: Workers, session: contextlib.AbstractContextManager[None]) -> Iterator[Client]:
    """Yield a client of the cluster that `workers` names. A local cluster ends with the block."""
    if workers.scheduler is not None:
        with _connect(workers.scheduler) as client:
            yield client
        return
    cluster = LocalCluster(
        n_workers=1,
        threads_per_worker=workers.local_count(),
        processes=False,
        memory_limit=0,  # the memory is the children's, and they are limited
        dashboard_address="127.0.0.1:0",
        silence_logs=logging.CRITICAL,
    )
    with cluster, Client(cluster) as client, session:
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


def _threads(client: Client) -> int:
    return sum(client.nthreads().values())


def _finished(client: Client, in_flight: dict[Future, Work]) -> list[Future]:
    """Wait until some of the futures are done and return those; Stopped if there was no worker for NO_WORKERS_S."""
    last_worker_s = time.monotonic()
    while time.monotonic() - last_worker_s <= NO_WORKERS_S:
        try:
            return list(wait(list(in_flight), timeout=2, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            if _threads(client):
                last_worker_s = time.monotonic()
        except (CancelledError, CommClosedError):
            lost = "the connection to it was lost; start one and run the same command again"
            raise Stopped(f"expected a scheduler, but {lost}") from None
    raise _no_workers("the scheduler")


def _no_workers(scheduler: str) -> Stopped:
    found = f"none connected to {scheduler} for {NO_WORKERS_S} s"
    return Stopped(f"expected workers, found {found}; start some and run it again")


def _record(future: Future, job: Work) -> VolumeRecord:
    """Return the record of a finished future; NoSpace where the task raised it."""
    if future.status == "finished":
        return VolumeRecord.from_json(future.result())
    error = future.exception() if future.status == "error" else None
    if isinstance(error, NoSpace):
        raise error
    reason = "its Dask worker was lost, more than once, or refused it; run the same command again"
    return record_of(job, FAILED, code="worker-lost", reason=reason)
