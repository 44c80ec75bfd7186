"""The body of `photon-data verify`."""

from __future__ import annotations

from rich.progress import track

from photon_cli.options import console
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.records import VOLUMES, read_records
from photon_pipelines.verify import verify_output


def verify(out: Location) -> bool:
    """Print every problem of the stores below `out`; return whether there are none."""
    if not out.exists(VOLUMES):
        raise UsageError(f"the output of photon-data prepare wanted, but {out.url} has no {VOLUMES}")
    records = [record for record in read_records(out) if record.is_there]
    found = 0
    for problem in verify_output(out, lambda items: track(items, "verifying", console=console, disable=not console.is_terminal)):
        found += 1
        console.print(problem, soft_wrap=True, style="red")
    console.print(f"{len(records)} stores checked, {found} problems")
    return not found
