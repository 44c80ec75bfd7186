"""Everything that preparing checks, without the writing."""

from __future__ import annotations

from dataclasses import replace

from photon_data.records import VolumeRecord
from photon_pipelines.execute import Workers, execute
from photon_pipelines.gather import Order, gather


def inspect_all(order: Order, workers: Workers) -> list[VolumeRecord]:
    """Return the record of every scan, by id: "ready" for one that would be prepared, else refused or failed."""
    jobs = [replace(job, write=False) for job in gather(order).jobs]
    return sorted(execute(jobs, workers), key=lambda record: record.id)
