"""`photon eval --model`: the model answers the rows, under one scheduler after the other, into files of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from photon_cli.answering_show import Show, print_outcome
from photon_cli.eval_command import Given
from photon_cli.options import console
from photon_cli.predict_model import Model
from photon_data.errors import UsageError
from photon_train.answering.manifest import predict_rows
from photon_train.answering.prediction import read_predictions
from photon_train.configuration_photon import PhotonConfig
from photon_train.rows import Row
from photon_train.scheduling import SCHEDULERS

MATCH_ITS = "match-its"
ITS = "its"
BUDGETED = ("random", "uniform", "foreground")  # keep the share they are told to


@dataclass(frozen=True)
class Schedulers:
    """Under which schedulers the model answers, and the share of tokens that the budgeted ones keep.

    names   "its" first; None for the model's own alone
    share   None: what "its" keeps on average in this run
    """

    names: tuple[str | None, ...] = (None,)
    share: float | None = None


def schedulers(names: str, keep: str) -> Schedulers:
    """Return what --schedulers and --keep say; UsageError for schedulers that do not exist, and for no budget to match."""
    wanted = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in SCHEDULERS]
    if unknown:
        raise UsageError(f"--schedulers: some of {', '.join(SCHEDULERS)} wanted, got {unknown[0]!r}")
    share = None if keep == MATCH_ITS else _share(keep)
    if share is not None and not set(wanted) & set(BUDGETED):
        raise UsageError(f"--keep: one of {', '.join(BUDGETED)} wanted among --schedulers, got {names or 'none'}")
    if share is None and ITS not in wanted and set(wanted) & set(BUDGETED):
        raise UsageError(f"--keep {MATCH_ITS}: 'its' among --schedulers wanted, got {names}; add it, or say --keep 0.4")
    return Schedulers(tuple(sorted(wanted, key=lambda name: name != ITS)) or (None,), share)


def answer(model: Model, order: Schedulers, folder: Path, rows: Sequence[Row]) -> Given:
    """Answer the rows into a file of `folder` for each scheduler, and return the files; what they hold already stays.

    UsageError where a model cannot be loaded (one without threshold predictor as "its"), and as `predict_rows`.
    """
    files: list[Path] = []
    share, config = order.share, None
    for name in order.names:
        chosen = replace(model, scheduler=name, keep_ratio=share if name in BUDGETED else None)
        path, own = _answered(chosen, rows, folder)
        files.append(path)
        config = config or own
        if name == ITS and share is None and set(order.names) & set(BUDGETED):
            share = kept_share(path, {row["id"] for row in rows})
    return Given(files, config)


def _answered(model: Model, rows: Sequence[Row], folder: Path) -> tuple[Path, PhotonConfig]:
    """Answer the rows into the file of the model's scheduler; the model is given up when this returns."""
    asker = model.load()
    config = asker.model.config
    path = folder / f"{config.scheduler}.jsonl"
    console.print(f"scheduler {config.scheduler}" + (f", keeps {config.keep_ratio:.1%}" if config.scheduler in BUDGETED else ""))
    with Show() as show:
        outcome = predict_rows(asker, rows, path, on_start=show.start, on_batch=show.replies)
    print_outcome(outcome, path, show)
    return path, config


def kept_share(path: Path, ids: set[str]) -> float:
    """Return the mean share of visual tokens that the predictions of these rows kept; UsageError where they kept none."""
    shares = [p.kept_tokens / p.visual_tokens for p in read_predictions(path) if p.visual_tokens and p.id in ids]
    if not any(shares):
        raise UsageError(f"{path}: predictions that keep visual tokens wanted, to keep as many; say --keep 0.4 instead")
    return fmean(shares)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--keep: {MATCH_ITS} or a share above 0, at most 1, wanted, got {text!r}")
    return share
