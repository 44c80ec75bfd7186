"""What the process of a scan does: a job of `prepare` or `inspect` -> the record of the scan, or of its masks."""

from __future__ import annotations

from typing import Any

from photon_data.prepare_file import Job, prepare_file
from photon_data.prepare_masks import MaskJob, prepare_masks
from photon_pipelines import child


def prepare_job(job: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a job, both as JSON."""
    if "masks" in job:
        return prepare_masks(MaskJob.from_json(job)).to_json()
    return prepare_file(Job.from_json(job)).to_json()


def main(address_space_bytes: int) -> None:
    """Answer jobs until the parent is gone."""
    child.main(address_space_bytes, prepare_job)
