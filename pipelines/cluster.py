"""Jobs -> replies on Dask: a local cluster of threads, or a running cluster. Only this file uses Dask."""

from __future__ import annotations

import contextlib
import logging
import socket
import tempfile
import time
import uuid
from asyncio import CancelledError
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError as FutureCancelledError
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, get_worker
from distributed.comm import CommClosedError
from distributed.system import MEMORY_LIMIT

from photon_data.bucket import Bucket
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.lock import Hold, is_held_by
from photon_data.records import DIED, FAILED, OUT_FULL, UNABLE, NoSpace, SomeWork, VolumeRecord, Work, record_of
from photon_data.scan import Source, is_url
from photon_pipelines.child import end_children, run_isolated

# A worker needs about 0.4 GB for axis-aligned scans and 1.5 GB for oblique or float ones.
WORKER_BYTES = 1_500_000_000
MIN_ADDRESS_SPACE_BYTES = 4 << 30
MIN_MEMORY_GB = 1.0
NO_WORKERS_S = 120
FEW = 32  # stores, which are read in about the time in which local workers start
LOOK_S = 1.0  # how often the workers are counted
# A file that was just written may be seen later on another host: NFS remembers for 30 s that there was none.
SEEN_S = 40.0

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

Reply = dict[str, Any]
# (job as JSON, timeout_s, address_space_bytes, run) -> reply, see `run_isolated`. Dask pickles it: a function of a
# module.
Task = Callable[[dict[str, Any], float, int, str], Reply]


class AnyJob(Protocol):
    """What is executed."""

    def to_json(self) -> dict[str, Any]: ...  # noqa: D102


SomeJob = TypeVar("SomeJob", bound=AnyJob)


class Stopped(RuntimeError):
    """The run cannot go on; what is done is kept."""


@dataclass(frozen=True)
class Workers:
    """Where jobs run and what each may use."""

    count: int | None = None  # local workers; None: from cores and memory
    scheduler: str | None = None  # address ("tcp://host:8786") or scheduler file of a cluster to use instead
    timeout_s: float = 1800  # a file that takes longer has failed
    # Address space of the process of one thread. None: its share of the worker's memory, at least 4 GiB; 0: no limit.
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


class Needs(NamedTuple):
    """What every worker of a cluster must have: this version, SOURCE and OUT."""

    # Paths or URLs that it must see, their sizes, and what they may be called in a sentence.
    files: tuple[tuple[str, int, str], ...] = ()
    out: str = ""  # the folder or URL that the run holds ...
    holder: str = ""  # ... and the token that is in its lock: a folder of the same name is not enough


def needs_of(out: Location, name: str) -> Needs:
    """Return that workers must see a file of a prepared folder that they are to read."""
    size = out.size(name) if out.is_local else None
    return Needs() if size is None else Needs(((out.at(name), size, out.at(name)),))


def pays(workers: Workers, jobs: int) -> bool:
    """Tell whether so many short jobs are done sooner by these workers, which take seconds to start, than here."""
    return workers.scheduler is not None or (workers.local_count() > 1 and jobs >= FEW)


def prepared(jobs: list[SomeWork], workers: Workers, hold: Hold | None = None) -> Generator[VolumeRecord, None, None]:
    """Yield the record of every scan, or its masks, as its job ends, of the largest first; the list is used up."""
    task = partial(run_isolated, module="photon_pipelines.scan_job", holder=hold.token if hold else "")
    jobs.sort(key=lambda job: job.source.bytes)
    with contextlib.closing(execute(jobs, task, workers, _needs_of_jobs(jobs, hold))) as finished:
        for job, reply in finished:
            if DIED in reply:
                code, reason, seconds = reply[DIED]
                yield record_of(job, FAILED, code=code, reason=reason, seconds=seconds)
            else:
                yield VolumeRecord.from_json(reply)


def _needs_of_jobs(jobs: Sequence[Work], hold: Hold | None) -> Needs:
    """Return what workers must see: a file below each source folder, and OUT."""
    sources = {job.source.root: job.source for job in jobs if job.source.names}
    there = tuple(need for one in sources.values() if (need := _needed_file(one)))
    return Needs(there, hold.out.at(""), hold.token) if hold else Needs(there)


