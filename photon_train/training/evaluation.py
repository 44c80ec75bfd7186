"""What a run is judged by while it trains: answers, scored as `photon eval` scores them.

The model answers with the weights it has at that step, by generation: each process answers its share of the volumes,
all get the answers of all, and the main one writes them to RUN/answers, for `photon eval --predictions`.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from photon_data.errors import UsageError
from photon_data.files import Location, jsonl_bytes
from photon_train.answering.manifest import Shard, predict_rows
from photon_train.answering.predictor import AnswerSettings, Predictor
from photon_train.evaluation.cases import case_of
from photon_train.evaluation.evaluate import BENCHMARKS, check, evaluate
from photon_train.evaluation.results import Settings
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor
from photon_train.rows import Prediction, Row, TrainRow, plain_row, read_predictions, read_rows
from photon_train.training.config import FORCED, OF_ANSWERS, TrainConfig
from photon_train.training.processes import TrainingStopped
from photon_train.training.setup import Answering, AnsweringFactory

logger = logging.getLogger(__name__)

ANSWERS = "answers"  # folder of predictions, step-N.jsonl
SCORING = Settings(allow_partial=True, bootstrap=0)


def answering_of(config: TrainConfig) -> AnsweringFactory | None:
    """Return what `setup.start` makes the evaluation of answers with; None for a run without an eval_benchmark."""

    def made(rows: Sequence[TrainRow], processor: PhotonProcessor, accelerator: Accelerator) -> Answering:
        asked = rows_to_answer(config, {row.id for row in rows})
        return lambda model, step: scores_of_answers(model, processor, asked, config, accelerator, step)

    return made if config.eval_benchmark else None


def rows_to_answer(config: TrainConfig, ids: Collection[str]) -> list[Row]:
    """Return the rows of `eval` that are answered: those of `ids`, at most `eval_questions`, drawn by the seed.

    UsageError for rows that `photon eval` would refuse, and for a `best_metric` that they do not have.
    """
    read = (plain_row(row, place="") for path in config.eval for row in read_rows(Path(path)))  # ids are texts then
    rows: list[Row] = [row for row in read if row["id"] in ids]
    if not rows:
        raise UsageError("eval_benchmark: expected rows of eval that have an id, found none; leave it out")
    if config.eval_questions:
        count = min(config.eval_questions, len(rows))
        rows = [rows[i] for i in sorted(random.Random(config.seed).sample(range(len(rows)), count))]
    try:
        check(config.eval_benchmark, rows, SCORING)
        cases = [case_of(row, Prediction(row["id"])) for row in rows]
    except KeyError as error:
        expected = "expected the columns that photon-data prepare writes"
        raise UsageError(f"eval_benchmark: {expected}, found rows of eval without {error}; leave it out") from None
    metrics = [one.name for one in BENCHMARKS[config.eval_benchmark] if any(one.applies(case) for case in cases)]
    names = [*FORCED, *(OF_ANSWERS + name for name in metrics)]
    if config.best_metric and config.best_metric not in names:
        raise UsageError(f"best_metric: expected one of {', '.join(names)}, found {config.best_metric!r}")
    return rows


def scores_of_answers(
    model: Any,
    processor: PhotonProcessor,
    rows: Sequence[Row],
    config: TrainConfig,
    accelerator: Accelerator,
    step: int,
) -> dict[str, float | None]:
    """Return each metric of the benchmark over the model's answers to the rows, in points; None where not defined.

    `model` is what accelerate prepared. With on_bad_row "stop" TrainingStopped names a row that cannot be answered;
    else such rows are left out and counted.
    """
    asked = model_to_ask(model, config, accelerator)
    predictor = Predictor(asked.eval(), processor, AnswerSettings(max_new_tokens=config.eval_max_new_tokens))
    shard = Shard(accelerator.process_index, accelerator.num_processes)
    with tempfile.TemporaryDirectory(prefix="photon-") as folder:
        output = Path(folder) / "answers.jsonl"
        with accelerator.autocast():
            predict_rows(predictor, rows, output, shard)
        own = read_predictions(shard.path(output))
    model.train()
    answers = sorted(gather_object(own), key=lambda one: one.id)
    failed = [one for one in answers if one.error]
    if failed and config.on_bad_row == "stop":
        remedy = "repair its store, or leave such rows out with on_bad_row=skip"
        raise TrainingStopped(f"row {failed[0].id} of eval cannot be answered: {failed[0].error}; {remedy}")
    for one in failed:
        logger.warning("row %s of eval cannot be answered: %s", one.id, one.error)
    if accelerator.is_main_process:
        content = jsonl_bytes(asdict(one) for one in answers)
        Location(str(Path(config.output) / ANSWERS)).write(f"step-{step}.jsonl", content)
    scores: dict[str, float | None] = {f"{OF_ANSWERS}failed": float(len(failed))} if failed else {}
    if len(failed) < len(answers):
        found = evaluate(config.eval_benchmark, rows, {"answers": answers}, settings=SCORING).answers[0].scores
        # Of a metric of several tasks the score over all of them comes last.
        scores |= {f"{OF_ANSWERS}{s.metric}": s.estimate.value for s in found if s.average == "question_weighted"}
    return scores


def model_to_ask(model: Any, config: TrainConfig, accelerator: Accelerator) -> Any:
    """Return the model with its weights of now. With FSDP2 a whole copy, in every process: each answers other rows,
    for another number of tokens, and cannot wait for the others to share a weight.
    """
    whole: Any = accelerator.unwrap_model(model)
    if not accelerator.is_fsdp2:
        return whole.get_base_model() if config.lora_rank else whole
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    device = accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        copy = PhotonForConditionalGeneration(whole.config)
    copy.load_state_dict(weights)
    return copy
