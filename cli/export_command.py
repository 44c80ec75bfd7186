"""The body of `photon-data export`."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

from photon_cli.options import console
from photon_data.errors import UsageError
from photon_data.export import FORMATS
from photon_data.files import Location
from photon_pipelines.export import export_all


def export(out: Location, format_: str, to: Path | None, overwrite: bool) -> None:
    """Write every prepared volume in another format, with a progress bar, and say where."""
    if format_ not in FORMATS:
        raise UsageError(f"--format: one of {', '.join(FORMATS)} wanted, got {format_!r}")
    if to is None and not out.is_local:
        raise UsageError(f"--to FOLDER wanted, since {out.url} is no local folder")
    folder = to or out.path / format_
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("exporting")
        written = export_all(
            out, format_, folder, overwrite=overwrite, progress=lambda n, of: bar.update(task, completed=n, total=of)
        )
    console.print(f"{written.volumes} volumes, {written.kept} of them there before; {written.manifests} manifests in {folder}")