def _needed_file(source: Source) -> tuple[str, int, str] | None:
    """Return the path or the URL of a file of a source, its size, and its name in a sentence; None if it is gone."""
    place = f"{source.root}/{source.names[0]}" if is_url(source.root) else str(source.files[0])
    try:
        return place, _size_of(place), "a file of SOURCE" if source.hidden else place
    except Exception as error:
        if not (isinstance(error, OSError) or is_url(place)):
            raise
        return None


def _size_of(place: str) -> int:
    folder, _, name = place.rpartition("/")
    return Bucket(folder).entry(name).size if is_url(place) else Path(place).stat().st_size


def execute(
    jobs: list[SomeJob], task: Task, workers: Workers, needs: Needs | None = None
) -> Generator[tuple[SomeJob, Reply], None, None]:
    """Yield (job, reply) of every job as it ends; {DIED: [code, reason, seconds]} of one whose process died.

    The last of the list starts first; two jobs are in flight for each thread that the cluster has at the moment. The
    list is used up: a job takes memory until it is done. When the loop ends, what still runs for it is ended. Raises
    NoSpace when the output is full, and Stopped when no worker is left, when the scheduler is gone, and when a worker
    cannot run the task or lacks what it `needs`.
    """
    if not jobs:
        return
    run, done = uuid.uuid4().hex, SimpleQueue[Future]()
    in_flight: dict[Future, SomeJob] = {}
    try:
        with _client(workers, needs or Needs(), run) as client:
            call = partial(_do, task, workers, needs if workers.scheduler else None, run)
            threads = _Threads(client)
            while jobs or in_flight:
                most = 2 * max(1, threads.count())
                while jobs and len(in_flight) < most:
                    job = jobs.pop()
                    future = client.submit(call, job.to_json(), pure=False)
                    in_flight[future] = job
                    future.add_done_callback(done.put)
                for future in _finished(done):
                    yield in_flight.pop(future), _reply(future)
    except NoSpace:
        raise
    except LOST as error:
        if workers.scheduler is None:
            raise
        found = f"the connection to {workers.scheduler} was lost ({type(error).__name__})"
        raise Stopped(f"expected a scheduler, but {found}; start one and run the same command again") from None


def _do(task: Task, workers: Workers, needs: Needs | None, run: str, job: dict[str, Any]) -> Reply:
    """Return the reply of a task. This is what a worker runs, also one that joined after the run began."""
    if needs is not None and (lacking := _lacking_once(needs, run)):
        return {UNABLE: lacking}
    worker = get_worker()
    if workers.memory_gb is not None:
        limit = int(workers.memory_gb * 1e9)
    else:
        memory = worker.memory_manager.memory_limit or MEMORY_LIMIT  # both know the limits of a control group
        limit = max(MIN_ADDRESS_SPACE_BYTES, memory // worker.state.nthreads)
    return task(job, workers.timeout_s, limit, run)


def lacking_here(needs: Needs) -> str:
    """Return what this host lacks of what a run needs, as a sentence; "" where it has all."""
    for path, size, name in needs.files:
        try:
            found = _size_of(path)
        except Exception as error:
            if is_url(path):  # its error may quote what it should not
                remedy = "it needs the extra cloud, and credentials for that store"
                return f"{socket.gethostname()} cannot read {name} ({type(error).__name__}); {remedy}"
            if not isinstance(error, OSError):
                raise
            return f"{socket.gethostname()} cannot see {name} ({error.strerror}); mount it there, by the same path"
        if found != size:
            return f"{socket.gethostname()} sees another file as {name} ({found:,} bytes instead of {size:,})"
    end_s = time.monotonic() + SEEN_S
    try:
        while needs.holder and not is_held_by(Location(needs.out), needs.holder, strictly=True):
            if time.monotonic() > end_s:
                return f"{socket.gethostname()} does not see OUT, {needs.out}; mount it there, by the same path"
            time.sleep(0.5)
    except Exception as error:  # of an object store; outside of here, Dask would log it with the job and names in it
        return f"{socket.gethostname()} cannot read OUT, {needs.out} ({type(error).__name__}: {error})"
    return ""


@lru_cache(32)
def _lacking_once(needs: Needs, run: str) -> str:  # by run: what was lacking may be there for the next one
    return lacking_here(needs)


@contextlib.contextmanager
def _client(workers: Workers, needs: Needs, run: str) -> Iterator[Client]:
    """Yield a client of the cluster that `workers` names. A local cluster ends with the block, children of any do."""
    if workers.scheduler is not None:
        for name in ("distributed", "distributed.client"):  # a lost connection is told in a sentence
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with _connect(workers.scheduler) as client:
            _refuse_unable(client, needs)
            try:
                yield client
            finally:
                if client.status == "running":
                    with contextlib.suppress(*LOST):
                        client.run(end_children, run, on_error="ignore")
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
        contextlib.ExitStack() as stack,
    ):
        stack.callback(end_children, run)
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


