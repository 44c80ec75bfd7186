"""Groups of requests -> batches, which may hold questions on several volumes; threads read volumes ahead.

Threads and not processes: most of reading (decompression, scaling, moving) is done outside of Python's lock, volumes
need not be copied between processes, and a container's small /dev/shm does not matter.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from typing import Any, Generic, NamedTuple, TypeVar

import psutil
import torch
from dask.system import CPU_COUNT  # knows affinity and control groups, on any system

from photon_train.answering.generation import AnswerSettings
from photon_train.answering.request import Request, RequestGroup, request_of, texts_of_choices
from photon_train.configuration_photon import PhotonConfig
from photon_train.processing_photon import PhotonProcessor
from photon_train.rows import Row, prefix_of

T = TypeVar("T")
MOST_ROWS, MOST_ROWS_CPU = 64, 16  # more do not make a GPU, or a CPU, faster
TEXT_TOKENS = 512  # of a long question
SHARE_OF_MEMORY = 0.7  # of what is free, for rows; the rest is for what was not counted
MOST_READERS = 8


def group_rows(
    rows: Sequence[Row], processor: PhotonProcessor, *, choices: bool = False
) -> tuple[list[RequestGroup], dict[str, str]]:
    """Return the groups of rows that share a prefix, in an order that theirs does not change, and {id: why in none}.

    Groups that can share a batch stand together. `choices`: those of the rows are to be scored, so they are looked at.
    """
    requests: dict[tuple[Any, ...], list[Request]] = defaultdict(list)
    problems: dict[str, str] = {}
    for row in rows:
        try:
            request = request_of(row, processor)
            prefix = prefix_of(request.row)
            if choices:
                texts_of_choices(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # whatever a row that is no row can raise
            reason = f"expected a row of messages and videos, found one that gives {type(error).__name__}: {error}"
            problems[str(row["id"])] = str(error) if isinstance(error, ValueError) else reason
        else:
            requests[prefix].append(request)
    groups = [
        RequestGroup(tuple(found[0].row.get("videos") or ()), sorted(found, key=lambda request: request.id))
        for found in requests.values()
    ]
    return sorted(groups, key=lambda group: (group.shape, group.name, group.requests[0].id)), problems


class Asked(NamedTuple):
    """A request, and the place of its group among all groups."""

    request: Request
    group: int


def batches_of(
    groups: Sequence[RequestGroup], size: Callable[[], int], *, alone: bool = False
) -> Iterator[list[Asked]]:
    """Yield all requests in the order of their groups, at most size() at a time, which may change.

    A batch holds requests of groups of one shape; `alone`: of one group.
    """
    batch: list[Asked] = []
    for place, group in enumerate(groups):
        for request in group.requests:
            is_other = batch and (groups[batch[0].group].shape != group.shape or (alone and batch[0].group != place))
            if batch and (is_other or len(batch) >= size()):
                yield batch
                batch = []
            batch.append(Asked(request, place))
    if batch:
        yield batch


class ReadAhead(Generic[T]):
    """Reads items by threads, in the order in which they will be needed. `waited_s`: how long `get` waited for them."""

    def __init__(self, read: Callable[[int], T], threads: int) -> None:
        self.read, self.waited_s = read, 0.0
        self._pool = ThreadPoolExecutor(threads, "photon-read") if threads else None
        self._futures: dict[int, Future[T]] = {}

    def ask(self, items: Sequence[int]) -> None:
        """Start to read the items."""
        for item in items:
            if self._pool and item not in self._futures:
                self._futures[item] = self._pool.submit(self.read, item)

    def get(self, item: int) -> T:
        """Return what was read, and let go of it. Raises what reading raises."""
        start = time.perf_counter()
        try:
            future = self._futures.pop(item, None)
            return self.read(item) if future is None else future.result()
        finally:
            self.waited_s += time.perf_counter() - start

    def close(self) -> None:
        """Give up what nobody waits for."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def reading_ahead(read: Callable[[int], T], threads: int) -> Iterator[ReadAhead[T]]:
    """Give a ReadAhead that is closed at the end."""
    ahead = ReadAhead(read, threads)
    try:
        yield ahead
    finally:
        ahead.close()


def reader_count() -> int:
    """Return how many threads read: one for each core that this process may use but one, at least 1."""
    return min(MOST_READERS, max(1, CPU_COUNT - 1))


def rows_that_fit(config: PhotonConfig, settings: AnswerSettings, device: torch.device, dtype: torch.dtype) -> int:
    """Return how many questions, a volume for each, are answered together in the memory that is free: a power of two.

    What a row takes is counted as if no token were dropped. Where it is too much after all, batches are halved.
    """
    if device.type == "cuda":
        free_bytes, most = torch.cuda.mem_get_info(device)[0], MOST_ROWS
    else:
        free_bytes, most = psutil.virtual_memory().available, MOST_ROWS_CPU
    fitting = int(SHARE_OF_MEMORY * free_bytes / bytes_of_row(config, settings, dtype)) // settings.samples
    return 1 << (min(max(fitting, 1), most).bit_length() - 1)


def bytes_of_row(config: PhotonConfig, settings: AnswerSettings, dtype: torch.dtype) -> int:
    """Return about how many bytes a question on one volume takes at its peak."""
    text, vision = config.text_config, config.vision_config
    patches, tokens = prod(config.patches_thw), prod(config.tokens_thw) + TEXT_TOKENS
    head_dim = text.hidden_size // text.num_attention_heads
    of_cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * (tokens + settings.max_new_tokens)
    of_layer = tokens * (6 * text.hidden_size + 3 * text.intermediate_size)
    of_tower = patches * (8 * vision.hidden_size + 3 * vision.intermediate_size)
    voxels = prod(config.model_shape_zyx)
    # A row's part of the prefix is there twice. Logits and voxels are float32; the former are copied a few times.
    return dtype.itemsize * (2 * of_cache + max(of_layer, of_tower)) + 4 * (4 * text.vocab_size + 2 * voxels)
