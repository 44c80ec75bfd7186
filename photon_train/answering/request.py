"""Rows -> requests: what is asked, without its given answer; those that share a prefix form a group.

Groups -> batches, which may hold questions on several volumes. Threads read volumes ahead, and not processes: most of
reading (decompression, scaling, moving) is done outside of Python's lock, volumes need not be copied between processes,
and a container's small /dev/shm does not matter.

Legend: L tokens of a row, N tokens of an answer.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from dask.system import CPU_COUNT  # knows affinity and control groups, on any system
from torch import Tensor

from photon_data.errors import UsageError
from photon_data.questions.question import LETTERS
from photon_train.rows import Row, choices_of, prefix_of, prompt_of, question_digest, without_answer
from photon_train.scheduling import prefix_length

# A prompt that wants a letter, of a row that has no answer to show it; and 3D-RAD's, which wants "B. No".
WANTS_LETTER = re.compile(r"\bletter\b", re.IGNORECASE)
LETTERED, ASKED = re.compile(r"\bChoices: A\. "), "\nAnswer:"  # what a prompt that wants "B. No" has, and ends with
MOST_READERS = 8
T = TypeVar("T")


class Request(NamedTuple):
    """A row to answer, without its given answer."""

    row: Row
    suffix_L: Tensor  # int64, the ids behind the shared prefix
    digest: str  # the `question_digest` of the row
    start: int = 0  # tokens of the shared prefix

    @property
    def id(self) -> str:
        """The row's id."""
        return str(self.row["id"])


class RequestGroup(NamedTuple):
    """Requests on one prefix."""

    videos: tuple[Any, ...]  # paths or Volumes; none for text alone
    requests: list[Request]

    @property
    def name(self) -> str:
        """The paths of the volumes; "" for text alone, and for volumes in memory."""
        return "\n".join(str(video) for video in self.videos if isinstance(video, str | Path))

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of the prefix and number of volumes. Groups that agree in both can share a batch."""
        return self.requests[0].start, len(self.videos)


def request_of(row: Row, processor: Any) -> Request:
    """Return the row as a request of a PhotonProcessor, without its answer. ValueError for one that cannot be asked."""
    question = without_answer(row)
    ids_L = processor.ids(question)
    start = prefix_length(ids_L, processor.config)
    return Request(question, ids_L[start:].clone(), question_digest(row), start)


def texts_of_choices(row: Row) -> dict[str, str]:
    """Return {choice: what the assistant says for it}, in the form that the prompt asks for and the answer has.

    choices Yes, No: answer "No" -> {"Yes": "Yes", "No": "No"}; "B" -> {"Yes": "A", "No": "B"}; "B. No" -> "A. Yes", ...
    Of a row without an answer the prompt tells the form. UsageError for more choices than letters.
    """
    choices, answer = choices_of(row), str(row.get("answer") or "").strip()
    letters = dict(zip(choices, LETTERS, strict=False))
    lettered = {choice: f"{letter}. {choice}" for choice, letter in letters.items()}
    prompt = prompt_of(row)
    if answer in choices or (answer and answer not in (*letters.values(), *lettered.values())):
        return {choice: choice for choice in choices}
    wants_letter = answer in letters.values() if answer else bool(WANTS_LETTER.search(prompt))
    ends_so = prompt.rstrip().endswith(ASKED)
    wants_lettered = answer in lettered.values() if answer else ends_so and bool(LETTERED.search(prompt))
    if (wants_letter or wants_lettered) and len(choices) > len(LETTERS):
        found = f"found {len(choices)}"
        raise UsageError(f"{row.get('id')}: expected at most {len(LETTERS)} choices of a prompt with letters, {found}")
    return letters if wants_letter else lettered if wants_lettered else {choice: choice for choice in choices}


def answer_ids(request: Request, text: str, processor: Any) -> Tensor:
    """Return int64[N]: the ids that the assistant answers `text` with, the end marker included, as training sees them.

    ValueError where the text changes how the prompt itself becomes ids.
    """
    answered = {**request.row, "messages": [*request.row["messages"], {"role": "assistant", "content": text}]}
    ids_L, prompt_L = processor.ids(answered, for_training=True), processor.ids(request.row)
    if not ids_L[: len(prompt_L)].equal(prompt_L):
        expected = "an answer that leaves the prompt's tokens as they are"
        raise ValueError(f"{request.id}: expected {expected}, found {text!r}; remove space at its start")
    end = int((ids_L == processor.config.im_end_token_id).nonzero()[-1]) + 1
    return ids_L[len(prompt_L) : end]


def group_rows(
    rows: Sequence[Row], processor: Any, *, choices: bool = False
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
