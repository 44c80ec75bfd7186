"""Everything that preparing checks, without the writing."""

from __future__ import annotations

from dataclasses import replace

from photon_data.records import VolumeRecord
from photon_pipelines.dataset import Order, Watcher, find_jobs
from photon_pipelines.execute import Workers, execute


def inspect_all(order: Order, workers: Workers) -> list[VolumeRecord]:
    """Return the record of every scan, by id: "ready" for one that would be prepared, else refused or failed."""
    jobs, _ = find_jobs(order, Watcher())
    return sorted(execute([replace(job, write=False) for job in jobs], workers), key=lambda record: record.id)
