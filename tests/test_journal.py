"""volumes.jsonl grows by a row as each scan ends: whatever a kill leaves of it is read, and it is small in memory."""

import gc
import json
import pickle
import random
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from photon_data import report
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.readers.find import find_scans
from photon_data.recipe import Recipe
from photon_data.records import VolumeRecord, append_record, read_records, write_records
from photon_data.volume import Geometry
from photon_pipelines.plan import gather
from photon_pipelines.prepare import finish
from photon_pipelines.request import Request
from photon_pipelines.verify import verify_output


def record(id, state="prepared", hidden=False):
    facts = {"hu_before": {"min": -1000.0, "histogram": [1, 2, 3]}, "format": "nifti", "policy": {"modality": "ct"}}
    return VolumeRecord(id, f"{id}.nii", state, 1, 2, facts=facts, reason="\u2028 é", root="/raw", hidden=hidden)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_journal_that_was_cut_anywhere_in_its_last_row_is_read_and_goes_on(tmp_path, hidden):
    out = Location(str(tmp_path / "out"))
    out.path.mkdir()
    first, second, third = (record(id, hidden=hidden) for id in "abc")
    for each in (first, second, replace(first, state="unchanged")):
        append_record(out, each)
    whole = out.read("volumes.jsonl")
    now = [replace(first, state="unchanged"), second]
    assert read_records(out) == now
    assert b"/raw" not in whole or not hidden
    before = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(before, len(whole) + 1, 7):
        out.write("volumes.jsonl", whole[:cut])
        there = now if cut >= len(whole) - 1 else [first, second]
        assert read_records(out) == there
        append_record(out, third)
        assert read_records(out) == [*there, third]
    write_records(out, [*now, third])
    assert read_records(out) == [*now, third]
    assert (out.read("volumes.jsonl") or b"").count(b"\n") == 3


def test_a_journal_with_a_row_that_is_damaged_in_its_middle_is_refused(tmp_path):
    out = Location(str(tmp_path))
    append_record(out, record("a"))
    append_record(out, record("b"))
    content = out.read("volumes.jsonl") or b""
    out.write("volumes.jsonl", content[:20] + content[25:])
    with pytest.raises(UsageError, match="damaged: expected JSON on line 1"):
        read_records(out)


def measured(rng, number=0):
    """Return the row of a scan with as much measured as a real one has."""
    spacing, origin = ([rng.uniform(0.5, 2) for _ in range(3)] for _ in range(2))
    grid = Geometry.axis_aligned((350, 512, 512), spacing, origin).to_json()
    facts = dict.fromkeys(("geometry", "grid"), grid) | {"hu_before": {"histogram": rng.choices(range(9999), k=64)}}
    hashes = ("key", "fingerprint", "store_sha256", "arrays_sha256", "model_sha256")
    digests = {name: f"{rng.getrandbits(256):064x}" for name in hashes}
    more = {"facts": facts, "root": "/data/raw", **digests}
    name = f"a__b{number:05d}"
    more |= {"store": f"volumes/{name}.ome.zarr"}
    return VolumeRecord(name, f"a/b{number:05d}.nii.gz", "prepared", 1, 2**60, **more).row()


def test_a_record_takes_under_two_kilobytes_and_says_what_it_was_made_from():
    row = json.dumps(measured(random.Random(0)))
    tracemalloc.start()
    records = [VolumeRecord.from_json(json.loads(row)) for _ in range(500)]
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken / len(records) < 2000
    assert records[0].row() == json.loads(row)
    assert pickle.loads(pickle.dumps(records[0])) == records[0]  # noqa: S301 - as Dask does


def test_a_scan_that_was_found_takes_under_600_bytes_with_its_files(tmp_path):
    taken = {}
    for count in (1, 10, 210):  # of the first one, what is looked up once
        folder = tmp_path / f"{count:03d}"
        folder.mkdir()
        for number in range(count):
            (folder / f"scan_{number:06d}.nii.gz").write_bytes(b"x")
        gc.collect()
        tracemalloc.start()
        found = find_scans(folder)
        gc.collect()
        taken[count], _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(found.sources) == count
    assert (taken[210] - taken[10]) / 200 < 600, taken


def test_a_scan_takes_under_two_kilobytes_while_the_next_run_looks_for_it_again(tmp_path):
    raw, out, rng, peaks = tmp_path / "raw", Location(str(tmp_path / "out")), random.Random(0), []
    (raw / "a").mkdir(parents=True)
    for count in (1, 400, 1200):  # of the first one, what is looked up once
        rows = [measured(rng, number) | {"root": str(raw)} for number in range(count)]
        write_records(out, [VolumeRecord.from_json(row) for row in rows])
        for row in rows:
            (raw / row["source"]).touch()
        gc.collect()
        tracemalloc.start()
        gathered = gather(Request(raw, out, Recipe()))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert [job.source.id for job in gathered.jobs] == [row["id"] for row in rows]
    assert (peaks[2] - peaks[1]) / 800 < 2000, peaks


@pytest.mark.slow
def test_a_scan_takes_under_two_kilobytes_also_at_the_end_of_a_run_and_while_it_is_verified(tmp_path):
    """In a process of its own: what other tests hold decides when garbage is collected."""
    program = f"import json, test_journal; print(json.dumps(test_journal.bytes_per_scan({str(tmp_path)!r})))"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert max(found.values()) < 2000, found


def bytes_per_scan(folder):
    """From 40 to 140 scans; lists of the page end at some number of them, here soon. A run of one is before."""
    report.MOST_VOLUME_LINES = 10
    out = Location(f"{folder}/out")

    def end(count):
        rng = random.Random(count)
        records = [VolumeRecord.from_json(measured(rng, number)) for number in range(count)]
        write_records(out, records)
        finish(Request(Path(folder), out, Recipe(), pictures=0), records, [], {})

    uses = {"first run": end, "second run": end, "verify": lambda _: sum(1 for _ in verify_output(out))}
    peaks = dict[str, list[int]]()
    for count in (1, 40, 140):
        for name, use in uses.items():
            gc.collect()
            tracemalloc.start()
            use(count)
            peaks.setdefault(name, []).append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    return {name: (most - few) / 100 for name, (_, few, most) in peaks.items()}
