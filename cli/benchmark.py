"""The answering of `photon eval --model`: rows of a benchmark, under several schedulers, and on edited volumes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from statistics import fmean

from photon_cli.predict import Load, answer_rows, device_of, shard_of
from photon_cli.segmentation import mask_folder
from photon_cli.terminal import console
from photon_data.errors import UsageError
from photon_train.answering.manifest import Shard, wait_for_parts
from photon_train.answering.predictor import Predictor
from photon_train.configuration_photon import PhotonConfig
from photon_train.costs import reset_peak_memory
from photon_train.evaluation.cases import Answered, Answering
from photon_train.evaluation.counterfactual import edited_path, edited_rows
from photon_train.pruners import SCHEDULERS
from photon_train.rows import Prediction, Row, read_predictions

ITS, MATCH_ITS = "its", "match-its"
# These schedulers keep the share that they are given.
BUDGETED = ("random", "uniform", "foreground", "fastv", "visionzip", "divprune")


def answer_benchmark(
    load: Load, schedulers: str, keep: str, folder: Path, edits: Sequence[str] = (), masks: str | None = None
) -> Answering:
    """Return the answering by a model under each scheduler, and on edited volumes, with files in `folder`.

    "its" goes first, since `keep` "match-its" gives the others the share of tokens that it kept. UsageError for
    schedulers that do not exist and for no budget to match; later, for "its" without a threshold predictor.
    """
    names = list(dict.fromkeys(name.strip() for name in schedulers.split(",") if name.strip()))
    if unknown := [name for name in names if name not in SCHEDULERS]:
        raise UsageError(f"--schedulers: expected some of {', '.join(SCHEDULERS)}, found {unknown[0]!r}")
    given = _given_budget(names, keep)
    part, local_rank = shard_of(None)
    device = device_of(load.keywords.get("device", "auto"), local_rank)

    def answer(rows: Sequence[Row]) -> tuple[list[Answered], PhotonConfig]:
        budget, found, configs = given, list[Answered](), list[PhotonConfig]()
        in_order: list[str | None] = [*sorted(names, key=lambda name: name != ITS)]
        for name in in_order or [None]:  # None: the model's own
            # No name holds a model here: it is freed before the next is loaded.
            own_budget = budget if name in BUDGETED else None
            one, config = _answer_rows(
                load(scheduler=name, device=device), rows, folder, part, own_budget, edits=edits, masks=masks
            )
            found.append(one)
            configs.append(config)
            if name == ITS and budget is None and set(names) & set(BUDGETED):
                budget = _kept_share(one, {row["id"] for row in rows})
        if part.number:  # the first process scores
            raise SystemExit(0)
        return found, configs[0]

    return answer


def _given_budget(names: Sequence[str], keep: str) -> float | None:
    """Return what `keep` gives the schedulers, see `_budget_of`; None to match "its", or where none takes a budget."""
    is_budgeted, found = bool(set(names) & set(BUDGETED)), ",".join(names) or "none"
    if keep != MATCH_ITS and not is_budgeted:
        raise UsageError(f"--keep: expected one of {', '.join(BUDGETED)} among --schedulers, found {found}")
    if keep == MATCH_ITS and is_budgeted and ITS not in names:
        remedy = "add it, or say --keep 0.4 (a share) or --keep 390 (tokens)"
        raise UsageError(f"--keep {MATCH_ITS}: expected 'its' among --schedulers, found {found}; {remedy}")
    return None if keep == MATCH_ITS else _budget_of(keep)


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
    *,
    edits: Sequence[str],
    masks: str | None,
) -> tuple[Answered, PhotonConfig]:
    """Answer this part of the rows into the file of the model's scheduler, and wait for the other parts.

    `budget` as `_budget_of` returns it, None: its own. The first process answers on edited volumes too.
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
    answered = Answered(path, wait_for_parts(path, rows))
    if edits and not part.number:
        answered = answered._replace(on_edited=_answer_edited(predictor, rows, answered, edits, masks))
    return answered, config


def _answer_edited(
    predictor: Predictor, rows: Sequence[Row], answered: Answered, edits: Sequence[str], masks: str | None
) -> dict[str, list[Prediction]]:
    """Return, by edit, the answers to the rows on edited volumes. Each edit has a file; a run that goes on keeps it."""
    places = (str(row["videos"][0]) for row in rows if len(row["videos"]) == 1)
    home = mask_folder(masks, places) if masks else None
    base, found = {one.id: one for one in answered.predictions}, dict[str, list[Prediction]]()
    for edit in edits:
        edited = edited_rows(rows, edit, base, home, predictor.model.config.tokens_thw)
        if edited:
            console.print(f"{answered.path.stem}, {edit}: {len(edited):,} questions on edited volumes")
            path, ids = edited_path(answered.path, edit), {row["id"] for row in edited}
            answer_rows(predictor, edited, path)
            found[edit] = [one for one in read_predictions(path) if one.id in ids]
    return found


def _kept_share(answered: Answered, ids: set[str]) -> float:
    """Return the mean share of visual tokens that the predictions of these rows kept."""
    counted = [p for p in answered.predictions if p.visual_tokens and p.id in ids]
    shares = [p.kept_tokens / p.visual_tokens for p in counted]
    if not any(shares):
        found = "found none; say --keep 0.4 instead"
        raise UsageError(f"{answered.path}: expected predictions that keep visual tokens, {found}")
    return fmean(shares)
