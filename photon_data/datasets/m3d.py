"""M3D-Cap and M3D-VQA, which are refused: their scans cannot become volumes in Hounsfield units."""

from __future__ import annotations

from photon_data.datasets.base import Adapter, Collected, OnFile
from photon_data.datasets.declare import DataSet


def read(entry: DataSet, on_file: OnFile) -> Collected:
    """Raise UsageError with the reason."""
    raise entry.wrong(
        "scans in Hounsfield units with spacing wanted, but M3D-Cap and M3D-VQA are 8-bit slices (jpeg, png) or arrays resized "
        "to 32 x 256 x 256, windowed, without spacing and orientation: no store made of them would be right. Questions on CTs of "
        "your own can be declared with `adapter: table`"
    )


ADAPTER = Adapter(read, ("questions",))
