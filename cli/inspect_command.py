"""The body of `photon-data inspect`: read every scan as prepare would, write nothing but the findings."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from photon_cli.options import console
from photon_data.files import jsonl_bytes
from photon_data.readers.find import left_alone
from photon_data.records import READY, VolumeRecord
from photon_data.remarks import all_remarks, duplicates
from photon_pipelines.cluster import Workers
from photon_pipelines.plan import Order
from photon_pipelines.prepare import inspect_all


def inspect(order: Order, workers: Workers, json_file: Path | None) -> bool:
    """Print a row per scan and return whether all could be prepared."""
    with console.status("reading scans"):
        records, ignored = inspect_all(order, workers)
    table = Table(title=f"{len(records)} scans in {order.source}")
    for name in ("id", "format", "voxels z y x", "mm z y x", "axes", "HU", "findings"):
        table.add_column(name, overflow="fold")
    for record in records:
        table.add_row(*_cells(record))
    console.print(table)
    for group in duplicates(records):
        console.print(f"the same content: {', '.join(record.source for record in group)}", soft_wrap=True)
    if ignored:
        console.print(f"files left alone: {left_alone(ignored)}", soft_wrap=True)
    if json_file:
        rows = [{**record.to_json(), "findings": all_remarks(record)} for record in records]
        json_file.write_bytes(jsonl_bytes(rows))
    return all(record.state == READY for record in records)


def _cells(record: VolumeRecord) -> list[str]:
    if record.facts is None:
        return [record.id, "", "", "", "", "", f"{record.state} ({record.code}): {record.reason}"]
    facts = record.facts
    geometry, hu = facts["geometry"], facts["hu_before"]
    return [
        record.id,
        facts["format"],
        " ".join(str(n) for n in geometry["shape_zyx"]),
        " ".join(f"{s:.2f}" for s in geometry["spacing_zyx_mm"]),
        geometry["orientation_zyx"],
        f"{hu['min']:.0f} to {hu['max']:.0f}",
        "; ".join(all_remarks(record)) or "fine",
    ]
