"""Jobs -> records on Dask: a local cluster of threads that each own a child process, or any cluster that is already there."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from asyncio import CancelledError
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import dask
from distributed import Client, Future, LocalCluster, wait
from distributed.comm import CommClosedError
from distributed.system import MEMORY_LIMIT

from photon_data.errors import UsageError
from photon_data.prepare_file import Job, NoSpace
from photon_data.records import FAILED, VolumeRecord
from photon_pipelines.child import NO_SPACE, allow_children, end_children, run_isolated

# A worker needs about 0.4 GB for axis-aligned scans and 1.5 GB for oblique or float ones.
WORKER_BYTES = 1_500_000_000
LEAST_ADDRESS_SPACE = 4 << 30
NO_WORKERS_S = 120
LEAST_MEMORY_GB = 1.0


class Stopped(RuntimeError):
    """The run cannot go on; what is done is kept."""


@dataclass(frozen=True)
class Workers:
    """Where jobs run and what each may use.

    count      local workers (None: from cores and memory)
    scheduler  address ("tcp://host:8786") or scheduler file of a cluster to use instead
    timeout_s  a file that takes longer has failed
    memory_gb  address space of one worker's process (None: its share of the memory, at least 4 GiB; 0: no limit)
    """

    count: int | None = None
    scheduler: str | None = None
    timeout_s: float = 1800
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        """UsageError for a memory limit under which no worker could start."""
        if self.memory_gb is not None and 0 < self.memory_gb < LEAST_MEMORY_GB:
            raise UsageError(f"--memory: at least {LEAST_MEMORY_GB} GB (or 0 for no limit) wanted, got {self.memory_gb}")

    def local_count(self) -> int:
        """Return how many local workers there are."""
        by_memory = int(0.8 * MEMORY_LIMIT / WORKER_BYTES)
        return self.count or max(1, min(len(os.sched_getaffinity(0)), dask.system.CPU_COUNT, by_memory))

    def address_space_bytes(self) -> int:
        """Return the limit of each worker's process, 0 for none."""
        if self.memory_gb is not None:
            return int(self.memory_gb * 1e9)
        return max(LEAST_ADDRESS_SPACE, MEMORY_LIMIT // self.local_count())


def execute(jobs: Iterable[Job], workers: Workers) -> Generator[VolumeRecord, None, None]:
    """Yield the record of every job as it ends, largest first; at most twice as many jobs are in flight as there are threads.

    Raises NoSpace when the output is full and Stopped when no worker is left. Leaving the loop ends what is in flight.
    """
    queue = deque(sorted(jobs, key=lambda job: job.source.bytes, reverse=True))
    limits = workers.timeout_s, workers.address_space_bytes()
    flying: dict[Future, Job] = {}
    with _client(workers) as client:
        places = 2 * _threads(client)
        while queue or flying:
            while queue and len(flying) < places:
                job = queue.popleft()
                flying[client.submit(run_isolated, job.to_json(), *limits, pure=False)] = job
            for future in _finished(client, flying):
                yield _record(future, flying.pop(future))


def _finished(client: Client, flying: dict[Future, Job]) -> list[Future]:
    """Wait until some of the futures are done and return those; Stopped if no worker has been there for NO_WORKERS_S."""
    alone_since = None
    while True:
        try:
            return list(wait(list(flying), timeout=2, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            pass
        except (CancelledError, CommClosedError):
            raise Stopped(
                "a scheduler wanted, but the connection to it was lost; start one and run the same command again"
            ) from None
        if _threads(client):
            alone_since = None
        else:
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > NO_WORKERS_S:
                raise Stopped(
                    f"workers wanted, none connected to the scheduler for {NO_WORKERS_S} s; start some and run it again"
                )


def _record(future: Future, job: Job) -> VolumeRecord:
    """Return the record of a finished future; NoSpace if it says so. Only Dask itself (a lost worker) can make one fail."""
    if future.status != "finished":
        reason = "its Dask worker was lost, more than once, or refused it; run the same command again"
        return job.record(FAILED, code="worker-lost", reason=reason)
    reply = future.result()
    if NO_SPACE in reply:
        raise NoSpace(errno.ENOSPC, reply[NO_SPACE])
    return VolumeRecord.from_json(reply)


@contextlib.contextmanager
def _client(workers: Workers) -> Iterator[Client]:
    """Yield a client of the cluster that `workers` names; a local one ends with the block, its children at once."""
    with contextlib.ExitStack() as stack:
        if workers.scheduler is None:
            cluster = LocalCluster(
                n_workers=1,
                threads_per_worker=workers.local_count(),
                processes=False,
                memory_limit=0,  # the memory is the children's, and they are limited
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
            )
            stack.enter_context(cluster)
            client = stack.enter_context(Client(cluster))
            allow_children()
            stack.callback(end_children)
        else:
            client = stack.enter_context(_connect(workers.scheduler))
        yield client


def _connect(scheduler: str) -> Client:
    """Return a client of a running cluster that has workers; UsageError where there is none."""
    where = {"scheduler_file": scheduler} if Path(scheduler).exists() else {"address": scheduler}
    try:
        client = Client(**where, timeout=30)
    except (ValueError, AssertionError, OSError, TimeoutError) as error:
        raise UsageError(
            f"--scheduler: the address (tcp://host:8786) or the file of a running Dask scheduler wanted, got {scheduler!r} "
            f"({type(error).__name__})"
        ) from None
    try:
        client.wait_for_workers(1, timeout=NO_WORKERS_S)
    except TimeoutError:
        client.close()
        raise Stopped(
            f"workers wanted, none connected to {scheduler} within {NO_WORKERS_S} s; start some and run it again"
        ) from None
    return client


def _threads(client: Client) -> int:
    return sum(client.nthreads().values())
