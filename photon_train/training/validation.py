"""How a model in training does on rows it is not trained on."""

from __future__ import annotations

from dataclasses import replace

import torch

from photon_train.modeling_photon import PhotonOutput
from photon_train.training.measures import Sums, sums_of
from photon_train.training.plan import plan_epoch
from photon_train.training.run import Run, check_read, read_ahead


def evaluate(run: Run) -> dict[str, float]:
    """Return the mean loss over groups, the share of rows whose answer would be decoded exactly, and the keep ratio.

    An answer counts when every token of it, end marker included, is the likeliest after those before it.
    """
    groups = [
        group for step in plan_epoch(run.eval_rows, run.config.questions_per_volume, run.turn.world, 0, 0) for group in step
    ]
    sums = Sums()
    run.model.eval()
    with torch.no_grad(), run.accelerator.autocast():
        for batch in read_ahead(run, run.turn.of([groups]), training=False):
            batch = batch.to(run.accelerator.device)
            check_read(run, batch)
            output = run.model(**batch.inputs, answers_only=True) if batch.weight or run.is_sharded else None
            if output is None or batch.weight == 0:
                sums.add({"skipped_groups": float(bool(batch.error))})
                continue
            sums.add(sums_of(output, replace(batch, weight=1.0), run.photon) | {"right": _right(output, len(batch.ids))})
    run.model.train()
    total = sums.over(run.accelerator)
    found = {"eval_loss": total["loss"] / max(total["groups"], 1), "eval_exact": total["right"] / max(total["questions"], 1)}
    if total["visual_tokens"]:
        found["eval_keep_ratio"] = total["visual_tokens_kept"] / total["visual_tokens"]
    return found | {"eval_questions": total["questions"], "eval_skipped_groups": total["skipped_groups"]}


def _right(output: PhotonOutput, rows: int) -> torch.Tensor:
    """Return how many rows have all their answer tokens right."""
    logits_NV, labels_N, rows_N = output.logits, output.answer_labels_N, output.answer_rows_N
    assert logits_NV is not None and labels_N is not None and rows_N is not None, "the batch has labels"
    wrong_N = (logits_NV.argmax(-1) != labels_N).float()
    return (torch.zeros(rows, device=rows_N.device).index_add_(0, rows_N, wrong_N) == 0).sum()
