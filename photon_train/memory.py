"""The most memory that answering or training needed."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import torch


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory this process has used since `reset_peak_memory`: allocated on the GPU, resident on a CPU.

    In MiB.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak_memory(device: torch.device) -> None:
    """Begin to count peak memory anew; where the system cannot, the peak goes on to be that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
