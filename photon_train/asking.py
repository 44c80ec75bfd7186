"""One scan and some questions -> answers, on one encoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from photon_data.errors import UsageError
from photon_train.answering import Asker, Reply, with_seconds
from photon_train.grouping import group_rows
from photon_train.processing_photon import TAG
from photon_train.scan_input import ScanInput


class Asked(NamedTuple):
    """Replies in the order of the questions, and the seconds of all together: read, prepare, encode, answer."""

    replies: list[Reply]
    seconds: dict[str, float]


def ask_scan(asker: Asker, scan: ScanInput, questions: Sequence[str], streamer: Any = None) -> Asked:
    """Return the answers to questions about a scan, which is encoded once; their ids are q1, q2, ...

    With a `streamer` (of transformers) they are answered one by one, and it is given their tokens.
    UsageError for a question that is empty or holds special tokens, and for a scan on another grid than the model reads.
    """
    rows = [
        {
            "id": f"q{number}",
            "volume_id": scan.id,
            "videos": [scan.model],
            "messages": [{"role": "user", "content": TAG + question}],
        }
        for number, question in enumerate(questions, start=1)
    ]
    groups, problems = group_rows(rows, asker.processor)
    if problems:
        raise UsageError(next(iter(problems.values())))
    (group,) = groups
    try:
        encoded = asker.encode(group)
    except ValueError as error:
        raise UsageError(str(error)) from None
    shared = {"read": scan.seconds["read"], "prepare": scan.seconds["prepare"] + encoded.seconds["read"]}
    shared["encode"] = encoded.seconds["encode"]
    most = asker.settings.questions_per_batch if streamer is None else 1
    each = {name: seconds / len(questions) for name, seconds in shared.items()}
    found = [with_seconds(r, each) for batch in group.batches(most) for r in asker.answer(encoded, batch, streamer)]
    by_id = {reply.prediction.id: reply for reply in found}
    replies = [by_id[str(row["id"])] for row in rows]
    total: Counter[str] = Counter()
    for reply in replies:
        total.update(reply.prediction.seconds)
    return Asked(replies, dict(total))
