"""volumes.jsonl grows by a row as each scan ends: whatever a kill leaves of it is read, and it is small in memory."""

import json
import pickle
import random
import tracemalloc
from dataclasses import replace

import pytest

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.records import VolumeRecord, append_record, read_records, write_records


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


def test_a_record_takes_under_two_kilobytes_and_says_what_it_was_made_from():
    rng = random.Random(0)
    grid = {"shape_zyx": [512, 512, 350], "steps_lps": [[rng.random() for _ in range(3)] for _ in range(3)]}
    facts = dict.fromkeys(("geometry", "grid"), grid) | {"hu_before": {"histogram": rng.choices(range(9999), k=64)}}
    hashes = ("key", "fingerprint", "store_sha256", "arrays_sha256", "model_sha256")
    digests = {name: f"{rng.getrandbits(256):064x}" for name in hashes}
    more = {"facts": facts, "root": "/data/raw", "store": "volumes/a__b.ome.zarr", **digests}
    row = json.dumps(VolumeRecord("a__b", "a/b.nii.gz", "prepared", 1, 2**60, **more).row())
    tracemalloc.start()
    records = [VolumeRecord.from_json(json.loads(row)) for _ in range(500)]
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken / len(records) < 2000
    assert records[0].row() == json.loads(row)
    assert pickle.loads(pickle.dumps(records[0])) == records[0]  # noqa: S301 - as Dask does
