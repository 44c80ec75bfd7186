"""How CPU seconds and memory of `photon-data`, beside the reading of scans, grow with the number of scans.

Every scan is a stub: a small file, and a job that writes a tiny store in no time. So what is measured is the process
that plans, collects and reports. Each number of scans has a process of its own. Memory is the highest of that process
in a phase, above what it had before the first; "kB per scan" is how much of it one more scan takes. An exponent of 1 is
linear growth, 2 is quadratic. With `--without jobs`, stores are written beside, not by jobs on Dask; `--without stores`
ends before the first of them.

python benchmarks/scale.py [--n 4000,16000,50000] [--workers 2] [--without jobs|stores]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tables import print_place, print_table

from photon_data.files import Location
from photon_data.lock import exclusive
from photon_data.prepare_file import Job, prepare_volume
from photon_data.recipe import Recipe
from photon_data.records import PREPARED, VolumeRecord, read_records, store_name, write_records
from photon_data.report import render_report
from photon_data.scan import Scan
from photon_data.store import OWN_DIGEST, own_digest, read_metadata, write_store
from photon_data.volume import Geometry
from photon_pipelines import cluster, export, prepare
from photon_pipelines.cluster import Workers
from photon_pipelines.plan import Callback, Plan, gather, plan
from photon_pipelines.request import Request
from photon_pipelines.verify import verify_output

RECIPE = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))
FOLDERS = 100  # of the source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", default="4000,16000")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--without", choices=("jobs", "stores"), default="")
    parser.add_argument("--one", type=int)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.workers, options.without)))
        return
    counts, found = [int(n) for n in options.n.split(",")], []
    for n in counts:
        command = [sys.executable, __file__, "--one", str(n), "--workers", str(options.workers)]
        command += ["--without", options.without] if options.without else []
        found.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1]))
    print_place("photon-ct", "dask", "zarr")
    header = ["phase", *(f"{n:,}: CPU s" for n in counts), "exponent", *(f"{n:,}: MB" for n in counts), "kB per scan"]
    print_table(header, [_line(phase, counts, [one[phase] for one in found]) for phase in found[0]])


def _line(phase: str, counts: list[int], found: list[list[float]]) -> list[str]:
    """Return a phase's line: seconds, exponent, memory, and the slope of memory between fewest and most scans."""
    seconds, megabytes = zip(*found, strict=True)
    exponent, slope = "", ""
    if len(counts) > 1:
        exponent = f"{math.log(seconds[-1] / seconds[0]) / math.log(counts[-1] / counts[0]):.2f}"
        slope = f"{1000 * (megabytes[-1] - megabytes[0]) / (counts[-1] - counts[0]):.1f}"
    return [phase, *(f"{s:.1f}" for s in seconds), exponent, *(f"{mb:.0f}" for mb in megabytes), slope]


def measure(n: int, workers: int, without: str = "") -> dict[str, tuple[float, float]]:
    """Return {phase: (CPU seconds, MB above the start)} for n scans."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "raw"), Location(str(Path(folder, "out")))
        for number in range(n):
            path = source / f"{number % FOLDERS:02d}" / f"scan_{number:06d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"%d" % number)
        request, phases = Request(source, out, RECIPE, pictures=0), dict[str, tuple[float, float]]()
        template = write_template(Path(folder, "template"))
        start_mb = _memory_mb("VmRSS")

        def timed(phase: str, do: Callable[[], Any]) -> Any:
            Path("/proc/self/clear_refs").write_text("5")  # the highest memory is counted from here
            start_s = time.process_time()
            result = do()
            phases[phase] = time.process_time() - start_s, _memory_mb("VmHWM") - start_mb
            print(f"{n:,}: {phase}: {phases[phase][0]:.1f} s, {phases[phase][1]:.0f} MB", file=sys.stderr)
            return result

        with exclusive(out) as hold:
            gathered = timed("find scans", lambda: gather(request))
            todo: Plan = timed("plan", lambda: plan(gathered.jobs, request))
            gathered.jobs.clear()
            if without == "stores":
                return phases
            cluster.run_isolated = stub = Stub(template)  # type: ignore[attr-defined]
            if without == "jobs":
                write_records(out, (VolumeRecord.from_json(stub(job.to_json())) for job in todo.jobs))
                records = read_records(out)
                todo.jobs.clear()
            else:
                records = timed("run jobs, journal", lambda: prepare._run(todo, hold, Workers(workers), Callback()))
            timed("report", lambda: report(records))
            timed("all that ends a run", lambda: prepare.finish(request, records, [], {}).states)
            records.clear()
        for number in ("second", "third"):
            again = timed(f"the {number} run, whole", lambda: prepare.prepare(request, Workers(workers)).states)
            assert again["unchanged"] == n
        problems = timed("verify", lambda: sum(1 for _ in verify_output(out)))
        export.open_volume = lambda url, *_, **__: None  # type: ignore
        export.FORMATS["nifti"] = export.Format(".nii.gz", lambda volume, path: path.touch())
        timed("export, files aside", lambda: export.export_all(out, "nifti", Path(folder, "nifti")))
        assert not problems
        return phases


def report(records: list[Any]) -> bytes:
    """Return the page, without pictures."""
    nothing = RECIPE.shape_zyx
    return render_report(records, recipe=RECIPE, open_volume=lambda _: nothing, title="", source="", pictures=0)  # type: ignore


def _memory_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1000


def write_template(folder: Path) -> dict[str, bytes]:
    """Return the files of a store of noise, by name."""
    array = np.random.default_rng(0).integers(-1000, 1500, (16, 16, 16)).astype(np.int16)
    array[:, :8] = -1000
    geometry = Geometry.axis_aligned(array.shape, (2, 0.8, 0.8), (0, 0, 0))
    prepared = prepare_volume(Scan(geometry, array.dtype, 1.0, 0.0, lambda: iter(array), "nifti"), RECIPE)
    identity = {"id": "ID", "key": "KEY", "fingerprint": "CONTENT"}
    identity |= {"recipe": RECIPE.to_json(), "digest": RECIPE.digest}  # type: ignore[dict-item]
    out, name = Location(str(folder)), store_name("ID")
    write_store(prepared, out, name, identity)
    root = folder / name
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


class Stub:
    """The task: writes a copy of the template under the scan's name, and returns its record."""

    def __init__(self, template: Mapping[str, bytes]) -> None:
        self.template = template

    def __call__(self, data: dict[str, Any], *_: object, **__: object) -> dict[str, Any]:
        """Return the record of a job, both as JSON."""
        job = Job.from_json(data)
        out, name = Location(job.out), job.place
        content = f"sha256:{hashlib.sha256(job.source.files[0].read_bytes()).hexdigest()}"
        ours = json.loads(self.template["zarr.json"])
        metadata = ours["attributes"]["photon"]
        metadata |= {"id": job.source.id, "fingerprint": content, "key": job.key(content, metadata["facts"])}
        metadata[OWN_DIGEST] = own_digest(ours["attributes"])
        for file, text in (self.template | {"zarr.json": json.dumps(ours).encode()}).items():
            path = out.path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        found = read_metadata(out, name)
        assert found is not None
        return job.record_of_store(PREPARED, found).to_json()


if __name__ == "__main__":
    main()
