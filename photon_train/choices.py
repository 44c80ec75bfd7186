"""How likely each of a few given answers is: closed questions scored without generating.

Legend: B questions, R answers of all of them together, N tokens of the longest, L tokens of a padded prompt, M after pruning,
V vocabulary; axis 3 is (t, h, w).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.scheduling import Scheduled


class Scored(NamedTuple):
    """Log-probabilities of each question's choices, in their order, and what was scheduled for the questions."""

    scores: list[list[float]]
    scheduled: Scheduled | None


@torch.no_grad()
def score_choices(
    model: PhotonForConditionalGeneration, inputs: Mapping[str, Any], choices: Sequence[Sequence[Tensor]]
) -> Scored:
    """Return log p(answer | question) of each answer, the sum over its tokens, for B prompts with some answers each.

    inputs: of the prompts, as `Prefix.followed_by` or the processor gives them. An answer is int64[n], n > 0, its end marker
    included. The probabilities are those that generation has: answers see the kept tokens only. The prompts run once.
    """
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    row_R = torch.tensor([row for row, answers in enumerate(choices) for _ in answers], device=model.device)
    ids = [ids_N.to(model.device) for answers in choices for ids_N in answers]
    token_RN, here_RN = (pad_sequence(x, batch_first=True) for x in (ids, [torch.ones_like(ids_N) for ids_N in ids]))
    first_RV = out.logits[row_R, -1].float().log_softmax(-1)
    log_RN = torch.cat([first_RV[:, None], _later(model, inputs, out, row_R, token_RN, here_RN)], dim=1)
    score_R = (log_RN.gather(2, token_RN[..., None])[..., 0] * here_RN).sum(1).cpu()
    counts = [len(answers) for answers in choices]
    return Scored([part.tolist() for part in score_R.split(counts)], out.scheduled)


def _later(
    model: PhotonForConditionalGeneration, inputs: Mapping[str, Any], out: Any, row_R: Tensor, token_RN: Tensor, here_RN: Tensor
) -> Tensor:
    """Return float32[R, N - 1, V]: log-probabilities behind each token but the last, on the pruned cache of the prompts."""
    length = inputs["input_ids"].shape[1]
    if token_RN.shape[1] == 1:
        return torch.zeros(len(token_RN), 0, model.config.text_config.vocab_size, device=token_RN.device)
    present_BM = inputs["attention_mask"] if out.scheduled is None else out.scheduled.present_BM
    out.past_key_values.batch_select_indices(row_R)
    position_RN = (length + out.rope_deltas.to(row_R.device))[row_R] + torch.arange(token_RN.shape[1] - 1, device=row_R.device)
    later = model(
        input_ids=token_RN[:, :-1],
        attention_mask=torch.cat([present_BM[row_R].long(), here_RN[:, :-1]], dim=1),
        position_ids=position_RN.expand(3, -1, -1),
        past_key_values=out.past_key_values,
    )
    log_RNV: Tensor = later.logits.float().log_softmax(-1)
    return log_RNV
