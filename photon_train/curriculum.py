"""When pruning starts: the phase of a training run, from the optimizer step that the trainer restores on resume."""

from enum import Enum

from photon_train.configuration_photon import PhotonConfig


class Phase(Enum):
    """What happens to visual tokens after layer its. Evaluation is always HARD."""

    DENSE = "dense"  # nothing is weighted or dropped
    SOFT = "soft"  # hidden states are multiplied by p, nothing is dropped
    HARD = "hard"  # dropped for good, with surrogate gradients
    FLIP = "flip"  # as HARD, and some rows keep the complement


def phase_at(config: PhotonConfig, step: int, total_steps: int | None = None) -> Phase:
    """Return the phase of optimizer step `step`, counted from 0.

    Raises ValueError when a start is a fraction of the run and `total_steps` is not given.
    """
    starts = {
        Phase.FLIP: config.flip_start,
        Phase.HARD: config.hard_start,
        Phase.SOFT: config.soft_start,
    }
    return next((phase for phase, start in starts.items() if step >= _in_steps(start, total_steps)), Phase.DENSE)


def _in_steps(start: int | float, total_steps: int | None) -> float:
    if isinstance(start, int):
        return start
    if total_steps is None:
        raise ValueError(f"total_steps wanted, got None: the curriculum starts a phase at the fraction {start}; pass it")
    return start * total_steps
