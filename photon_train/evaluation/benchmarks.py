"""Which metrics each benchmark is scored by. The first one that applies to a question is its main one."""

from __future__ import annotations

from collections.abc import Callable

from photon_train.evaluation import choice_metrics as closed
from photon_train.evaluation.cases import Case, as_label, as_letter
from photon_train.evaluation.choice_metrics import mra_linear, mra_thresholds, numeric_metrics, size_metrics
from photon_train.evaluation.metric import Metric, mean_of
from photon_train.evaluation.parsing import letter_v2, yes_no
from photon_train.evaluation.text_metrics import bleu, meteor_exact_stem, rouge


def rad3d() -> list[Metric]:
    """3D-RAD: accuracies of closed questions, corpus BLEU-1 and ROUGE-1 of open ones; sizes as sizes too."""
    words = [bleu(1, closed.is_free_text), rouge("rouge1", closed.is_free_text), closed.exact_normalised()]
    return [*_closed_and_yes_no(), *words, *size_metrics()]


def deeptumorvqa_v1() -> list[Metric]:
    """DeepTumorVQA v1 as scored by Photon: strict equality, and mra_thresholds of numbers."""
    score = mean_of("score_v1", anything, _score_v1, as_label)
    return [score, *_closed_and_yes_no(), *numeric_metrics(), closed.exact(), closed.exact_normalised()]


def deeptumorvqa_v2() -> list[Metric]:
    """DeepTumorVQA v2: its letter, mra_linear and bands of numbers, yes and no, and words without punctuation and case."""
    score = mean_of("score_v2", anything, _score_v2, lambda case, answer: (as_letter if case.closed else as_label)(case, answer))
    free = [closed.exact_normalised(), closed.partial_match()]
    return [score, closed.accuracy_letter_v2(), *_closed_and_yes_no(), *numeric_metrics(), *free]


def report() -> list[Metric]:
    """Reports: corpus BLEU-1 to 4, ROUGE-1 and L, METEOR of words and stems."""
    return [
        rouge("rouge1", anything),
        *(bleu(order, anything) for order in (1, 2, 3, 4)),
        rouge("rougeL", anything),
        meteor_exact_stem(anything),
    ]


def vqa() -> list[Metric]:
    """Any questions: what suits the form of each."""
    words = [bleu(1, closed.is_free_text), rouge("rouge1", closed.is_free_text), rouge("rougeL", closed.is_free_text)]
    return [*_closed_and_yes_no(), *numeric_metrics(), *words, closed.exact_normalised(), *size_metrics()]


METRICS: dict[str, Callable[[], list[Metric]]] = {
    "3d-rad": rad3d,
    "deeptumorvqa-v1": deeptumorvqa_v1,
    "deeptumorvqa-v2": deeptumorvqa_v2,
    "report": report,
    "vqa": vqa,
}


def anything(case: Case) -> bool:
    """Every question."""
    return True


def _closed_and_yes_no() -> list[Metric]:
    return [*closed.accuracies(), closed.accuracy_yes_no(), *closed.yes_no_metrics(), *closed.class_metrics()]


def _score_v1(case: Case) -> float:
    if case.form == "number" and not case.closed:
        return mra_thresholds(case.response, case.answer)
    return float(case.response == case.label)


def _score_v2(case: Case) -> float:
    if case.closed:
        return float(letter_v2(case.response) == case.letter)
    if case.form == "number":
        return mra_linear(case.response, case.answer)
    if case.form == "yes-no":
        return float(yes_no(case.response) == case.answer.lower())
    return closed.equal_normalised(case)