def _refuse_unable(client: Client, needs: Needs) -> None:
    """Stopped where a worker lacks SOURCE, OUT or this version of photon-ct, which alone makes the same bytes."""

    def ask(version_here: str, needs: tuple[Any, ...]) -> str:  # Dask sends its code, not the name of its module
        import importlib
        import importlib.metadata

        try:
            cluster = importlib.import_module("photon_pipelines.cluster")
            found = importlib.metadata.version("photon-ct")
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        if found != version_here:
            return f"expected photon-ct {version_here} on every worker, found {found}"
        lacking = cluster.lacking_here(cluster.Needs(*needs))
        return lacking and f"expected that every worker sees SOURCE and OUT, but {lacking}"

    said = client.run(ask, version("photon-ct"), tuple(needs))
    unable = {address: text for address, text in said.items() if text}
    if unable:
        address, text = next(iter(unable.items()))
        others = f" and {len(unable) - 1} other workers" if len(unable) > 1 else ""
        raise Stopped(f"{text} (on {address}{others}). Install or mount it there, or take such workers away")


class _Threads:
    """How many threads the workers have that are there now."""

    def __init__(self, client: Client) -> None:
        self.client, self.threads, self.due_s, self.seen_s = client, 0, 0.0, time.monotonic()

    def count(self) -> int:
        """Return the number, asked anew every LOOK_S; Stopped if there was no worker for NO_WORKERS_S."""
        if (now_s := time.monotonic()) >= self.due_s:
            self.threads, self.due_s = sum(self.client.nthreads().values()), now_s + LOOK_S
            if self.threads:
                self.seen_s = now_s
            elif now_s - self.seen_s > NO_WORKERS_S:
                raise _no_workers("the scheduler")
        return self.threads


def _finished(done: SimpleQueue[Future]) -> list[Future]:
    """Return the futures that are done, after LOOK_S at most: none if there are none then."""
    found = []
    with contextlib.suppress(Empty):
        found.append(done.get(timeout=LOOK_S))
        while True:
            found.append(done.get_nowait())
    return found


def _no_workers(scheduler: str) -> Stopped:
    found = f"none connected to {scheduler} for {NO_WORKERS_S} s"
    return Stopped(f"expected workers, found {found}; start some and run it again")


def _reply(future: Future) -> Reply:
    """Return the reply of a finished future; NoSpace where it found the output full, Stopped where it cannot run."""
    if future.status == "error":
        if isinstance(error := future.exception(), KilledWorker):
            reason = "its Dask worker was lost, more than once, or refused it; run the same command again"
            return {DIED: ["worker-lost", reason, None]}
        found = f"{type(error).__name__}: {error}"
    else:
        reply: Reply = future.result()
        if OUT_FULL in reply:
            raise NoSpace(*reply[OUT_FULL])
        if UNABLE not in reply:
            return reply
        found = reply[UNABLE]
    remedy = "the same photon-ct has to be installed there as here; then run the same command again"
    found = " ".join(found.split())[:300]
    raise Stopped(f"expected that every worker and the scheduler can run the task, found {found}; {remedy}")
