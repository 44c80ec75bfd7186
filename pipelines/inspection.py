"""Everything that preparing checks, without the writing."""

from __future__ import annotations

from dataclasses import replace

from photon_data.records import VolumeRecord
from photon_pipelines.dataset import Order, Watcher, make_plan
from photon_pipelines.execute import Workers, execute


def inspect_all(order: Order, workers: Workers) -> list[VolumeRecord]:
    """Return the record of every scan, by id: "ready" for one that would be prepared, else refused or failed."""
    todo, _ = make_plan(replace(order, overwrite=True), Watcher())
    jobs = [replace(job, write=False) for job in todo.jobs]
    return sorted(execute(jobs, workers), key=lambda record: record.id)
