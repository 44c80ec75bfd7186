"""How much memory was needed."""

from __future__ import annotations

import resource

import torch


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory this process has used so far, in MiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
