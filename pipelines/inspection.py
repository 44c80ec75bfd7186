"""Everything that preparing checks, without the writing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from photon_data.records import VolumeRecord
from photon_pipelines.execute import Workers, execute
from photon_pipelines.gather import Order, gather


class Inspected(NamedTuple):
    """The record of every scan, by id ("ready" for one that would be prepared, else refused or failed), and `Data.ignored`."""

    records: list[VolumeRecord]
    ignored: Mapping[str, int]


def inspect_all(order: Order, workers: Workers) -> Inspected:
    """Return what there is to say of the scans of an order; nothing is written."""
    data = gather(order)
    jobs = [replace(job, write=False) for job in data.jobs]
    return Inspected(sorted(execute(jobs, workers), key=lambda record: record.id), data.ignored)
