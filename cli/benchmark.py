"""The answering of `photon eval --model`: rows of a benchmark, under several schedulers, and on edited volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from statistics import fmean

from photon_cli.predict import Load, answer_rows, device_of, shard_of
from photon_cli.segmentation import mask_folder
from photon_cli.terminal import console
from photon_data.errors import UsageError
from photon_train.answering.manifest import Shard, wait_for_parts
from photon_train.answering.prediction import read_predictions
from photon_train.answering.predictor import Predictor
from photon_train.configuration_photon import PhotonConfig
from photon_train.evaluation.edited_volume import edited_path, edited_rows
from photon_train.memory import reset_peak_memory
from photon_train.pruners import SCHEDULERS
from photon_train.rows import Row

ITS, MATCH_ITS = "its", "match-its"
# These schedulers keep the share that they are given.
BUDGETED = ("random", "uniform", "foreground", "fastv", "visionzip", "divprune")


def answer_benchmark(
    load: Load,
    schedulers: str,
    keep: str,
    folder: Path,
    then: Callable[[Predictor, Sequence[Row], Path], object] = lambda predictor, rows, path: None,
) -> Callable[[Sequence[Row]], tuple[list[Path], PhotonConfig]]:
    """Return the function rows -> (a file of predictions in `folder` for each scheduler, the model's configuration).

    "its" goes first, since `keep` "match-its" gives the others the share of tokens that it kept. UsageError for
    schedulers that do not exist and for no budget to match; later, for "its" without a threshold predictor.
    `then` is called with the model under each scheduler, the rows, and the file of its predictions.
    """
    names = list(dict.fromkeys(name.strip() for name in schedulers.split(",") if name.strip()))
    if unknown := [name for name in names if name not in SCHEDULERS]:
        raise UsageError(f"--schedulers: expected some of {', '.join(SCHEDULERS)}, found {unknown[0]!r}")
    is_budgeted = bool(set(names) & set(BUDGETED))
    given = None if keep == MATCH_ITS else _budget_of(keep)
    if given is not None and not is_budgeted:
        found = schedulers or "none"
        raise UsageError(f"--keep: expected one of {', '.join(BUDGETED)} among --schedulers, found {found}")
    if given is None and is_budgeted and ITS not in names:
        remedy = "add it, or say --keep 0.4 (a share) or --keep 390 (tokens)"
        raise UsageError(f"--keep {MATCH_ITS}: expected 'its' among --schedulers, found {schedulers}; {remedy}")

    part, local_rank = shard_of(None)
    device = device_of(load.keywords.get("device", "auto"), local_rank)

    def answer(rows: Sequence[Row]) -> tuple[list[Path], PhotonConfig]:
        budget, files, configs = given, list[Path](), list[PhotonConfig]()
        in_order: list[str | None] = [*sorted(names, key=lambda name: name != ITS)]
        for name in in_order or [None]:  # None: the model's own
            # No name holds a model here: it is freed before the next is loaded.
            own_budget = budget if name in BUDGETED else None
            path, config = _answer_rows(load(scheduler=name, device=device), rows, folder, part, own_budget, then)
            files.append(path)
            configs.append(config)
            if name == ITS and budget is None and is_budgeted:
                budget = _kept_share(path, {row["id"] for row in rows})
        if part.number:  # the first process scores
            raise SystemExit(0)
        return files, configs[0]

    return answer


def _budget_of(text: str) -> float:
    """Return a share of the tokens of a volume, at most 1, or a number of them, 2 or more."""
    try:
        budget = float(text)
    except ValueError:
        budget = 0.0
    if not (0 < budget <= 1 or (budget >= 2 and budget.is_integer())):
        expected = f"{MATCH_ITS}, a share above 0, at most 1, or a number of tokens from 2 on"
        raise UsageError(f"--keep: expected {expected}, found {text!r}")
    return budget


def _answer_rows(
    predictor: Predictor,
    rows: Sequence[Row],
    folder: Path,
    part: Shard,
    budget: float | None,
    then: Callable[[Predictor, Sequence[Row], Path], object],
) -> tuple[Path, PhotonConfig]:
    """Answer this part of the rows into the file of the model's scheduler, and wait for the other parts.

    `budget` as `_budget_of` returns it, None: its own. The first process does what comes `then`.
    """
    config = predictor.model.config
    if budget is not None:
        tokens = prod(config.tokens_thw)
        if budget > tokens:
            raise UsageError(f"--keep: expected at most the {tokens} tokens of a volume, found {budget:g}")
        config.keep_ratio = budget if budget <= 1 else budget / tokens
    path = folder / f"{config.scheduler}.jsonl"
    keeps = f", keeps {config.keep_ratio:.1%}" if config.scheduler in BUDGETED else ""
    console.print(f"scheduler {config.scheduler}{keeps}")
    reset_peak_memory(predictor.model.device)
    answer_rows(predictor, rows, path, part)
    wait_for_parts(path, rows)
    if not part.number:
        then(predictor, rows, path)
    return path, config


def _kept_share(path: Path, ids: set[str]) -> float:
    """Return the mean share of visual tokens that the predictions of these rows kept."""
    shares = [p.kept_tokens / p.visual_tokens for p in read_predictions(path) if p.visual_tokens and p.id in ids]
    if not any(shares):
        raise UsageError(f"{path}: expected predictions that keep visual tokens, found none; say --keep 0.4 instead")
    return fmean(shares)


def on_edited_volumes(edits: Sequence[str], masks: str | None) -> Callable[[Predictor, Sequence[Row], Path], None]:
    """Return the function (a model, rows, the file of its predictions) that has the rows answered on edited volumes.

    The answers of each edit have a file of their own, see `edited_path`; a run that goes on keeps them.
    """

    def answer(predictor: Predictor, rows: Sequence[Row], path: Path) -> None:
        places = (str(row["videos"][0]) for row in rows if len(row["videos"]) == 1)
        home = mask_folder(masks, places) if masks else None
        answered = {one.id: one for one in read_predictions(path)}
        for edit in edits:
            edited = edited_rows(rows, edit, answered, home, predictor.model.config.tokens_thw)
            if edited:
                console.print(f"{path.stem}, {edit}: {len(edited):,} questions on edited volumes")
                answer_rows(predictor, edited, edited_path(path, edit))

    return answer
